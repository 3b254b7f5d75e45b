"""The cut-over as the source drives it: the order of steps by which exactly one copy lives.

The states and why they suffice: `states`. Each is journaled before its step is taken.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from phaul_runtime.cutover.freezer import FACT as HOLD
from phaul_runtime.cutover.freezer import Freezer
from phaul_runtime.cutover.journal import RUNS, Journal
from phaul_runtime.cutover.states import State
from phaul_runtime.engine.interface import Handover
from phaul_runtime.errors import MigrationFailed, OutcomeUnknown, PhaulError
from phaul_runtime.events import (
    Committed,
    Frozen,
    Listener,
    Prepared,
    SourceDead,
    Warned,
    guarded,
)
from phaul_runtime.library.api import Outcome
from phaul_runtime.memory.pagemap import processes
from phaul_runtime.system.cancel import Cancellation

# CRIU has said that it killed the tree; the kernel may take a moment to reap it.
DEAD_WITHIN_S = 10.0
_POLL_S = 0.002
# CRIU's list of files without a name; it may have given some a new one (link-remap).
REMAPPED = "remap-fpath.img"
RECOVER = "phaul-runtime recover {} finishes it or undoes it"


@dataclass(frozen=True)
class Running:
    """The destination's answer to commit."""

    pid: int
    since_resume_ms: float
    resume_ms: float


@dataclass(frozen=True)
class Held:
    """The destination's answer to prepare."""

    pid: int
    restore_ms: float
    images_ms: float
    full_because: str = ""


class Destination(Protocol):
    """What the cut-over asks of the other side."""

    def sync_files(self) -> tuple[int, int]:
        """Send what changed in the target's files and trees; returns files and bytes sent.

        May be repeated; the sums are of all that was sent.
        """

    def stop_files(self) -> None:
        """End a `sync_files` of another thread, soon."""

    def prepare(self, images_dir: Path) -> tuple[Held, int]:
        """Send the images, restore, hold; returns the answer and the bytes sent."""

    def commit(self) -> Running:
        """Let the held copy run; idempotent, repeats itself while the channel allows."""


