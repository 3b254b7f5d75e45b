"""Slowing a target by its cgroup, as seen in the files of one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phaul_runtime.errors import MigrationFailed, Refused
from phaul_runtime.library.throttle import FLOOR, Throttle, limit_of, next_share, own_cgroup, undo

UNLIMITED = "max 100000"


class Group:
    """Files that stand for a cgroup; `use` lets its processes have used CPU time."""

    def __init__(self, path: Path, cpu_max: str = UNLIMITED) -> None:
        self.path = path
        path.mkdir()
        (path / "cpu.max").write_text(cpu_max)
        self.used_us = 0
        self.use(0.0)

    def use(self, seconds: float) -> None:
        self.used_us += int(seconds * 1e6)
        (self.path / "cpu.stat").write_text(f"usage_usec {self.used_us}\nuser_usec 0\n")

    @property
    def cpu_max(self) -> str:
        return (self.path / "cpu.max").read_text()


@pytest.fixture
def group(tmp_path: Path) -> Group:
    return Group(tmp_path / "group")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second passes whenever it is looked at."""
    now = [0.0]

    def monotonic() -> float:
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr("phaul_runtime.library.throttle.time.monotonic", monotonic)


@given(st.floats(0, 64), st.one_of(st.none(), st.floats(0.01, 64)))
def test_a_step_is_slower_and_never_below_the_floor(used: float, limit: float | None) -> None:
    share = next_share(used, limit)
    now = used if limit is None else min(used, limit)
    assert (share is None) == (now <= FLOOR)
    assert share is None or FLOOR <= share < now


@pytest.mark.parametrize(
    ("text", "cpus"), [(UNLIMITED, None), ("50000 100000", 0.5), ("300000 150000", 2.0)]
)
def test_cpu_max_is_understood(text: str, cpus: float | None) -> None:
    assert limit_of(text) == cpus


@pytest.mark.usefixtures("clock")
def test_it_halves_what_is_used_down_to_the_floor_and_undoes_it(group: Group) -> None:
    told: list[Mapping[str, Any] | None] = []
    shares = []
    with Throttle(group.path, os.getpid(), remember=told.append) as throttle:
        group.use(1.0)
        while (share := throttle.slow_down()) is not None:
            shares.append(share)
            assert group.cpu_max == f"{round(share * 100_000)} 100000"
            group.use(share)
    assert shares == pytest.approx([0.5, 0.25, 0.125, 0.0625, FLOOR])
    assert throttle.share == FLOOR
    assert group.cpu_max == UNLIMITED
    assert [fact and fact["cpu_max"] for fact in told] == [UNLIMITED, None]


@pytest.mark.usefixtures("clock")
def test_a_limit_that_was_there_comes_back(tmp_path: Path) -> None:
    group = Group(tmp_path / "limited", "200000 50000")
    with Throttle(group.path, os.getpid()) as throttle:
        group.use(6.0)  # what it used before it was limited
        assert throttle.slow_down() == 2.0
    assert group.cpu_max == "200000 50000"


@pytest.mark.usefixtures("clock")
def test_one_that_hardly_runs_is_left_alone(group: Group) -> None:
    with Throttle(group.path, os.getpid()) as throttle:
        group.use(0.04)
        assert throttle.slow_down() is None
        assert group.cpu_max == UNLIMITED
    assert throttle.share is None


@pytest.mark.usefixtures("clock")
def test_nothing_is_changed_before_it_is_remembered(group: Group) -> None:
    def full(_: object) -> None:
        raise MigrationFailed("the disk is full")

    with Throttle(group.path, os.getpid(), remember=full) as throttle:
        group.use(1.0)
        with pytest.raises(MigrationFailed):
            throttle.slow_down()
    assert group.cpu_max == UNLIMITED


