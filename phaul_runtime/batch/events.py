"""What happens in a batch, told as it happens; the views of it are in `view`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from phaul_runtime.events import Event


@dataclass(frozen=True)
class BatchStarted(Event):
    """This controller takes part; `ended` has the states of those that were at their end before."""

    batch: str
    moves: int
    ended: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class MoveStarted(Event):
    """This controller asks for an attempt; `number` from 1, `asks` before this one."""

    move: str
    id: str
    number: int
    asks: int
    source: str
    to: str


@dataclass(frozen=True)
class MoveTold(Event):
    """An event of a move under way, as its source tells it."""

    move: str
    id: str
    told: dict[str, Any]


@dataclass(frozen=True)
class MoveRetried(Event):
    """An attempt has left the source's copy running, or its answer was lost: once more."""

    move: str
    id: str
    what: str
    error: str


@dataclass(frozen=True)
class MoveEnded(Event):
    """Nothing more is done about it."""

    move: str
    state: str
    id: str
    attempts: int
    downtime_ms: float | None
    error: str


@dataclass(frozen=True)
class Pausing(Event):
    """No other move is started; `why`."""

    why: str


@dataclass(frozen=True)
class TakenOver(Event):
    """Another controller is dead: its moves are asked for from here."""

    controller: str
    workflows: int


@dataclass(frozen=True)
class Standing(Event):
    """Where the batch stands at all of its controllers; `states` of the moves that have ended."""

    batch: str
    states: dict[str, int]


@dataclass(frozen=True)
class BatchEnded(Event):
    """Nothing is under way any more; `states` counts the moves in each state."""

    batch: str
    states: dict[str, int]
    exit_code: int
    duration_s: float
