"""The cut-over: the order of steps by which exactly one copy lives.

::

    source (CRIU's DUMP)                          destination (CRIU's RESTORE)
    ─────────────────────                         ────────────────────────────
    freeze, final dump
    post-dump: blocked ──── files, images ──────▶ restore
                                                  post-restore: blocked, nothing runs yet
               ◀─────────────── prepared ────────
    answers true: CRIU kills the tree
    sees its copy dead ─────── commit ──────────▶ answers true: the tree runs
               ◀─────────────── running ─────────

Whatever fails before the source answers true: it answers false, its tree runs again, the
destination discards. After that the source never runs again, and the destination runs only on
*commit*: a lost commit leaves no running copy, and never two.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Protocol

from phaul_runtime.cancel import Cancellation
from phaul_runtime.errors import MigrationFailed, OutcomeUnknown, PhaulError
from phaul_runtime.events import Committed, Frozen, Listener, Prepared

# CRIU has said that it killed the tree; the kernel may take a moment to reap it.
DEAD_WITHIN_S = 10.0
_POLL_S = 0.002


class State(Enum):
    """Where the cut-over stands; see the picture above."""

    ITERATING = "iterating"
    FROZEN = "frozen"
    PREPARED = "prepared"
    COMMITTING = "committing"
    DONE = "done"


_NEXT = {
    State.ITERATING: State.FROZEN,
    State.FROZEN: State.PREPARED,
    State.PREPARED: State.COMMITTING,
    State.COMMITTING: State.DONE,
}


@dataclass(frozen=True)
class Running:
    """The destination's answer to commit."""

    pid: int
    since_resume_ms: float


@dataclass(frozen=True)
class Held:
    """The destination's answer to prepare."""

    pid: int
    restore_ms: float
    images_ms: float


class Destination(Protocol):
    """What the cut-over asks of the other side."""

    def sync_files(self) -> tuple[int, int]:
        """Send what changed in the target's files; returns files and bytes sent."""

    def prepare(self, images_dir: Path) -> tuple[Held, int]:
        """Send the images, restore, hold; returns the answer and the bytes sent."""

    def commit(self) -> Running:
        """Let the held copy run; idempotent, repeats itself while the channel allows."""


@dataclass
class CutOver:
    """One cut-over, as seen from the source."""

    destination: Destination
    listener: Listener
    cancellation: Cancellation
    state: State = State.ITERATING
    freeze: dict[str, float] = field(default_factory=dict)
    bytes_sent: int = 0
    files_sent: int = 0
    downtime_ms: float | None = None
    pid: int | None = None
    _frozen_at: float = 0.0

    def _enter(self, state: State) -> None:
        if _NEXT.get(self.state) is not state:
            raise MigrationFailed(f"cut-over cannot go from {self.state.value} to {state.value}")
        self.state = state

    def freezing(self) -> None:
        """The final dump begins; the clock of the downtime starts."""
        self.cancellation.check()
        self._enter(State.FROZEN)
        self._frozen_at = time.monotonic()
        self.listener(Frozen())

    def prepare(self, images_dir: Path) -> int:
        """Inside post-dump; see `engine.Handover`."""
        dumped = time.monotonic()
        self.freeze["dump_ms"] = (dumped - self._frozen_at) * 1000
        self.files_sent, sent = self.destination.sync_files()
        synced = time.monotonic()
        held, images_bytes = self.destination.prepare(images_dir)
        self.bytes_sent += sent + images_bytes
        self.freeze["files_ms"] = (synced - dumped) * 1000
        self.freeze["images_ms"] = held.images_ms
        self.freeze["restore_ms"] = held.restore_ms
        prepared = time.monotonic()
        self.freeze["prepare_ms"] = (prepared - synced) * 1000
        self._prepared_at = prepared
        self._enter(State.PREPARED)
        self.pid = held.pid
        self.listener(Prepared(held.pid))
        # The last moment at which a request to cancel counts; after it the source will die.
        self.cancellation.seal()
        return held.pid

    def commit(self, source_is_dead: Callable[[], bool], frozen_at: float | None = None) -> None:
        """After CRIU has killed the source's copy; see `engine.Handover`."""
        self._enter(State.COMMITTING)
        if frozen_at is not None and frozen_at > self._frozen_at:
            # CRIU looks around for a moment before it freezes: that is no downtime.
            self.freeze["dump_ms"] -= (frozen_at - self._frozen_at) * 1000
            self._frozen_at = frozen_at
        deadline = time.monotonic() + DEAD_WITHIN_S
        while not source_is_dead():
            if time.monotonic() > deadline:
                raise OutcomeUnknown(
                    "CRIU says that it killed the source's copy, but its processes still exist; "
                    "the destination was not told to run",
                    hint="look at both hosts: the destination holds a rebuilt copy that never ran",
                )
            time.sleep(_POLL_S)
        killed = time.monotonic()
        self.freeze["kill_ms"] = (killed - self._prepared_at) * 1000
        try:
            running = self.destination.commit()
        except PhaulError as error:
            raise OutcomeUnknown(
                f"the source's copy is dead and the destination did not confirm: {error.message}",
                host=error.host,
                log=error.log,
                hint="look at the destination for the process; if it does not run there, its "
                "images are kept in the working directory of this migration",
            ) from error
        ran_at = time.monotonic() - running.since_resume_ms / 1000
        self.freeze["commit_ms"] = max(0.0, ran_at - killed) * 1000
        self.downtime_ms = (ran_at - self._frozen_at) * 1000
        self.pid = running.pid
        self._enter(State.DONE)
        self.listener(Committed(running.pid, self.downtime_ms))

    _prepared_at: float = 0.0
