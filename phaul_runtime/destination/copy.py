"""The copy of a migration at its destination: restored and held, let run, or rebuilt."""

from __future__ import annotations

import logging
import socket
import time
from enum import Enum
from pathlib import Path
from typing import Any

from phaul_runtime.criu.page_format import unknown_format
from phaul_runtime.criu.session import Criu
from phaul_runtime.cutover.journal import RUNS, Journal
from phaul_runtime.cutover.states import State
from phaul_runtime.destination.lazy_restore import PLACE, LazyRestore
from phaul_runtime.engine.interface import DestinationHalf
from phaul_runtime.errors import DestinationError, MigrationFailed, OutcomeUnknown, PhaulError
from phaul_runtime.hooks.lifecycle import POST_RESTORE, Hooks, move_of
from phaul_runtime.memory.image_dirs import (
    forget_resumed,
    new_directory,
    note_resumed,
    was_resumed,
)
from phaul_runtime.memory.preallocate import Preallocation
from phaul_runtime.postcopy.late import LatePages
from phaul_runtime.system.threads import attempt

log = logging.getLogger(__name__)

CANNOT_BE_LAZY = "this engine, as configured, cannot restore lazily"


class Life(Enum):
    """What a copy is doing.

    UNKNOWN: it was told to run, and the outcome was not recorded: an earlier agent died before, or
    it failed here.
    """

    NONE = "none"
    HELD = "held"
    RUNNING = "running"
    UNKNOWN = "unknown"