@pytest.mark.usefixtures("clock")
def test_another_process_can_undo_it(group: Group) -> None:
    told: list[Mapping[str, Any] | None] = []
    with Throttle(group.path, os.getpid(), remember=told.append) as throttle:
        group.use(1.0)
        throttle.slow_down()
        fact = told[0]
        assert fact is not None
        assert group.cpu_max == "50000 100000"
        assert undo({**fact, "boot_id": "another"}) == ""
        assert group.cpu_max == "50000 100000"
        for _ in range(2):
            assert undo(fact) == ""
            assert group.cpu_max == UNLIMITED
    assert undo(None) == ""
    assert undo({**fact, "cgroup": str(group.path / "gone")}) == ""


@pytest.mark.usefixtures("clock")
def test_what_cannot_be_undone_is_told(group: Group) -> None:
    warnings: list[str] = []
    with Throttle(group.path, os.getpid(), warn=warnings.append) as throttle:
        group.use(1.0)
        throttle.slow_down()
        (group.path / "cpu.max").unlink()
        (group.path / "cpu.max").mkdir()
    assert "could not be set back to 'max 100000'" in warnings[0]


TRACER = """
import ctypes, sys
ctypes.CDLL(None).ptrace(0x4206, int(sys.argv[1]), 0, 0)  # PTRACE_SEIZE
print(flush=True)
sys.stdin.read()
"""


def test_while_it_is_traced_it_runs_at_full_speed(group: Group) -> None:
    with subprocess.Popen(["sleep", "60"]) as target:
        try:
            with Throttle(group.path, target.pid) as throttle:
                time.sleep(0.05)
                group.use(1.0)
                assert throttle.slow_down() is not None
                slowed = group.cpu_max
                with subprocess.Popen(
                    [sys.executable, "-c", TRACER, str(target.pid)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                ) as other:
                    assert other.stdout is not None
                    other.stdout.readline()
                    until(group, UNLIMITED)
                    assert other.stdin is not None
                    other.stdin.close()
                until(group, slowed)
        finally:
            target.kill()
    assert group.cpu_max == UNLIMITED


def until(group: Group, cpu_max: str) -> None:
    deadline = time.monotonic() + 60
    while group.cpu_max != cpu_max:
        assert time.monotonic() < deadline, group.cpu_max
        time.sleep(0.005)


# -- whose cgroup it is ------------------------------------------------------------------------


class Host:
    """Files that stand for a host's cgroups and processes."""

    def __init__(self, path: Path) -> None:
        self.root, self.proc = path / "cgroup", path / "proc"
        self.root.mkdir()
        (self.root / "cgroup.controllers").write_text("cpu memory")

    def group(self, name: str, *pids: int, cpu: bool = True) -> Path:
        directory = self.root / name
        directory.mkdir(parents=True)
        (directory / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids))
        if cpu:
            (directory / "cpu.max").write_text(UNLIMITED)
        for pid in pids:
            (self.proc / str(pid)).mkdir(parents=True)
            (self.proc / str(pid) / "cgroup").write_text(f"1:cpu:/\n0::/{name}\n")
        return directory

    def own(self, *pids: int) -> Path:
        return own_cgroup(pids, self.root, self.proc)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_a_cgroup_of_its_own(host: Host) -> None:
    group = host.group("web", 10, 11)
    assert host.own(10, 11) == group
    host.group("web/below", 12)
    assert host.own(10, 11, 12) == group


def test_a_cgroup_that_is_shared_is_not_slowed(host: Host) -> None:
    host.group("session", 10, 11, 99)
    with pytest.raises(Refused, match="shares its cgroup /session with others, as pid 99"):
        host.own(10, 11)
    host.group("other", 20)
    with pytest.raises(Refused, match="pid 20 of the target is in another cgroup"):
        host.own(10, 11, 99, 20)


def test_cgroups_that_cannot_be_limited(host: Host) -> None:
    host.group("plain", 10, cpu=False)
    with pytest.raises(Refused, match="no cpu controller"):
        host.own(10)
    (host.proc / "11").mkdir()
    (host.proc / "11/cgroup").write_text("0::/\n")
    with pytest.raises(Refused, match="root cgroup"):
        host.own(11)
    with pytest.raises(Refused, match="has ended"):
        host.own(12)
    (host.root / "cgroup.controllers").unlink()
    with pytest.raises(Refused, match="no cgroup v2"):
        host.own(10)
