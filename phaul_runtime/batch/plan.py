"""Which moves may start: pure, from the file of moves and what has become of each.

A `Planner` is told of every end and says what starts next. The same calls in the same order give
the same answers, whatever the time: a workflow that is replayed decides as it did before.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from phaul_runtime.batch.model import Batch, Move, predecessors


class MoveState(Enum):
    """What has become of a move; the value is what JSON has."""

    WAITING = "waiting"
    RUNNING = "running"
    MOVED = "moved"
    REFUSED = "refused"
    FAILED = "failed"
    UNKNOWN = "unknown"
    CANCELLED = "cancelled"
    ERROR = "error"
    SKIPPED = "skipped"

    @property
    def ended(self) -> bool:
        """Nothing more is done about it."""
        return self not in (MoveState.WAITING, MoveState.RUNNING)

    @property
    def counts_as_failure(self) -> bool:
        """For `stop_after_failures`: what was only skipped or cancelled does not."""
        return self in (
            MoveState.REFUSED,
            MoveState.FAILED,
            MoveState.UNKNOWN,
            MoveState.ERROR,
        )


@dataclass(frozen=True)
class _Lane:
    """Moves that compete for the same places: of these only the first is looked at."""

    source: str
    destination: str
    group: str | None


class Planner:
    """Says what starts next.

    Args:
        batch: the moves.
        ended: those that were at their end before.

    Attributes:
        states: of every move, by name.
        stopping: nothing else is started.
    """

    def __init__(self, batch: Batch, ended: Mapping[str, MoveState] | None = None) -> None:
        self._batch = batch
        self._moves = {move.name: move for move in batch.moves}
        self._index = {move.name: number for number, move in enumerate(batch.moves)}
        self._before = predecessors(batch)
        self._after: dict[str, list[str]] = {name: [] for name in self._moves}
        for name, names in self._before.items():
            for each in sorted(names):
                self._after[each].append(name)
        self._chain = _chains(self._moves, self._after)
        self.states = dict.fromkeys(self._moves, MoveState.WAITING)
        self.stopping = False
        self.failures = 0
        self._left_from: Counter[str] = Counter(m.source_host for m in batch.moves)
        self._left_to: Counter[str] = Counter(m.destination_host for m in batch.moves)
        self._from: Counter[str] = Counter()
        self._to: Counter[str] = Counter()
        self._groups: Counter[str] = Counter()
        self._running = self._first = 0
        self._lanes: dict[_Lane, list[tuple[int, int, str]]] = {}
        for name, state in (ended or {}).items():
            self.states[name] = state
            self._leave(self._moves[name])
        self._waits = {
            name: {each for each in names if self.states[each] is not MoveState.MOVED}
            for name, names in self._before.items()
        }
        for name in self._moves:
            if self.states[name] is MoveState.WAITING:
                self._look_at(name)

    # -- what is asked ---------------------------------------------------------------------

    @property
    def running(self) -> int:
        """How many are under way."""
        return self._running

    @property
    def over(self) -> bool:
        """Nothing is under way and nothing will be started."""
        return self._running == 0 and (self.stopping or not any(self._lanes.values()))

    def start(self) -> Iterator[Move]:
        """All that may start now; each counts as running once it is taken."""
        while not self.stopping and self._running < self._batch.limits.total:
            lane = self._next_lane()
            if lane is None:
                return
            name = heapq.heappop(self._lanes[lane])[-1]
            move = self._moves[name]
            self.states[name] = MoveState.RUNNING
            self._count(move, 1)
            yield move

    # -- what is told ----------------------------------------------------------------------

    def ended(self, name: str, state: MoveState) -> list[str]:
        """A running move has ended.

        Returns:
            those that are skipped now, since they were to come after it.
        """
        self.states[name] = state
        move = self._moves[name]
        self._count(move, -1)
        self._leave(move)
        if state.counts_as_failure:
            self.failures += 1
            limit = self._batch.stop_after_failures
            if limit is not None and self.failures >= limit:
                self.stopping = True
        if state is MoveState.MOVED:
            for each in self._after[name]:
                self._waits[each].discard(name)
                if self.states[each] is MoveState.WAITING:
                    self._look_at(each)
            return []
        return self._skip_after(name)

    # -- small parts -----------------------------------------------------------------------

    def _look_at(self, name: str) -> None:
        """A waiting move: it is ready, or has to wait, or will never be ready."""
        if any(self.states[each].ended for each in self._waits[name]):
            self.states[name] = MoveState.SKIPPED
            self._leave(self._moves[name])
            self._skip_after(name)
        elif not self._waits[name]:
            lane = _lane(self._moves[name])
            chain = self._chain[name] if self._batch.order == "balanced" else 0
            heapq.heappush(self._lanes.setdefault(lane, []), (-chain, self._index[name], name))

    def _skip_after(self, name: str) -> list[str]:
        skipped, found = [], [name]
        while found:
            for each in self._after[found.pop()]:
                if self.states[each] is MoveState.WAITING:
                    self.states[each] = MoveState.SKIPPED
                    self._leave(self._moves[each])
                    skipped.append(each)
                    found.append(each)
        return skipped

    def _leave(self, move: Move) -> None:
        self._left_from[move.source_host] -= 1
        self._left_to[move.destination_host] -= 1

    def _count(self, move: Move, by: int) -> None:
        self._running += by
        self._from[move.source_host] += by
        self._to[move.destination_host] += by
        if move.group is not None:
            self._groups[move.group] += by

    def _next_lane(self) -> _Lane | None:
        if self._batch.order == "strict":
            return self._lane_of_first()
        best: tuple[float, int] | None = None
        found = None
        for lane, ready in self._lanes.items():
            if ready and self._has_place(lane):
                rank = (-self._pressure(lane, -ready[0][0]), ready[0][1])
                if best is None or rank < best:
                    best, found = rank, lane
        return found

    def _lane_of_first(self) -> _Lane | None:
        """Of the first move that waits, if it may start: no other passes it."""
        names = list(self._moves)
        while self._first < len(names) and self.states[names[self._first]] is not MoveState.WAITING:
            self._first += 1
        if self._first == len(names):
            return None
        lane = _lane(self._moves[names[self._first]])
        ready = self._lanes.get(lane)
        at_head = ready and ready[0][1] == self._first
        return lane if at_head and self._has_place(lane) else None

    def _has_place(self, lane: _Lane) -> bool:
        limits = self._batch.limits
        if self._from[lane.source] >= limits.per_source:
            return False
        if self._to[lane.destination] >= limits.per_destination:
            return False
        limit = self._batch.groups[lane.group].limit if lane.group is not None else None
        return limit is None or self._groups[lane.group or ""] < limit

    def _pressure(self, lane: _Lane, chain: int) -> float:
        """How many moves one after the other are left at least behind the lane's first."""
        if self._batch.order != "balanced":
            return 0.0
        limits = self._batch.limits
        return max(
            float(chain),
            self._left_from[lane.source] / limits.per_source,
            self._left_to[lane.destination] / limits.per_destination,
        )


def _lane(move: Move) -> _Lane:
    return _Lane(move.source_host, move.destination_host, move.group)


def _chains(moves: Iterable[str], after: Mapping[str, list[str]]) -> dict[str, int]:
    """For each move, how many are in the longest chain that begins with it."""
    found: dict[str, int] = {}
    for start in moves:
        stack = [start]
        while stack:
            name = stack[-1]
            missing = [each for each in after[name] if each not in found]
            if missing:
                stack.extend(missing)
                continue
            stack.pop()
            found[name] = 1 + max((found[each] for each in after[name]), default=0)
    return found
