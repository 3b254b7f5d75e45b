"""Views of a batch: JSON lines, or a live table on a terminal."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

from phaul_runtime.batch.events import (
    BatchEnded,
    BatchStarted,
    MoveEnded,
    MoveRetried,
    MoveStarted,
    MoveTold,
    Pausing,
    Standing,
    TakenOver,
)
from phaul_runtime.batch.extra import require
from phaul_runtime.events import Event, Warned
from phaul_runtime.printable import one_line

_MARKS = {
    "moved": "green",
    "refused": "red",
    "failed": "red",
    "unknown": "bold red",
    "error": "red",
    "cancelled": "yellow",
    "skipped": "yellow",
}
_RECENT = 8
_PER_SECOND = 4
# Of a move's own events those that say where it stands; progress comes many times a second.
_QUIET = frozenset({"progress", "filling", "serving", "tree_progress", "checked"})

Echo = Callable[[str], None]


class BatchView:
    """Listens to a batch's events; a context manager around it. Called from several threads."""

    def __enter__(self) -> BatchView:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the terminal as it was."""

    def __call__(self, event: Event) -> None:
        """Show an event."""
        raise NotImplementedError


class JsonLines(BatchView):
    """One JSON object a line, progress left out.

    Args:
        echo: prints a line.
    """

    def __init__(self, echo: Echo) -> None:
        self._echo = echo
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        if isinstance(event, MoveTold) and event.told.get("event") in _QUIET:
            return
        line = json.dumps({"time": round(time.time(), 3), **event.to_json()})
        with self._lock:
            self._echo(line)


class LiveTable(BatchView):
    """What is under way, what has just ended, and how many are left."""

    def __init__(self) -> None:
        require("rich")
        from rich.console import Console  # noqa: PLC0415 - not needed in a pipe
        from rich.live import Live  # noqa: PLC0415

        self._lock = threading.Lock()
        self._moves = 0
        self._states: Counter[str] = Counter()
        self._running: dict[str, tuple[MoveStarted, float, str]] = {}
        self._recent: deque[MoveEnded] = deque(maxlen=_RECENT)
        self._began = time.monotonic()
        self._note = ""
        self._live = Live(
            console=Console(highlight=False),
            get_renderable=self.table,
            refresh_per_second=_PER_SECOND,
        )

    def __enter__(self) -> BatchView:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def __call__(self, event: Event) -> None:
        with self._lock:
            self._take(event)

    def _take(self, event: Event) -> None:
        match event:
            case BatchStarted():
                self._moves = event.moves
                self._states = Counter(event.ended.values())
            case MoveStarted():
                self._running[event.move] = (event, time.monotonic(), "")
            case MoveTold() if event.move in self._running:
                started, since, _ = self._running[event.move]
                self._running[event.move] = (started, since, stage(event.told))
            case MoveEnded():
                self._running.pop(event.move, None)
                self._states[event.state] += 1
                self._recent.append(event)
            case MoveRetried():
                self._note = f"{event.move}: {event.what}: {event.error}"
            case Pausing():
                self._note = event.why
            case TakenOver():
                self._note = f"{event.workflows} moves of {event.controller} taken over"
            case Warned():
                self._note = event.text
            case BatchEnded() | Standing():
                self._states = Counter(event.states)

    def table(self) -> Any:
        """What is shown now."""
        from rich.console import Group  # noqa: PLC0415
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        with self._lock:
            table = Table(box=None, pad_edge=False, header_style="bold")
            for name in ("move", "from", "to", "attempt", "s", "stage"):
                table.add_column(name, justify="right" if name in ("attempt", "s") else "left")
            for ended in self._recent:
                text = ended.state
                if ended.downtime_ms is not None:
                    text += f", downtime {ended.downtime_ms:.0f} ms"
                if ended.error:
                    text += f": {ended.error.splitlines()[0]}"
                table.add_row(
                    Text(ended.move), "", "", str(ended.attempts), "",
                    _cut(text, _MARKS.get(ended.state, "")),
                )  # fmt: skip
            for name, (started, since, where) in self._running.items():
                table.add_row(
                    Text(name), Text(started.source), Text(started.to), str(started.number),
                    f"{time.monotonic() - since:.0f}",
                    _cut(where),
                )  # fmt: skip
            return Group(table, Text(self._line(), style="bold"), _cut(self._note, "dim"))

    def _line(self) -> str:
        done = sum(self._states.values())
        states = ", ".join(f"{count} {name}" for name, count in sorted(self._states.items()))
        return (
            f"{done} of {self._moves}" + (f" ({states})" if states else "")
            + f", {len(self._running)} under way, {time.monotonic() - self._began:.0f} s"
        )  # fmt: skip


def _cut(text: str, style: str = "") -> Any:
    from rich.text import Text  # noqa: PLC0415

    return Text(one_line(text), style=style, overflow="ellipsis", no_wrap=True)


def stage(told: dict[str, Any]) -> str:
    """Where a move stands, from its last event."""
    name = str(told.get("event", ""))
    match name:
        case "iteration_started":
            return f"pre-dump {told.get('number')}"
        case "progress":
            return f"pre-dump {told.get('number')}: {int(told.get('bytes', 0)) >> 20} MiB"
        case "iteration_done":
            expected = told.get("expected_freeze_ms")
            text = f"pre-dump {told.get('number')} done"
            return text if expected is None else f"{text}, expected freeze {expected:.0f} ms"
        case "filling":
            return f"runs there, {told.get('missing')} pages to come"
        case "serving":
            return f"runs there, {told.get('missing')} pages still at the source"
        case "reconnecting":
            return "runs there, waits for its page channel"
        case "checked":
            return "checks"
    return name.replace("_", " ")
