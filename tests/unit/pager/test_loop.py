"""What a twin makes of the journal."""

from __future__ import annotations

import json
import os
import socket
import struct
from pathlib import Path

import pytest

from phaul_runtime.errors import DestinationError
from phaul_runtime.memory.fill_plan import FillPlan, Run, Runs
from phaul_runtime.pager import criu_socket, shared_log, uffd
from phaul_runtime.pager.account import Fate
from phaul_runtime.pager.loop import Pager
from phaul_runtime.pager.missing_ranges import MissingRanges
from phaul_runtime.pager.shared_log import Kind
from phaul_runtime.pager.task import Task

P = uffd.PAGE


@pytest.fixture
def pager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pager:
    monkeypatch.chdir(tmp_path)
    return Pager()


def happens(pager: Pager, kind: Kind, task: int, written: bytes) -> None:
    """As a system call writes it, not yet counted."""
    ours, theirs = os.pipe()
    os.write(theirs, written)
    pager._journal.expect(kind, task)
    os.readv(ours, [pager._journal.message])
    os.close(ours)
    os.close(theirs)


def message(event: int, *values: int) -> bytes:
    form = "=B7xI20x" if event == uffd.EVENT_FORK else "=B7xQQQ"
    return struct.pack(form, event, *values)


def test_a_fault_that_was_read_and_not_answered_is_answered(pager: Pager) -> None:
    pager._filler.tasks.add(Task(5, MissingRanges([P], [9 * P], [0])))
    happens(pager, Kind.EVENT, 0, message(uffd.EVENT_PAGEFAULT, 0, 3 * P + 17, 0))
    pager._replay()
    assert [fault[:2] for fault in pager._filler.deferred] == [(0, 3 * P)]


def test_all_that_the_process_did(pager: Pager) -> None:
    pager._filler.tasks.add(Task(5, MissingRanges([0], [16 * P], [0])))
    pager._journal.settled(0, 0, P, Fate.FILLED)
    for event in (
        message(uffd.EVENT_UNMAP, 2 * P, 4 * P, 0),
        message(uffd.EVENT_REMAP, 8 * P, 32 * P, 2 * P),
        message(uffd.EVENT_FORK, 77),
        message(uffd.EVENT_REMOVE, 12 * P, 16 * P, 0),
    ):
        happens(pager, Kind.EVENT, 0, event)
        pager._journal.keep()
    # Read, not counted when the other died.
    happens(pager, Kind.EVENT, 1, message(uffd.EVENT_REMOVE, P, 2 * P, 0))
    pager._replay()
    parent, child = pager._filler.tasks
    moved = (32 * P, 34 * P, 8 * P)
    assert parent.space.runs() == [
        (P, 2 * P, P),
        (4 * P, 8 * P, 4 * P),
        (10 * P, 12 * P, 10 * P),
        moved,
    ]
    assert child.fd == 77
    assert child.forked
    assert child.space.runs() == [(4 * P, 8 * P, 4 * P), (10 * P, 16 * P, 10 * P), moved]


def test_what_criu_had_said(pager: Pager) -> None:
    happens(pager, Kind.SAID, 0, struct.pack("=i", 42))
    pager._journal.keep()
    happens(pager, Kind.HANDED, 0, struct.pack("=QiiI", 20, 1, 1, 9))
    pager._journal.keep()
    happens(pager, Kind.SAID, 0, struct.pack("=i", criu_socket.FINISHED))
    pager._replay()
    assert [task.fd for task in pager._filler.tasks] == [9]
    assert pager._board[shared_log.STAGE] == shared_log.RUNNING


def test_what_ended_stays_so(pager: Pager) -> None:
    pager._filler.tasks.add(Task(5, MissingRanges([0], [P], [0])))
    pager._journal.note(Kind.ENDED, 0)
    pager._replay()
    assert pager._filler.tasks == [Task(-1, pager._filler.tasks[0].space)]
    assert not pager._filler.tasks[0].space
    pager._journal.note(Kind.RESET, 0)
    pager._replay()
    assert pager._filler.tasks == []


def numbers(pager: Pager) -> dict[str, object]:
    found = pager.status()
    names = ("pages", "missing", "filled", "present", "dropped", "ended", "unshared", "lost")
    return {name: found[name] for name in (*names, "notes")}


