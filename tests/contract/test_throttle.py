"""Whatever becomes of a move, its target is not left slowed."""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from phaul_runtime.criu.session import Criu, CriuFeatures, CriuNotify
from phaul_runtime.cutover.cutover import CutOver, Held, Running
from phaul_runtime.cutover.journal import Journal, read_records, replay
from phaul_runtime.cutover.states import Role, State, Verdict
from phaul_runtime.errors import Cancelled, DestinationError, NotConverging, PhaulError, Refused
from phaul_runtime.events import Event, IterationDone, Warned
from phaul_runtime.hooks.lifecycle import Hooks
from phaul_runtime.library.api import PhaulConfig, PhaulRemote
from phaul_runtime.library.client import PhaulClient
from phaul_runtime.library.policy import BudgetPolicy
from phaul_runtime.library.throttle import FACT, Throttle
from phaul_runtime.recovery.resolve import Settler
from phaul_runtime.report import MigrationReport
from phaul_runtime.system.cancel import Cancellation
from phaul_runtime.testing import FakeCase, Place
from phaul_runtime.testing.fake import CGROUP, FakeSource

UNLIMITED = "max 100000"
ID = "7e" * 8


class HotCriu(Criu):
    """Pre-dumps that always find the same pages dirty, and take as long."""

    def feature_check(self) -> CriuFeatures:
        return CriuFeatures(mem_track=True, lazy_pages=False, pidfd_store=False)

    def pre_dump(self, opts: Any, notify: CriuNotify | None = None) -> None:
        from pycriu.images import stats_pb2

        time.sleep(0.05)
        entry = stats_pb2.stats_entry()
        for field in entry.dump.DESCRIPTOR.fields:
            setattr(entry.dump, field.name, 0)
        entry.dump.pages_written = 1000
        body = entry.SerializeToString()
        directory = Path(f"/proc/self/fd/{opts.images_dir_fd}")
        head = struct.pack("<III", 0x55105940, 0x57093306, len(body))
        (directory / "stats-dump").write_bytes(head + body)


class NoRemote(PhaulRemote):
    def start_iter(self) -> None:
        pass

    def stop_iter(self) -> None:
        pass


class There:
    """The destination, as the cut-over sees it; `fail` is called in the freeze."""

    def __init__(self, fail: Callable[[], object]) -> None:
        self.fail = fail

    def sync_files(self) -> tuple[int, int]:
        return 0, 0

    def stop_files(self) -> None:
        pass

    def prepare(self, images_dir: Path) -> tuple[Held, int]:
        self.fail()
        return Held(1, 0.0, 0.0), 0

    def commit(self) -> Running:
        return Running(1, 0.0, 0.0)


class Slowed:
    """A move of the fake's victim whose pages stay hot."""

    def __init__(self, tmp_path: Path) -> None:
        self.case = FakeCase(tmp_path / "victims")
        self.target = Path(self.case.start())
        self.group = self.target / CGROUP
        self.group.mkdir()
        (self.group / "cpu.max").write_text(UNLIMITED)
        (self.group / "cpu.stat").write_text("usage_usec 0\n")
        (self.group / "cgroup.procs").write_text("")
        self._used = 0.0
        self.state_dir = tmp_path / "state"
        self.wdir = tmp_path / "images"
        self.wdir.mkdir()
        self.cancellation = Cancellation()
        self.events: list[Event] = []
        self.in_freeze: list[str] = []
        self.slowed: list[str] = []
        self.fail: Callable[[], object] = lambda: None
        self.if_not_converging = "throttle"
        self.at_round: Callable[[int], object] = lambda _: None

    @property
    def cpu_max(self) -> str:
        return (self.group / "cpu.max").read_text()

    def _tick(self, stop: threading.Event) -> None:
        """It uses all the CPU that it gets."""
        while not stop.wait(0.005):
            self._used += 0.005
            part = self.group / "part"
            part.write_text(f"usage_usec {int(self._used * 1e6)}\n")
            part.replace(self.group / "cpu.stat")

    def listen(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, IterationDone):
            self.slowed.append(self.cpu_max)
            self.at_round(event.number)

    def _at_freeze(self) -> None:
        self.in_freeze.append(self.cpu_max)
        self.fail()

    def migrate(self) -> MigrationReport:
        source = FakeSource(str(self.target))
        pid = source.inspect().pid
        journal = Journal.create(self.state_dir, ID, Role.SOURCE)
        journal.enter(
            State.ITERATING, engine="fake", target=str(self.target), options={},
            identity=dict(source.identity()),
        )  # fmt: skip
        throttle = Throttle(
            source.throttle_cgroup(), pid, remember=lambda fact: journal.note(**{FACT: fact})
        )
        cut_over = CutOver(
            There(self._at_freeze),
            self.listen,
            self.cancellation,
            journal,
            in_freeze=throttle.lift,
        )
        ours, theirs = socket.socketpair()
        stop = threading.Event()
        ticking = threading.Thread(target=self._tick, args=(stop,))
        ticking.start()
        try:
            with journal, ours, theirs:
                return PhaulClient(
                    source.local(cut_over, self.cancellation),
                    NoRemote(),
                    PhaulConfig(pid, ours.fileno(), str(self.wdir)),
                    policy=BudgetPolicy(25, 6),
                    if_not_converging=self.if_not_converging,
                    throttle=throttle,
                    criu=HotCriu("no-such-criu"),
                    listener=self.listen,
                    cancellation=self.cancellation,
                ).migrate()
        finally:
            stop.set()
            ticking.join()

    def fact(self) -> Mapping[str, Any] | None:
        _, facts = replay(read_records(self.state_dir, ID, Role.SOURCE))
        found: Mapping[str, Any] | None = facts[FACT]
        return found


