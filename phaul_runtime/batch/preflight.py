"""The plan of a batch with the preflight of every move; nothing is moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from phaul_runtime.batch.model import Batch, Move, predecessors
from phaul_runtime.batch.outcome import Answer
from phaul_runtime.batch.plan import MoveState, Planner
from phaul_runtime.system.cancel import Cancellation

_TIMEOUT_S = 300.0

Check = Callable[[Move, Callable[[dict[str, Any]], None], Cancellation, float], Answer]


@dataclass(frozen=True)
class Planned:
    """One move of the plan.

    Attributes:
        move: its name.
        wave: 1 for those that start first; as if all moves took the same time.
        after: what it waits for.
        ok: nothing refuses it now.
        depends: it follows others, which may make true what is refused now.
        problem: what refuses it.
        warnings: of its checks.
    """

    move: str
    wave: int
    engine: str
    target: str
    source: str
    to: str
    after: list[str]
    ok: bool
    depends: bool
    problem: str
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)


def waves(batch: Batch) -> list[list[Move]]:
    """The moves in the order in which they would start, if all took the same time."""
    planner = Planner(batch)
    found = []
    while now := list(planner.start()):
        found.append(now)
        for move in now:
            planner.ended(move.name, MoveState.MOVED)
    return found


def plan(batch: Batch, check: Check, cancel: Cancellation) -> Iterator[Planned]:
    """The plan, move by move in its order; each wave is checked at once."""
    before = predecessors(batch)
    with ThreadPoolExecutor(batch.limits.total) as pool:
        for number, wave in enumerate(waves(batch), 1):
            for move, (answer, warnings) in zip(
                wave, pool.map(lambda each: _checked(each, check, cancel), wave), strict=True
            ):
                report = answer.report or {}
                ok = answer.code == 0
                yield Planned(
                    move.name,
                    number,
                    move.engine,
                    move.target,
                    move.from_,
                    move.to,
                    sorted(before[move.name]),
                    ok,
                    bool(before[move.name]),
                    "" if ok else report.get("error") or answer.said or "no answer",
                    warnings,
                )


def _checked(move: Move, check: Check, cancel: Cancellation) -> tuple[Answer, list[str]]:
    warnings = []

    def told(event: dict[str, Any]) -> None:
        if event.get("event") == "checked" and event.get("level") == "warning":
            warnings.append(f"{event.get('host')}: {event.get('check')}: {event.get('text')}")

    return check(move, told, cancel, _TIMEOUT_S), warnings
