"""Some thousand mutated messages: `make fuzz` has a million, and other ones each time."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import pytest

from tests.fuzz import run
from tests.fuzz.mutation import Random
from tests.fuzz.target import Target

# Those that start programs, or ask a whole agent, take their time.
_FEW = {"calls": 50, "pager": 300, "journals": 30, "images": 30, "pages": 1500}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("grpc").setLevel(logging.CRITICAL)


@pytest.mark.parametrize("kind", run.TARGETS, ids=lambda kind: kind.name)
def test_nothing_but_our_own_errors_comes_of(kind: type[Target]) -> None:
    before = run.held()[0]
    outcome = run.fuzz(kind, 1, _FEW.get(kind.name, 250), 60)
    assert outcome.findings == []
    assert outcome.cases > 0
    # grpc keeps some of its own.
    assert run.held()[0] <= before + (0 if kind.name != "calls" else 8)


class _Bad(Target):
    name = "bad"

    def case(self, rng: Random) -> tuple[int, bool]:
        if rng.random() < 0.1:
            raise ValueError("what nobody expected")
        return 1, True


def test_a_finding_is_told_and_can_be_repeated() -> None:
    outcome = run.fuzz(_Bad, 7, 100, 60)
    assert outcome.bad
    assert "1 uncaught" not in str(outcome)
    first = outcome.findings[0]
    assert "what nobody expected" in first
    number = int(first.partition("CASE=")[2].split()[0])
    assert "SEED=7" in first
    assert run.fuzz(_Bad, 7, 1, 60, only=number).findings == [first]
    assert run.fuzz(_Bad, 7, 1, 60, only=number + 1).cases == 1


def test_a_case_that_hangs_is_one(tmp_path: Path) -> None:
    class Hanging(Target):
        def case(self, rng: Random) -> tuple[int, bool]:
            while True:
                rng.random()

    outcome = run.Outcome("hanging")
    with pytest.raises(TimeoutError), run._bounded(1):
        Hanging(tmp_path).case(random.Random())
    assert not outcome.bad