@pytest.fixture
def move(tmp_path: Path) -> Iterator[Slowed]:
    found = Slowed(tmp_path)
    yield found
    found.case.clear()


def raising(error: PhaulError) -> Callable[..., object]:
    def action(*_: object) -> None:
        raise error

    return action


def test_it_is_undone_in_the_freeze_and_stays_so(move: Slowed) -> None:
    report = move.migrate()
    assert report.result == "moved"
    assert any(quota != UNLIMITED for quota in move.slowed)
    assert report.throttled_to is not None
    assert report.throttled_to < 0.6
    assert not report.converged
    assert report.expected_freeze_ms == report.iterations[-1].expected_freeze_ms
    assert any(isinstance(e, Warned) and "did not meet" in e.text for e in move.events)
    assert move.in_freeze == [UNLIMITED]
    assert move.cpu_max == UNLIMITED
    assert move.fact() is None


def test_it_is_undone_after_a_failure_in_the_freeze(move: Slowed) -> None:
    move.fail = raising(DestinationError("no room"))
    with pytest.raises(DestinationError):
        move.migrate()
    assert move.in_freeze == [UNLIMITED]
    assert move.cpu_max == UNLIMITED
    assert move.fact() is None
    assert move.case.alive(Place.SOURCE)


def test_it_is_undone_after_a_failure_or_a_cancellation_before_it(move: Slowed) -> None:
    def cancel(number: int) -> None:
        if move.cpu_max != UNLIMITED:
            move.cancellation.request()

    move.at_round = cancel
    with pytest.raises(Cancelled):
        move.migrate()
    assert move.slowed[-1] != UNLIMITED
    assert move.in_freeze == []
    assert move.cpu_max == UNLIMITED
    assert move.fact() is None


def test_abort_with_a_throttle_undoes_it_too(move: Slowed) -> None:
    move.if_not_converging = "abort"
    with pytest.raises(NotConverging):
        move.migrate()
    assert any(quota != UNLIMITED for quota in move.slowed)
    assert move.cpu_max == UNLIMITED


def test_a_recovery_undoes_what_a_killed_process_left(
    move: Slowed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The process that is killed is a child: it dies between two rounds, with the target slowed.
    def die(_: int) -> None:
        if move.cpu_max != UNLIMITED:
            os._exit(9)

    move.at_round = die
    pid = os.fork()
    if pid == 0:
        try:
            move.migrate()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert move.cpu_max != UNLIMITED
    fact = move.fact()
    assert fact is not None
    assert fact["cpu_max"] == UNLIMITED
    json.dumps(fact)
    settler = Settler(
        move.state_dir, tmp_path / "work", Criu("no-such-criu"), Hooks(), lambda _: move.case.engine
    )
    assert settler.settle(ID, Role.SOURCE, Verdict.DISCARD).warnings == ()
    assert move.cpu_max == UNLIMITED
    assert move.case.alive(Place.SOURCE)


def test_a_target_without_a_cgroup_of_its_own_is_refused(move: Slowed) -> None:
    (move.group / "cpu.max").unlink()
    source = FakeSource(str(move.target))
    source.inspect()
    with pytest.raises(Refused, match="no cgroup of its own"):
        source.throttle_cgroup()
