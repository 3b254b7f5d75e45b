"""A large batch on simulated hosts, with random failures, killed and resumed."""

from __future__ import annotations

import functools
import json
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("dbos")

SIMULATE = Path(__file__).parent / "batch" / "simulate.py"
WITHIN_S = 300.0
Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(python: list[str]) -> Run:
    return functools.partial(run_with, python)


def run_with(
    python: list[str], root: Path, moves: int, *flags: str, kill_after: int = 0
) -> list[dict[str, Any]]:
    """A controller to its end, or killed once that many moves have ended; what it printed."""
    argv = [*python, str(SIMULATE), "--store", str(root / "store"),
            "--ledger", str(root / "ledger"), "--moves", str(moves), *flags]  # fmt: skip
    told = []
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as found:
        assert found.stdout is not None
        assert found.stderr is not None
        for line in found.stdout:
            told.append(json.loads(line))
            if kill_after and len(told) == kill_after:
                found.kill()
                break
        found.stdout.read()
        said = found.stderr.read()
        found.wait(WITHIN_S)
        assert kill_after or found.returncode == 0, said
        assert "Traceback" not in said, said
    return told


@pytest.mark.parametrize(
    ("moves", "seconds"),
    [(90, "0.1"), pytest.param(1000, "0.5", marks=pytest.mark.thorough)],
)
def test_done_once_within_limits_in_flat_memory(
    run: Run, tmp_path: Path, moves: int, seconds: str
) -> None:
    flags = ("--seconds", seconds, "--failing", "0.2", "--total", "12", "--per-host", "3")
    for _ in range(2):
        run(tmp_path, moves, *flags, kill_after=moves // 3)
    *ended, last = run(tmp_path, moves, *flags)
    assert last["states"] == {"moved": moves}
    # What had ended before the kills is not done again.
    assert len(ended) < moves // 2
    attempts = [json.loads(path.read_text()) for path in (tmp_path / "ledger").iterdir()]
    assert Counter(each["name"] for each in attempts if each["moved"]) == Counter(
        f"m{number}" for number in range(moves)
    )
    assert any(not each["moved"] for each in attempts)
    most = last["most"]
    assert most["total"] <= 12
    assert max(most["from"], most["to"]) <= 3
    half, end = last["mib"][1], last["mib"][3]
    assert end - half < 10, last["mib"]


def test_all_that_failed_is_in_the_summary(run: Run, tmp_path: Path) -> None:
    *ended, last = run(tmp_path, 30, "--seconds", "0.05", "--failing", "1", "--retries", "1")
    assert last["states"] == {"failed": 30}
    assert {(each["state"], each["attempts"]) for each in ended} == {("failed", 2)}