class Copy:
    """One migration's copy; its caller lets one step at a time in.

    Args:
        journal: of the destination's role.
        criu: a session factory.
        hooks: of this host.
        engine: the engine's half here.
        directory: of the migration's images.

    Attributes:
        life: what it is doing.
        pid: of its root; 0 before a restore.
        resumed_at: the `time.monotonic()` at which this object let it run; 0 if it did not.
        resume_ms: how long that took.
        lazy: its pager, and why it has none.
    """

    def __init__(
        self, journal: Journal, criu: Criu, hooks: Hooks, engine: DestinationHalf, directory: Path
    ) -> None:
        self._journal = journal
        self._criu = criu
        self._hooks = hooks
        self._engine = engine
        self._dir = directory
        self._late = LatePages()
        self.lazy = LazyRestore("full", directory, self._pager_name)
        self.pid = int(journal.facts.get("pid", 0))
        self.resumed_at = self.resume_ms = 0.0
        self.life = Life.NONE
        if journal.state in (State.POST_COPY, State.DONE):
            self.life = Life.RUNNING
        elif journal.state is State.COMMITTING:
            self.life = Life.UNKNOWN

    @property
    def _pager_name(self) -> str:
        return f"{self._journal.id}-pager"

    @property
    def may_run(self) -> bool:
        """Whether it was let run, as far as this host can tell: then nothing discards it."""
        return self.life is Life.RUNNING or may_run(self._journal)

    @property
    def post_copy(self) -> bool:
        """Pages of it stay at the source until it runs."""
        return bool(self._journal.facts.get("post_copy"))

    # -- its pager -------------------------------------------------------------------------

    def begin_lazy(self, room: Preallocation | None) -> None:
        """Start its pager, if the migration asks for one and there can be one.

        Args:
            room: for the pages that come once it runs.

        Raises:
            DestinationError: it has to be lazy and cannot.
        """
        asked = str(self._journal.facts["restore"])
        self.lazy = LazyRestore(asked, self._dir, self._pager_name, self._why_not_lazy, room=room)
        if asked == "lazy" and not self._engine.can_be_lazy:
            raise DestinationError(CANNOT_BE_LAZY, hint="--restore auto")
        self.lazy.begin()

    def _why_not_lazy(self) -> str:
        """Why this host or engine cannot restore lazily."""
        if not self._engine.can_be_lazy:
            return CANNOT_BE_LAZY
        if not self._criu.feature_check().lazy_pages:
            return "this kernel has no userfaultfd for CRIU"
        version = self._criu.known_version or self._criu.version()
        if version.page_format is None:
            return unknown_format(version)
        return ""

    def resume_pager(self) -> None:
        """Take up the pager of the copy that runs.

        Raises:
            DestinationError: it is gone.
        """
        self.lazy = self._pager_at(str(self._journal.facts.get("pager", PLACE)))
        self.lazy.resume()

    def _pager_at(self, place: str) -> LazyRestore:
        return LazyRestore("lazy", self._dir, self._pager_name, place=place)

    @property
    def missing(self) -> int | None:
        """Pages that are still at the source; None in a move that leaves none there."""
        if not self.post_copy:
            return None
        return self.lazy.store.missing_pages if self.lazy.store else 0

    @property
    def whole(self) -> bool:
        """No page of it is still at the source: it depends on this host alone."""
        return self.lazy.store is None or self.lazy.store.complete

    def serve_pages(self, channel: socket.socket) -> bool:
        """Take pages from a connection to the source until it ends; whether all are here."""
        return self._late.serve(channel, lambda: (self.lazy.store, self.lazy.place))

    def stop_pages(self) -> None:
        """End the connection to the source, if there is one; idempotent."""
        self._late.stop()

    def close(self) -> None:
        """Take no more pages; it goes on as it is."""
        self._late.close()
        if self.lazy.store is not None:
            self.lazy.store.close()

    # -- restore ---------------------------------------------------------------------------

    def restore(self, images_dir: Path, *, lazy: bool = False) -> None:
        """Restore it from its images, and hold it.

        Raises:
            PhaulError: nothing of it is left.
        """
        forget_resumed(images_dir)
        if lazy:
            self.pid = self._engine.restore(self._criu, images_dir, lazy=True)
            if not self._lazy_handed():
                self._engine.discard()
                self.lazy.stop()
                lazy = False
        if not lazy:
            self.pid = self._engine.restore(self._criu, images_dir)
        try:
            self._hooks.run(POST_RESTORE, move_of(self._journal), self.pid)
        except PhaulError:
            self._engine.discard()
            raise
        self.life = Life.HELD

    def _lazy_handed(self) -> bool:
        try:
            return self.lazy.handed(self.pid)
        except PhaulError:
            self._engine.discard()
            raise

    # -- resume ----------------------------------------------------------------------------

    def run(self) -> None:
        """Let it run; one that is no longer held is rebuilt from its images.

        Raises:
            OutcomeUnknown: it may run already, and there is nothing to rebuild it from.
            PhaulError: it cannot be rebuilt, or does not run.
        """
        images_dir = Path(self._journal.facts["images_dir"])
        told_before = self._journal.state is State.COMMITTING and self.life is not Life.HELD
        if told_before and self._runs_already(images_dir):
            return
        if self._journal.state is State.PREPARED:
            self._journal.enter(State.COMMITTING)
        if not self._resume_held(images_dir):
            self._rebuild(images_dir)
        self._runs(pid=self.pid)

    def _runs_already(self, images_dir: Path) -> bool:
        """Whether it runs since it was told to before, which nobody recorded."""
        certain = _was_let_run(self._journal)
        if not certain:
            self._engine.wait_let_go()
        if _was_let_run(self._journal):
            if self.post_copy:
                self.resume_pager()
            self._runs()
            if certain:
                # That agent may have died before its engine had put away what only the move needs.
                attempt("what its engine puts away", self._engine.wait_let_go)
            return True
        if not images_dir.is_dir():
            raise OutcomeUnknown(
                f"the copy was told to run, and its images in {images_dir} are gone: it is not "
                "known whether it runs",
                hint="look for it on this host; nothing was changed",
            )
        return False

    def _resume_held(self, images_dir: Path) -> bool:
        """Let the held copy run; whether there was one."""
        held, self.life = self.life is Life.HELD, Life.UNKNOWN
        if not held:
            return False
        if not self.lazy.why_not and self.lazy.lost():
            log.warning("the pager was lost; rebuilding the copy in full")
            return False
        told = time.monotonic()
        try:
            self.resumed_at = self._engine.resume()
        except PhaulError as error:
            if was_resumed(images_dir):
                raise
            log.warning("the held copy was lost: %s; rebuilding it", error)
            return False
        self.resume_ms = (self.resumed_at - told) * 1000
        return True

    def _rebuild(self, images_dir: Path) -> None:
        self._engine.discard()
        self.lazy.stop("the copy was rebuilt after the loss of the first")
        self.restore(images_dir, lazy=self._plan_anew(images_dir))
        self.life = Life.UNKNOWN
        self.resumed_at = self._engine.resume()

    def _plan_anew(self, images_dir: Path) -> bool:
        """A second restore is in full, where all pages are here."""
        if not self.post_copy:
            return False
        # What came so far came for the pager of the first attempt.
        self._late.stop()
        # Of that one it is not known when it ends.
        place = new_directory(self._dir, PLACE)
        self._journal.note(pager=place.name)
        self.lazy = self._pager_at(place.name)
        self.lazy.follow(images_dir)
        self.lazy.begin()
        return self.lazy.plan(images_dir)

    def _runs(self, **facts: Any) -> None:
        """It runs: from here on nothing discards it, whatever can be written or told.

        In a post-copy move it may miss pages that are not here yet. The migration is done once
        hooks were told of it and its images are put away. A disk that refuses changes nothing: the
        images are kept, and show to a recovery that it runs.
        """
        self.life = Life.RUNNING
        note_resumed(Path(self._journal.facts["images_dir"]))
        try:
            if self.whole:
                self._journal.note(**{RUNS: True}, **facts)
            else:
                self._journal.enter(State.POST_COPY, **facts)
        except MigrationFailed as error:
            log.error("the copy runs, and its journal cannot say so: %s", error)


def may_run(journal: Journal) -> bool:
    """Whether a destination's copy was let run, as far as its journal and its images can tell."""
    if journal.state is not State.COMMITTING:
        return journal.state in (State.POST_COPY, State.DONE)
    # The images go only after a copy that runs; without them there is no other.
    return _was_let_run(journal) or not _images_of(journal).is_dir()


def _was_let_run(journal: Journal) -> bool:
    """Whether that is certain."""
    return bool(journal.facts.get(RUNS)) or was_resumed(_images_of(journal))


def _images_of(journal: Journal) -> Path:
    return Path(str(journal.facts.get("images_dir", "")))
