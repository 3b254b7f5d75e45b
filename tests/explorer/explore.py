"""All that can happen within some commands: breadth first, each state looked at once.

A path is a list of commands, each with at most one fault. Where two paths lead to the same state of
disks, processes and agents, only the first is followed. From each state a recovery without faults
has to bring about one running copy, two settled journals, and hooks that were told of the move.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.explorer.hosts import Hosts, hosts
from tests.explorer.world import Wrong

COMMANDS = ("recover here", "recover there", "the lost are noticed")
# Without faults: the agents of the dead give up, and each end is asked.
REMEDY = ("the lost are noticed", "recover here", "recover there", "recover here")

Fault = tuple[int, str] | None
Path_ = tuple[tuple[str, Fault], ...]
# Of a command: what it is, and the faults that may come there.
Points = list[tuple[str, tuple[str, ...]]]


@dataclass
class Found:
    """What an exploration has seen.

    Attributes:
        states: different states between two commands.
        runs: commands that were driven, each with one fault or none, to a state.
        wrong: paths on which both copies ran, or one that ran was ended.
        none: paths after which no recovery brings one copy back.
    """

    states: int = 0
    runs: int = 0
    wrong: list[str] = field(default_factory=list)
    none: list[str] = field(default_factory=list)


def explore(mode: str, depth: int, root: Path) -> Found:
    """Explore a move and up to `depth` commands after it.

    Args:
        mode: of the move, `pre-copy` or `post-copy`.
        depth: commands after the move, each with at most one fault.
        root: a directory for the hosts; quick, since thousands are made.
    """
    found = Found()
    seen: set[object] = set()
    frontier: list[Path_] = [()]
    for level in range(depth + 1):
        following: list[Path_] = []
        for path in frontier:
            for command in COMMANDS if level else ("migrate",):
                points = _step(mode, (*path, (command, None)), root, found, seen, following)
                for fault in _faults(points):
                    _step(mode, (*path, (command, fault)), root, found, seen, following)
        frontier = following
    found.states = len(seen)
    return found


def _faults(points: Points) -> Iterator[Fault]:
    """Each that may come in a command that has these."""
    for number, (_, kinds) in enumerate(points):
        for kind in kinds:
            yield (number, kind)


def _step(
    mode: str, path: Path_, root: Path, found: Found, seen: set[object], following: list[Path_]
) -> Points:
    """Look at where a path leads; returns the points of its last command."""
    found.runs += 1
    said: list[str] = []
    points: Points = []
    try:
        with _at(mode, path, root) as (here, said):
            points = here.world.points
            state = here.signature()
            if state in seen:
                return points
            seen.add(state)
            following.append(path)
            for command in REMEDY:
                said.append(f"{command}: {here.run(command)}")
            world = here.world
            told = {"source", "destination"} if world.copy == "runs" else set()
            one = world.source_runs + (world.copy == "runs") == 1
            if not one or not here.settled() or world.announced != told:
                found.none.append(_tell(path, [*said, str(here.signature())]))
    except Wrong as error:
        found.wrong.append(_tell(path, [*said, str(error)]))
    return points


class _at:  # noqa: N801 - as a function
    """Fresh hosts that have come along a path, and what was said on it."""

    def __init__(self, mode: str, path: Path_, root: Path) -> None:
        self._directory = Path(tempfile.mkdtemp(dir=root))
        self._hosts = hosts(self._directory, mode)
        self._path = path

    def __enter__(self) -> tuple[Hosts, list[str]]:
        here, said = self._hosts.__enter__(), []
        try:
            for command, fault in self._path:
                came = here.run(command, fault)
                at = here.world.points[fault[0]][0] if fault else ""
                said.append(f"{command}{f' [{fault[1]} at {at}]' if fault else ''}: {came}")
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return here, said

    def __exit__(self, *error: object) -> None:
        self._hosts.__exit__(None, None, None)
        shutil.rmtree(self._directory)


def _tell(path: Path_, said: list[str]) -> str:
    return "\n    ".join([f"{path}:", *said])