@dataclass
class CutOver(Handover):
    """One cut-over, as seen from the source.

    `before_freeze` is called just before it, `in_freeze` in it, once the memory is dumped; neither
    is repeated, and the latter must not raise. `processes` makes it a post-copy move: it says the
    pids of the frozen tree, which is held instead of killed, and `serve` begins to serve its pages,
    before the destination restores; what it returns is called before the source is given up, and
    raises if the pages cannot be served. `when_frozen`, where there is any, is called once
    the target stands still, beside the dump if that is known by then, and before the last files
    are carried; if it raises, the source runs on.
    """

    destination: Destination
    listener: Listener
    cancellation: Cancellation
    journal: Journal
    before_freeze: Callable[[], None] = lambda: None
    in_freeze: Callable[[], None] = lambda: None
    when_frozen: Callable[[], None] | None = None
    processes: Callable[[], Sequence[int]] | None = None
    serve: Callable[[Freezer, Path], Callable[[], object] | None] = lambda _hold, _images_dir: None
    freeze: dict[str, float] = field(default_factory=dict)
    bytes_sent: int = 0
    files_sent: int = 0
    full_because: str = ""
    downtime_ms: float | None = None
    hold: Freezer | None = None
    _frozen_at: float = 0.0
    _early: Future[tuple[int, int]] | None = None

    def __post_init__(self) -> None:
        self.listener = guarded(self.listener)

    @property
    def committing(self) -> bool:
        """The source's copy was given up: it lives only if CRIU did not hear of it."""
        return self.journal.state is State.COMMITTING

    @property
    def post_copy(self) -> bool:
        return self.processes is not None

    @property
    def held(self) -> bool:
        return self.hold is not None

    def frozen_for_ms(self) -> float:
        """How long nothing has run, if nothing does yet."""
        return (time.monotonic() - self._frozen_at) * 1000

    def freezing(self, identity: Mapping[str, Any]) -> None:
        """The final dump begins; the clock of the downtime starts."""
        self.cancellation.check()
        self.before_freeze()
        self.journal.enter(State.FROZEN, identity=dict(identity))
        self._frozen_at = time.monotonic()
        self.listener(Frozen())

    def stopped(self) -> None:
        """Beside the dump; see `engine.Handover`."""
        early: Future[tuple[int, int]] = Future()

        def sync() -> None:
            try:
                self._hook()
                early.set_result(self.destination.sync_files())
            except Exception as error:  # noqa: BLE001 - raised where it is waited for
                early.set_exception(error)

        threading.Thread(target=sync, name="last files", daemon=True).start()
        self._early = early

    def _hook(self) -> None:
        if self.when_frozen is None:
            return
        begun = time.monotonic()
        self.when_frozen()
        self.freeze["hooks_ms"] = (time.monotonic() - begun) * 1000

    def _sync_files(self, images_dir: Path) -> tuple[int, int]:
        """The last of the target's files; returns their number, and the bytes sent."""
        early, self._early = self._early, None
        if early is None:
            self._hook()
            return self.destination.sync_files()
        files, sent = early.result()
        if not (images_dir / REMAPPED).exists():
            return files, sent
        return self.destination.sync_files()

    def end(self) -> None:
        """The dump has failed: nothing is left that works on the target's files; idempotent."""
        early, self._early = self._early, None
        if early is not None:
            self.destination.stop_files()
            early.exception()

    def prepare(self, images_dir: Path, identity: Mapping[str, Any] | None = None) -> int:
        """Inside post-dump; see `engine.Handover`."""
        dumped = time.monotonic()
        self.freeze["dump_ms"] = (dumped - self._frozen_at) * 1000
        self.in_freeze()
        self.files_sent, sent = self._sync_files(images_dir)
        synced = time.monotonic()
        hold, is_served = None, None
        if self.processes is not None:
            hold = Freezer.plan(f"{self.journal.id}-held", self.processes())
            hold.require(processes(images_dir))
            is_served = self.serve(hold, images_dir)
        held, images_bytes = self.destination.prepare(images_dir)
        self.bytes_sent += sent + images_bytes
        self.freeze["files_ms"] = (synced - dumped) * 1000
        self.freeze["images_ms"] = held.images_ms
        self.freeze["restore_ms"] = held.restore_ms
        self.full_because = held.full_because
        prepared = time.monotonic()
        self.freeze["prepare_ms"] = (prepared - synced) * 1000
        self._prepared_at = prepared
        # On the disk with COMMITTING: until then this host's end is the end of its copy.
        facts = {} if identity is None else {"identity": dict(identity)}
        self.journal.pass_through(State.PREPARED, pid=held.pid, **facts)
        self.listener(Prepared(held.pid))
        if is_served is not None:
            is_served()
        # The last moment at which a request to cancel counts; after it the source will die.
        self.cancellation.seal()
        if hold is None:
            self.journal.enter(State.COMMITTING)
            return held.pid
        self.journal.enter(State.COMMITTING, **{HOLD: hold.facts(), "final_dir": str(images_dir)})
        # Not before: should this process end, CRIU has to find nothing that keeps the tree.
        hold.take()
        self.hold = hold
        return held.pid

    def commit(self, source_is_dead: Callable[[], bool], frozen_at: float | None = None) -> Outcome:
        """After CRIU has killed the source's copy; see `engine.Handover`."""
        if not self.committing:
            raise MigrationFailed("commit came before the destination was prepared")
        if frozen_at is not None and frozen_at > self._frozen_at:
            # CRIU looks around for a moment before it freezes: that is no downtime.
            self.freeze["dump_ms"] -= (frozen_at - self._frozen_at) * 1000
            self._frozen_at = frozen_at
        if self.processes is not None:
            source_is_dead = self._is_held
        deadline = time.monotonic() + DEAD_WITHIN_S
        while not source_is_dead():
            if time.monotonic() > deadline:
                raise OutcomeUnknown(
                    "CRIU says that it killed the source's copy, but its processes still exist; "
                    "the destination was not told to run",
                    hint=RECOVER.format(self.journal.id),
                )
            time.sleep(_POLL_S)
        killed = time.monotonic()
        self.freeze["kill_ms"] = (killed - self._prepared_at) * 1000
        try:
            running = self.destination.commit()
        except PhaulError as error:
            raise OutcomeUnknown(
                f"the source's copy is {'dead' if self.hold is None else 'frozen'} and the "
                f"destination did not confirm: {error.message}",
                host=error.host,
                log=error.log,
                hint=RECOVER.format(self.journal.id),
            ) from error
        ran_at = time.monotonic() - running.since_resume_ms / 1000
        self.freeze["commit_ms"] = max(0.0, ran_at - killed) * 1000
        self.freeze["resume_ms"] = running.resume_ms
        self.downtime_ms = (ran_at - self._frozen_at) * 1000
        self._note_running(running.pid)
        if self.hold is None:
            self.listener(SourceDead())
        self.listener(Committed(running.pid, self.downtime_ms))
        return Outcome(
            restored_pid=running.pid,
            downtime_ms=self.downtime_ms,
            freeze=self.freeze,
            extra_bytes=self.bytes_sent,
        )

    def _note_running(self, pid: int) -> None:
        """The destination runs it. Done is the source only once it is cleaned and hooks were told:
        `finished`.
        """
        facts = {"pid": pid, "downtime_ms": round(self.downtime_ms or 0.0, 3)}
        try:
            if self.hold is None:
                self.journal.note(**{RUNS: True}, **facts)
            else:
                self.journal.enter(State.POST_COPY, **facts)
        except MigrationFailed as error:
            # It runs, and its own journal says so: only this host's history suffers.
            self.listener(Warned(error.message))

    def finished(self) -> None:
        """The source is cleaned, its hooks were told: nothing is left to do."""
        try:
            self.journal.enter(State.DONE)
        except MigrationFailed as error:
            text = f"{error.message}; phaul-runtime recover {self.journal.id} completes the record"
            self.listener(Warned(text))

    def _is_held(self) -> bool:
        return self.hold is not None and self.hold.frozen()

    _prepared_at: float = 0.0
