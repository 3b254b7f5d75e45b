"""Journals as moves leave them, and an engine that knows their targets again."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from phaul_runtime.cutover.journal import Journal
from phaul_runtime.cutover.states import Role, State

ID = "ab" * 8
FORWARD = [State.ITERATING, State.FROZEN, State.PREPARED, State.COMMITTING, State.DONE]
LIVE, DEAD = [[1, 11]], [[2, 22]]


def build(state_dir: Path, role: Role, upto: State, members: list[list[int]]) -> Journal:
    """An end as a move leaves it, still open."""
    facts: dict[State, dict[str, Any]] = {
        State.ITERATING: {"engine": "process", "target": "1", "options": {}, "lost_s": 20.0},
        State.PREPARED: {"pid": 4711},
        State.DONE: {"pid": 4711, "downtime_ms": 12.3},
    }
    identity = {"root": members[0][0], "members": members}
    if role is Role.SOURCE:
        facts[State.ITERATING] |= {"to": "ssh://root@b", "identity": identity}
        facts[State.FROZEN] = {"identity": identity}
    else:
        facts[State.ITERATING] |= {"peer": "a", "manifest": {"pids": [1]}, "workdir": "/work"}
        facts[State.FROZEN] = {"images_dir": f"/work/{ID}/3"}
    journal = Journal.create(state_dir, ID, role)
    for state in FORWARD[: FORWARD.index(upto) + 1]:
        journal.enter(state, **facts.get(state, {}))
        if state is State.ITERATING:
            journal.add("made", "/srv/a", "/srv/b c")
    return journal


def open_files() -> int:
    gc.collect()  # those of earlier tests, whose objects nobody has any more
    return len(os.listdir("/proc/self/fd"))


class _Options(BaseModel):
    pass


class _Tree:
    """Knows a tree again by its members, as the engines do."""

    def __init__(self) -> None:
        self._members: list[tuple[int, int]] = []

    def recall(self, identity: Any) -> None:
        self._members = [(int(pid), int(start)) for pid, start in identity["members"]]

    def gone(self) -> bool:
        return [list(each) for each in self._members] != LIVE

    def end_rest(self) -> None:
        assert self.gone()


class ProcessesEngine:
    """Of the members above one lives."""

    options_model = _Options

    @staticmethod
    def source(*_: object, **__: object) -> _Tree:
        return _Tree()


def processes(_name: str) -> Any:
    """The engine of these journals, whatever it is called."""
    return ProcessesEngine
