"""What the report says of a lazy restore once its last page is in."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from phaul_runtime.destination.lazy_restore import Filled, filled_of
from phaul_runtime.events import Event
from phaul_runtime.report import MigrationReport
from phaul_runtime.rpc import phaul_pb2 as pb
from phaul_runtime.source import await_memory
from phaul_runtime.source.await_memory import await_filled

STATUS: dict[str, Any] = {
    "state": "done",
    "pages": 20,
    "missing": 0,
    "faults": 3,
    "worst_fault_ms": 1.5,
    "ms": 70.0,
    "filled": 10,
    "present": 1,
    "dropped": 2,
    "ended": 3,
    "unshared": 1,
    "lost": 3,
    "notes": ["process 42: 3 pages from 0x1000 on have no place any more"],
}


class Agent:
    """Answers what a pager's status becomes on its way."""

    def __init__(self, status: dict[str, Any]) -> None:
        self._told = [filled_of({**status, "state": "filling", "missing": 9}), filled_of(status)]

    def filled(self) -> pb.FilledReply:
        reply = pb.FilledReply(**asdict(self._told.pop(0)))
        return pb.FilledReply.FromString(reply.SerializeToString())


def reported(status: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> MigrationReport:
    monkeypatch.setattr(await_memory, "_POLL_S", 0)
    report, events = MigrationReport("moved"), list[Event]()
    agent: Any = Agent(status)
    await_filled(agent, report, "", events.append)
    assert len(events) == 2
    return report


def test_every_page_is_in_the_report_and_what_went_wrong_is_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report = reported(STATUS, monkeypatch)
    left = {"state", "missing", "ms", "notes"}
    assert report.lazy == {name: value for name, value in STATUS.items() if name not in left}
    assert report.lazy_complete_ms == 70
    assert report.warnings == [f"lazy restore: {STATUS['notes'][0]}"]


def test_nothing_is_said_if_all_went_well(monkeypatch: pytest.MonkeyPatch) -> None:
    status = {**STATUS, "filled": 13, "lost": 0, "notes": []}
    assert reported(status, monkeypatch).warnings == []


def test_a_pager_that_was_started_by_an_earlier_version(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("state", "pages", "missing", "faults", "worst_fault_ms", "ms")
    assert filled_of({name: STATUS[name] for name in names}) == Filled(
        True, 20, 0, 3, 1.5, 70.0, remote_missing=0
    )
