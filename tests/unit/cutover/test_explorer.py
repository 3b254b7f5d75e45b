"""One copy, whatever comes in between: the real code through all interleavings up to a depth."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from phaul_runtime.cutover.journal import Journal
from phaul_runtime.cutover.states import Decision, Role, Standing, State, Verdict, decide
from phaul_runtime.destination import copy
from phaul_runtime.recovery import recover
from tests.explorer.explore import explore

# Commands after the move, each with a fault or none; docs/recovery.md has the numbers of two.
DEPTH = 2 if os.environ.get("THOROUGH") else 1
MODES = ("pre-copy", "post-copy")


@pytest.fixture
def quick() -> Iterator[Path]:
    """A directory in memory, where there is one: thousands of journals are written."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as directory:
        yield Path(directory)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL")


@pytest.mark.parametrize("mode", MODES)
def test_one_copy_lives(quick: Path, mode: str) -> None:
    found = explore(mode, DEPTH, quick)
    assert (found.wrong, found.none) == ([], []), "\n".join([*found.wrong, *found.none])
    # It has looked at something.
    assert found.states > 50 * DEPTH
    assert found.runs > 500 * DEPTH


# -- a table or a step that is wrong is found ------------------------------------------------------


def runs_while_the_source_lives(source: Standing | None, there: Standing | None) -> Decision:
    found = decide(source, there)
    if source is not None and source.state is State.COMMITTING and source.alive:
        return Decision(Verdict.RUN, "wrong")
    return found


def discards_what_is_the_only_one(source: Standing | None, there: Standing | None) -> Decision:
    found = decide(source, there)
    if found.reason == "the source's copy was killed":
        return Decision(Verdict.DISCARD, "wrong")
    return found


@pytest.mark.parametrize(
    ("wrong", "seen"),
    [(runs_while_the_source_lives, "wrong"), (discards_what_is_the_only_one, "none")],
)
def test_a_wrong_decision_is_found(
    quick: Path, monkeypatch: pytest.MonkeyPatch, wrong: object, seen: str
) -> None:
    monkeypatch.setattr(recover, "decide", wrong)
    assert getattr(explore("pre-copy", 0, quick), seen)


def test_a_table_that_commits_too_early_is_found(
    quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source is given up before it is on the disk that it is."""
    enter = Journal.enter

    def late(self: Journal, state: State, **facts: object) -> None:
        if self.role is Role.SOURCE and state is State.COMMITTING:
            self.state = state  # nobody else will know
            return
        enter(self, state, **facts)

    monkeypatch.setattr(Journal, "enter", late)
    assert explore("pre-copy", 0, quick).none


def test_a_copy_that_is_rebuilt_although_it_runs_is_found(
    quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy, "was_resumed", lambda _: False)
    assert explore("pre-copy", 0, quick).wrong