def test_a_heir_has_counted_what_the_dead_one_had(pager: Pager, tmp_path: Path) -> None:
    """All that can become of a page, done once and read from the journal by another."""

    def give(pager: Pager) -> None:
        for fd, pid in ((5, 42), (6, 43)):
            pager._filler.tasks.add(Task(fd, MissingRanges([P], [17 * P], [0]), pid))

    other = Pager()
    for each in (pager, other):
        give(each)
    pager._filler.tasks.settle(0, P, 3 * P, Fate.FILLED)
    pager._filler.tasks.settle(0, 4 * P, P, Fate.PRESENT)
    pager._filler.tasks.settle(0, 5 * P, P, Fate.FILLED)
    for event in (
        message(uffd.EVENT_UNMAP, 8 * P, 10 * P, 0),
        message(uffd.EVENT_FORK, 77),
        # Over a page that is missing: that one is given up.
        message(uffd.EVENT_REMAP, 10 * P, 16 * P, P),
    ):
        happens(pager, Kind.EVENT, 0, event)
        body = bytes(pager._journal.message)
        pager._journal.keep()
        pager._filler.tasks.apply(0, body)
    pager._filler.tasks.settle(2, 6 * P, P, Fate.UNSHARED)
    pager._filler.tasks.know(0, 4711)
    pager._journal.note(Kind.LATE, 0, 6 * P, 9 * P)
    pager._filler.tasks._late(0, 6 * P, 9 * P)
    pager._filler.tasks.settle_present(0, 6 * P)
    pager._filler.tasks.settle(0, 7 * P, P, Fate.GONE)
    assert pager._filler.tasks.end(1) == 6
    other._journal = pager._journal
    other._replay()
    assert numbers(other) == numbers(pager)
    assert numbers(other)["pages"] == 2 * 16 + 9
    found = numbers(other)
    found.pop("notes")
    assert found == {
        "pages": 41,
        "missing": 14,
        "filled": 4,
        "present": 1,
        "dropped": 3,
        "ended": 16,
        "unshared": 1,
        "lost": 2,
    }
    assert [task.host for task in other._filler.tasks] == [4711, 0, 0]
    assert [task.late for task in other._filler.tasks] == [[(6 * P, 9 * P)], [], []]


def test_of_a_failed_attempt_nothing_is_counted(pager: Pager) -> None:
    pager._filler.tasks.add(Task(5, MissingRanges([P], [17 * P], [0]), 42))
    pager._filler.tasks.settle(0, P, 3 * P, Fate.GONE)
    pager._journal.note(Kind.RESET, 0)
    pager._replay()
    assert numbers(pager) == {
        **dict.fromkeys(numbers(pager), 0),
        "notes": [],
    }


def test_a_twin_that_only_has_to_leave_the_result_has_all_of_it(
    pager: Pager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other had filled the last page, and died before it could leave the result."""

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    board = pager._board
    board[shared_log.STAGE] = shared_log.RUNNING
    pager._filler.tasks.add(Task(-1, MissingRanges([P], [4 * P], [0]), 42))
    pager._filler.tasks.settle(0, P, 3 * P, Fate.GONE)
    with pytest.raises(SystemExit):
        pager._finish()
    left = Path("pager.json").read_text()
    assert (json.loads(left)["lost"], json.loads(left)["state"]) == (3, "done")
    Path("pager.json").unlink()
    board[shared_log.CLEAN] = 0
    # It was born before anything was restored, and reads no journal any more.
    pager._filler.tasks.forget()
    with pytest.raises(SystemExit):
        pager._finish()
    assert Path("pager.json").read_text() == left


def test_what_criu_said_before_the_plan_is_heard_before_it_is_verified(pager: Pager) -> None:
    """Whoever asks may be heard before the connection that has waited for the plan."""
    runs = Runs()
    runs.append(Run(P, 1, 0, 0))
    Path("pages").write_bytes(bytes(P))
    FillPlan([str(Path("pages").absolute())], {42: runs}).save(Path("plan"))
    ours, theirs = os.pipe()
    with socket.socket(socket.AF_UNIX) as criu:
        criu.connect("lazy-pages.socket")
        criu.send(struct.pack("=i", 42))
        socket.send_fds(criu, [b"\0"], [ours])
        assert pager.plan("plan") == ""
        with pytest.raises(DestinationError, match="process 42 is not below the restored root"):
            pager.verify({})
    for fd in (ours, theirs):
        os.close(fd)
