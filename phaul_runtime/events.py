"""What happens during a migration, told as it happens.

Progress bars, log lines, JSON lines and the report are views of these events; the library itself
prints nothing. A listener is any callable that takes an event. It is called from several threads,
and should return at once; `guarded` keeps what it raises from the move.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """Base of all events."""

    @property
    def name(self) -> str:
        """The event's name in JSON: the class's name in snake case."""
        text = type(self).__name__
        return "".join(f"_{c.lower()}" if c.isupper() else c for c in text).lstrip("_")

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary, `event` first."""
        return {"event": self.name, **asdict(self)}


@dataclass(frozen=True)
class MigrationStarted(Event):
    """The command is understood; nothing is touched yet."""

    id: str
    engine: str
    target: str
    to: str


@dataclass(frozen=True)
class Checked(Event):
    """One preflight finding; `level` is ok, warning, refused or ignored."""

    check: str
    level: str
    host: str
    text: str
    hint: str = ""


@dataclass(frozen=True)
class FilesCopied(Event):
    """Files of the target were staged at the destination."""

    files: int
    bytes: int
    final: bool


@dataclass(frozen=True)
class TreeSynced(Event):
    """A directory tree is at the destination as it was here; `final`: in the freeze."""

    tree: str
    files: int
    bytes: int
    duration_ms: float
    final: bool


@dataclass(frozen=True)
class Staging(Event):
    """A tree that goes before the others is being made, to be carried then."""

    tree: str


@dataclass(frozen=True)
class TreeProgress(Event):
    """How much of a tree has been sent so far, bytes; told only of what takes its time."""

    tree: str
    bytes: int


@dataclass(frozen=True)
class IterationStarted(Event):
    """A pre-dump round begins."""

    number: int


@dataclass(frozen=True)
class Progress(Event):
    """How much of the current iteration has arrived at the destination, bytes."""

    number: int
    bytes: int


@dataclass(frozen=True)
class IterationDone(Event):
    """A pre-dump round is over; the estimate is the freeze if it were taken now."""

    number: int
    pages_written: int
    pages_skipped: int
    bytes: int
    duration_ms: float
    expected_freeze_ms: float | None
    go_on: bool
    reason: str


@dataclass(frozen=True)
class PreCopySkipped(Event):
    """There is no pre-copy; the whole memory is dumped in the freeze."""

    reason: str


@dataclass(frozen=True)
class Frozen(Event):
    """The final dump begins: the source's copy stops."""


@dataclass(frozen=True)
class Prepared(Event):
    """The destination has rebuilt the tree and holds it."""

    pid: int


@dataclass(frozen=True)
class SourceDead(Event):
    """CRIU has killed the source's copy; commit is on its way."""


@dataclass(frozen=True)
class Committed(Event):
    """The source's copy is dead and the destination's runs."""

    pid: int
    downtime_ms: float


@dataclass(frozen=True)
class Filling(Event):
    """The destination's copy runs, and `missing` of its `pages` lazy pages are not in yet."""

    pages: int
    missing: int


@dataclass(frozen=True)
class Filled(Event):
    """The last page of a lazy restore is in, `ms` after the copy ran."""

    pages: int
    faults: int
    ms: float


@dataclass(frozen=True)
class Serving(Event):
    """Post-copy: the destination's copy runs, `missing` of its `pages` are still at the source."""

    pages: int
    missing: int


@dataclass(frozen=True)
class Reconnecting(Event):
    """Post-copy: the page channel broke and is opened anew; the copy there waits for its pages."""

    reason: str


@dataclass(frozen=True)
class Served(Event):
    """Post-copy: the last page is over, `seconds` after the copy ran; the source's is killed now.

    `faults` pages were waited for, `worst_fault_ms` the longest.
    """

    pages: int
    faults: int
    worst_fault_ms: float
    seconds: float


@dataclass(frozen=True)
class RolledBack(Event):
    """The move failed: the source's copy runs, the destination was cleaned (or says why not)."""

    reason: str
    destination_clean: bool


@dataclass(frozen=True)
class Recovering(Event):
    """The outcome is unknown; it is found out and settled from both journals."""

    reason: str


@dataclass(frozen=True)
class OutcomeRecorded(Event):
    """An earlier command with this id has moved it, or not; nothing is done now."""

    id: str
    result: str


@dataclass(frozen=True)
class Warned(Event):
    """Something the user should know; the move goes on."""

    text: str


MERE_PROGRESS = (Progress, TreeProgress, Filling, Serving)
"""Events that come several times a second: each makes the one before it old."""

Listener = Callable[[Event], None]


def nobody(_event: Event) -> None:
    """The listener that ignores everything."""


class _Guarded:
    """See `guarded`."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._failed = False

    def __call__(self, event: Event) -> None:
        try:
            self._listener(event)
        except Exception:
            level = logging.DEBUG if self._failed else logging.ERROR
            self._failed = True
            log.log(level, "the listener failed at %s; the move goes on", event.name, exc_info=True)


def guarded(listener: Listener) -> Listener:
    """A listener whose failures are logged, the first of them as an error, and change nothing.

    What drives a move wraps the listener that it is given, once: telling must never stop or undo
    what is told.
    """
    return listener if listener is nobody or isinstance(listener, _Guarded) else _Guarded(listener)
