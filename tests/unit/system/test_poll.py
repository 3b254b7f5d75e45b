"""Waiting for descriptors of any number."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from phaul_runtime.system.poll import readable, writable

MANY = 1100


@pytest.fixture
def high() -> Iterator[tuple[int, int]]:
    """The two ends of a pipe, both above what `select` knows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < MANY + 100:
        pytest.skip("this machine allows too few descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, MANY + 100), hard))
    ends = os.pipe()
    moved: list[int] = []
    try:
        for end in ends:
            moved.append(os.dup2(end, MANY + len(moved)))
            os.close(end)
        yield moved[0], moved[1]
    finally:
        for fd in moved:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_descriptor_above_1023(high: tuple[int, int]) -> None:
    out, into = high
    assert readable(out, within_s=0) == set()
    assert readable(out, within_s=0.01) == set()
    assert writable(into) == {into}
    os.write(into, b"x")
    assert readable(out, within_s=1e9) == {out}


def test_the_end_of_the_other_side_is_ready() -> None:
    out, into = os.pipe()
    os.close(into)
    assert readable(out) == {out}
    os.close(out)


@pytest.mark.parametrize("where", ["phaul_runtime", "engines", "hooks"])
def test_nothing_here_uses_select(where: str) -> None:
    """By the linter, whose rule must not get lost."""
    pytest.importorskip("ruff")
    root = Path(__file__).resolve().parents[3]
    argv = [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--quiet", where]
    done = subprocess.run(argv, cwd=root, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout
    shown = subprocess.run(
        [*argv[:-2], "--stdin-filename", "x.py", "-"],
        cwd=root, input="import select\nselect.select([], [], [])\n",
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert "TID251" in shown.stdout
