"""Views of events: a progress display, plain lines, JSON lines; and the report."""

from __future__ import annotations

import contextlib
import json
import queue
import sys
import threading
import time
from types import TracebackType
from typing import Any

from phaul_runtime import events as ev
from phaul_runtime.cli.outlet import echo
from phaul_runtime.printable import one_line
from phaul_runtime.report import MigrationReport

_MIB = 1 << 20
# Of events that wait to be shown: progress beyond that is left out.
_MOST_WAITING = 1000
_MARKS = {"ok": "ok", "warning": "warn", "refused": "NO", "ignored": "skip"}


class View:
    """Listens to events and shows the report; a context manager around the migration."""

    def __enter__(self) -> View:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the terminal as it was."""

    def __call__(self, event: ev.Event) -> None:
        """Show an event."""
        raise NotImplementedError

    def report(self, report: MigrationReport) -> None:
        """Show the report."""
        raise NotImplementedError


class JsonView(View):
    """One JSON object a line; the report is the last."""

    def __call__(self, event: ev.Event) -> None:
        """Print an event."""
        echo(json.dumps({"time": round(time.time(), 3), **event.to_json()}))

    def report(self, report: MigrationReport) -> None:
        """Print the report."""
        echo(json.dumps(report.to_json()))


class PlainView(View):
    """A line for what matters, for pipes and logs."""

    # Post-copy may take long: a line for each of these parts.
    _parts = 10

    def __init__(self) -> None:
        self._served = -1

    def __call__(self, event: ev.Event) -> None:
        """Print an event, unless it is mere progress."""
        line = describe(event)
        if line and not (isinstance(event, ev.Serving) and not self._further(event)):
            self.line(line)

    def _further(self, event: ev.Serving) -> bool:
        """Whether another part of the pages is over since the last line."""
        part = self._parts * (event.pages - event.missing) // max(event.pages, 1)
        further = part > self._served
        self._served = max(part, self._served)
        return further

    def line(self, text: str) -> None:
        """Print one line."""
        echo(text)

    def report(self, report: MigrationReport) -> None:
        """Print the report as a table of two columns."""
        for name, value in report_rows(report):
            self.line(f"  {name:<14} {value}")


class TerminalView(PlainView):
    """Plain lines above, the current iteration's progress in the last line."""

    _parts = 0  # the progress has them: one line

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console  # noqa: PLC0415 - not needed in a pipe
        from rich.progress import (  # noqa: PLC0415
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TransferSpeedColumn,
        )

        self._console = Console(highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(pulse_style="blue"),
            DownloadColumn(True),
            TransferSpeedColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._task: Any = None
        self._expected: float | None = None
        self._frozen = False
        self._dumping = False
        self._first = ""
        self._sent: dict[str, int] = {}

    def __enter__(self) -> View:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def __call__(self, event: ev.Event) -> None:
        """Show an event."""
        super().__call__(event)
        if isinstance(event, (ev.Staging, ev.TreeProgress, ev.TreeSynced)):
            if not self._frozen:
                self._dumping = False
                self._tree(event)
        elif isinstance(event, ev.IterationStarted):
            self._dumping = True
            self._show(f"pre-dump {event.number}")
        elif isinstance(event, ev.IterationDone):
            self._expected = event.expected_freeze_ms
        elif isinstance(event, ev.Progress) and self._dumping and self._task is not None:
            text = f"pre-dump {event.number}: {event.bytes // 4096} pages"
            if self._expected is not None:
                text += f", expected freeze {self._expected:.0f} ms"
            self._progress.update(self._task, completed=event.bytes, description=text)
        elif isinstance(event, ev.Frozen):
            self._frozen, self._dumping = True, False
            self._show("frozen: final dump, restore")
        elif isinstance(event, ev.Filling):
            self._filling(event)
        elif isinstance(event, ev.Serving):
            self._filling(event, "runs there; memory from the source, whose copy is frozen")
        elif isinstance(event, ev.Reconnecting) and self._task is not None:
            self._progress.update(self._task, description="page channel broken, opened anew")
        elif isinstance(event, (ev.Committed, ev.RolledBack, ev.Filled, ev.Served)):
            self._hide()

    def _filling(self, event: ev.Filling | ev.Serving, text: str = "runs there; memory") -> None:
        if self._task is None:
            self._show(text)
        done = (event.pages - event.missing) * 4096
        total = event.pages * 4096
        self._progress.update(self._task, completed=done, total=total, description=text)

    def _tree(self, event: ev.Staging | ev.TreeProgress | ev.TreeSynced) -> None:
        """Trees go side by side: what all of them have sent, in one line."""
        if isinstance(event, ev.Staging):
            self._first = event.tree
            self._show(f"preparing {event.tree}")
        elif isinstance(event, ev.TreeProgress):
            if not self._sent:
                self._show("")
            self._sent[event.tree] = event.bytes
            text = one_line(f"tree {', '.join(sorted(self._sent))}")
            self._progress.update(self._task, completed=sum(self._sent.values()), description=text)
        else:
            self._sent.clear()
            if event.tree == self._first:
                self._first = ""
                self._show(f"{event.tree} is there, being taken in")
            else:
                self._hide()

    def _hide(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None

    def _show(self, text: str) -> None:
        self._hide()
        self._task = self._progress.add_task(one_line(text), total=None)

    def line(self, text: str) -> None:
        """Print one line above the progress."""
        self._console.print(one_line(text), markup=False, soft_wrap=True)


def make_view(output: str) -> View:
    """The view for `--output` and for what stdout is."""
    if output == "json":
        return JsonView()
    terminal = sys.stdout is not None and sys.stdout.isatty()
    return TerminalView() if terminal else PlainView()


def move_view(output: str) -> Aside:
    """The same for a move, which must not wait for it."""
    return Aside(make_view(output))


class Aside(View):
    """Shows events in a thread: a terminal that is stopped, or a full pipe, holds up no move.

    `__exit__` does not wait until everything is shown, `report` and `flush` do.

    Args:
        view: that shows them.
    """

    def __init__(self, view: View) -> None:
        self._view = view
        self._events: queue.SimpleQueue[ev.Event | threading.Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._show_all, name="view", daemon=True)

    def __enter__(self) -> Aside:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._events.put(None)

    def __call__(self, event: ev.Event) -> None:
        """Have an event shown soon."""
        if not isinstance(event, ev.MERE_PROGRESS) or self._events.qsize() < _MOST_WAITING:
            self._events.put(event)

    def _show_all(self) -> None:
        show = ev.guarded(self._view)
        with contextlib.suppress(OSError), self._view:
            while (event := self._events.get()) is not None:
                if isinstance(event, threading.Event):
                    event.set()
                else:
                    show(event)

    def flush(self) -> None:
        """Wait until all that came so far is shown; within the context only."""
        shown = threading.Event()
        self._events.put(shown)
        shown.wait()

    def report(self, report: MigrationReport) -> None:
        """Show what is not shown yet, then the report."""
        self._thread.join()
        with contextlib.suppress(OSError):
            self._view.report(report)


def describe(event: ev.Event) -> str:
    """An event as one line; empty for mere progress."""
    match event:
        case ev.MigrationStarted():
            return f"{event.id}: moving {event.engine} {event.target} to {event.to}"
        case ev.Checked():
            hint = f" ({event.hint})" if event.hint and event.level != "ok" else ""
            return f"  {_MARKS[event.level]:<4} {event.host}: {event.check}: {event.text}{hint}"
        case ev.FilesCopied():
            return f"files: {event.files} carried, {mib(event.bytes)}"
        case ev.Staging() | ev.TreeSynced():
            return _tree(event)
        case ev.PreCopySkipped():
            return f"no pre-copy: {event.reason}"
        case ev.IterationDone():
            return _iteration(event)
        case ev.Frozen():
            return "frozen: final dump"
        case ev.Prepared():
            return f"prepared: rebuilt there as pid {event.pid}, held"
        case ev.Serving() | ev.Reconnecting() | ev.Served():
            return _post_copy(event)
        case ev.Committed():
            return f"moved: runs there as pid {event.pid}, downtime {event.downtime_ms:.0f} ms"
        case ev.Filled() | ev.RolledBack() | ev.OutcomeRecorded() | ev.Recovering():
            return _last(event)
        case ev.Warned():
            return f"warning: {event.text}"
    return ""


def _last(event: ev.Filled | ev.RolledBack | ev.OutcomeRecorded | ev.Recovering) -> str:
    if isinstance(event, ev.Recovering):
        return f"outcome unknown, recovering: {event.reason}"
    if isinstance(event, ev.OutcomeRecorded):
        return f"{event.id} was asked for before: {event.result}"
    if isinstance(event, ev.Filled):
        return f"memory complete {event.ms / 1000:.1f} s later: {event.pages} pages were filled in"
    state = "clean" if event.destination_clean else "did not confirm that it is clean"
    return f"rolled back: the source runs on, the destination is {state}"


def _post_copy(event: ev.Serving | ev.Reconnecting | ev.Served) -> str:
    if isinstance(event, ev.Reconnecting):
        return f"page channel broken, opened anew; the copy waits for its pages: {event.reason}"
    if isinstance(event, ev.Serving):
        return (
            f"post-copy: {event.missing} of {event.pages} pages are still here; the source's copy "
            "stays frozen and serves them"
        )
    return (
        f"post-copy: the last of {event.pages} pages is over after {event.seconds:.1f} s, "
        f"{_waits(event.faults, event.worst_fault_ms)}; the source's frozen copy is killed"
    )


def _waits(faults: float, worst_ms: float) -> str:
    return f"{faults:.0f} faults, the longest {worst_ms:.0f} ms"


def _tree(event: ev.Staging | ev.TreeSynced) -> str:
    if isinstance(event, ev.Staging):
        return f"preparing {event.tree}"
    when = "in the freeze, " if event.final else ""
    return (
        f"tree {event.tree}: {event.files} files, {mib(event.bytes)} {when}"
        f"in {event.duration_ms / 1000:.1f} s"
    )


def _iteration(event: ev.IterationDone) -> str:
    rate = event.bytes / _MIB / (event.duration_ms / 1000) if event.duration_ms else 0.0
    expected = (
        ""
        if event.expected_freeze_ms is None
        else f", expected freeze {event.expected_freeze_ms:.0f} ms"
    )
    return (
        f"pre-dump {event.number}: {event.pages_written} pages written, {event.pages_skipped} "
        f"skipped, {mib(event.bytes)} in {event.duration_ms / 1000:.1f} s "
        f"({rate:.1f} MiB/s){expected}: {event.reason}"
    )


def _transferred(report: MigrationReport) -> str:
    text = mib(report.bytes_transferred)
    return text if report.link_bytes is None else f"{text}, {mib(report.link_bytes)} on the link"


def _estimate(report: MigrationReport) -> list[tuple[str, str]]:
    """What was expected beside what was measured."""
    rows = []
    if report.expected_freeze_ms is not None and "dump_ms" in report.freeze:
        met = "" if report.converged else ", over the budget"
        text = f"{report.expected_freeze_ms:.0f} ms for the dump{met}"
        rows.append(("expected", f"{text}; it took {report.freeze['dump_ms']:.0f} ms"))
    if report.throttled_to is not None:
        rows.append(("throttled", f"to {report.throttled_to:.0%} of a CPU, undone in the freeze"))
    return rows


def _post_copied(report: MigrationReport) -> list[tuple[str, str]]:
    """What came once the copy ran; nothing of a pre-copy."""
    if report.mode == "pre-copy":
        return []
    told = report.post_copy
    if not told:
        return [(report.mode, "how much came once the copy ran is not known")]
    text = f"{told.get('pages', 0):.0f} pages within {told.get('seconds', 0.0):.1f} s"
    waits = _waits(told.get("faults", 0), told.get("worst_fault_ms", 0.0))
    return [(report.mode, f"{text}, {waits}")]


def mib(count: int) -> str:
    """Bytes for people."""
    return f"{count / _MIB:.1f} MiB"


def report_rows(report: MigrationReport) -> list[tuple[str, str]]:
    """The report as names and values."""
    rows = [("result", report.result), ("id", report.id)]
    if report.result == "moved":
        pages = sum(i.pages_written for i in report.iterations)
        rows += [
            ("route", f"{report.source} > {report.destination}"),
            ("restored pid", str(report.restored_pid)),
            (
                "downtime",
                f"{report.downtime_ms:.0f} ms" if report.downtime_ms is not None else "not known",
            ),
            *_estimate(report),
            ("total", f"{report.total_ms / 1000:.1f} s"),
            ("transferred", _transferred(report)),
            ("pre-copy", f"{len(report.iterations)} rounds, {pages} pages ({report.pre_copy})"),
            (
                "final dump",
                f"{report.final_pages_written} pages written, {report.final_pages_skipped} skipped",
            ),
            (
                "freeze",
                ", ".join(
                    f"{name.removesuffix('_ms')} {value:.0f} ms"
                    for name, value in report.freeze.items()
                ),
            ),
        ]
        if report.lazy_complete_ms is None:
            rows.append(("restore", report.restore))
        else:
            rows.append(
                (
                    "restore",
                    f"lazy, {report.lazy['pages']} pages within {report.lazy_complete_ms:.0f} ms, "
                    f"{_waits(report.lazy['faults'], report.lazy['worst_fault_ms'])}",
                )
            )
        rows += _post_copied(report)
        if report.files_copied:
            rows.append(("files", f"{report.files_copied} carried"))
    if report.logs:
        rows.append(("logs", report.logs))
    return rows
