"""One migration as the destination sees it: from Open to Commit or Abort."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from phaul_runtime.config.peers import OWNER
from phaul_runtime.criu.page_format import PageFormat
from phaul_runtime.criu.session import Criu
from phaul_runtime.cutover.cutover import Held, Running
from phaul_runtime.cutover.journal import Journal, lock_directory, trusted
from phaul_runtime.cutover.progress import forget_progress
from phaul_runtime.cutover.states import Role, State
from phaul_runtime.destination.carried import Carried
from phaul_runtime.destination.copy import Copy, Life
from phaul_runtime.destination.filling import Filling
from phaul_runtime.destination.memory_channel import MemoryChannel
from phaul_runtime.destination.requests import checked_json, facts_of, write_images
from phaul_runtime.engine.interface import DestinationHalf, Engines, load_engine
from phaul_runtime.errors import DestinationError, MigrationFailed, PhaulError
from phaul_runtime.files.staged_files import FilePart
from phaul_runtime.hooks.lifecycle import (
    ANNOUNCED,
    FROZEN,
    ON_FAILURE,
    ON_ROLLBACK,
    Failure,
    Hooks,
    announce,
    move_of,
    of_destination,
)
from phaul_runtime.library.api import PhaulConfig
from phaul_runtime.library.server import PhaulServer
from phaul_runtime.memory.hard_close import hang_up
from phaul_runtime.memory.image_dirs import (
    remove_tree,
)
from phaul_runtime.memory.preallocate import Preallocation
from phaul_runtime.rpc import phaul_pb2 as pb
from phaul_runtime.system import logs
from phaul_runtime.system.threads import attempt

log = logging.getLogger(__name__)

_AHEAD = "ahead.img"
_LATE_ROOM = "late.img"


class Incoming:
    """A migration that arrives at this host.

    Made of its journal alone, so that a recovery can take it up where an earlier agent left it.
    Calls may come from several threads; steps exclude each other.

    Args:
        journal: of the destination's role, open and locked.
        criu: a session factory.
        hooks: of this host.
        engines: find one by its name.

    Attributes:
        server: takes pages, once a round was started.
        filling: how far the pager of its copy is.
    """

    def __init__(
        self, journal: Journal, criu: Criu, hooks: Hooks, engines: Engines = load_engine
    ) -> None:
        self.id = journal.id
        self._hooks = hooks
        self.journal = journal
        facts = journal.facts
        self.owner = str(facts.get(OWNER, ""))
        self.lost_s = float(facts["lost_s"])
        self.seen = time.monotonic()
        self.given_up = False
        self._dir = Path(facts["workdir"]) / self.id
        self._dir_lock = -1
        self._criu = criu
        self._step = threading.RLock()
        self.memory = MemoryChannel()
        self.server: PhaulServer | None = None
        self._ahead: Preallocation | None = None
        self._late_room: Preallocation | None = None
        self._log_level = int(facts["log_level"])
        engine = engines(facts["engine"])
        options = engine.options_model.model_validate(facts["options"])
        self._engine: DestinationHalf = engine.destination(
            options, criu_log_level=self._log_level, hold_s=float(facts["hold_s"])
        )
        self.copy = Copy(journal, criu, hooks, self._engine, self._dir)
        self.carried = Carried(journal, self._engine)
        self.filling = Filling(journal, lambda: self.given_up)

    @classmethod
    def open(
        cls,
        request: pb.OpenRequest,
        workdir: Path,
        state_dir: Path,
        criu: Criu,
        hooks: Hooks,
        *,
        owner: str = "",
        engines: Engines = load_engine,
    ) -> Incoming:
        """Begin a migration: its journal, its directory, its engine half.

        Args:
            request: as it came.
            workdir: private directory for images.
            state_dir: of the journals.
            criu: a session factory.
            hooks: of this host.
            owner: the certificate that it belongs to; empty for none.
            engines: find one by its name.

        Raises:
            PhaulError: the request is malformed, or something cannot be created.
        """
        facts = facts_of(request, engines(request.engine))
        manifest = checked_json(request.manifest, "manifest")
        journal = Journal.create(state_dir, request.id, Role.DESTINATION)
        try:
            journal.enter(
                State.ITERATING,
                **facts,
                **{OWNER: owner},
                manifest=manifest,
                workdir=str(workdir),
            )
            incoming = cls(journal, criu, hooks, engines)
            incoming._begin(manifest, request.memory, request.late_memory)
        except BaseException:
            journal.close()
            raise
        return incoming

    def _begin(self, manifest: dict[str, Any], memory: int, late_memory: int) -> None:
        try:
            self._dir.mkdir(mode=0o700)
            self._dir_lock = lock_directory(self._dir)
            if self.journal.facts["page_server"] == "phaul":
                self._ahead = Preallocation(self._dir / _AHEAD, memory)
                self._ahead.begin()
            if late_memory:
                self._late_room = Preallocation(self._dir / _LATE_ROOM, late_memory)
                self._late_room.begin()
            self._engine.prepare(manifest, self.id)
            self.carried.place_trees()
            self.copy.begin_lazy(self._late_room)
        except OSError as error:
            self.abort()
            raise DestinationError(f"cannot create {self._dir}: {error.strerror}") from error
        except BaseException:
            self.abort()
            raise

    @classmethod
    def revive(
        cls, journal: Journal, criu: Criu, hooks: Hooks, engines: Engines = load_engine
    ) -> Incoming:
        """Take up what an earlier agent left; then `commit` or `abort` it.

        Raises:
            JournalDamaged: the journal does not say what it was.
            PhaulError: what the engine made cannot be found again; the journal is as it was.
        """
        with trusted(journal.path):
            return cls._revived(journal, criu, hooks, engines)

    @classmethod
    def _revived(cls, journal: Journal, criu: Criu, hooks: Hooks, engines: Engines) -> Incoming:
        incoming = cls(journal, criu, hooks, engines)
        incoming.carried.recall()
        if journal.facts.get("post_copy") and incoming._dir.exists():
            # Nobody tidies up while its pages come.
            incoming._dir_lock = lock_directory(incoming._dir)
        if not incoming.copy.may_run:
            # What runs there already is not to be prepared for.
            incoming._engine.prepare(journal.facts["manifest"], journal.id)
        return incoming

    @property
    def state(self) -> State:
        """Where its journal stands."""
        return self.journal.state or State.ITERATING

    @property
    def over(self) -> bool:
        """There is nothing left that the end of its client could change."""
        runs_whole = self.copy.life is Life.RUNNING and self.state is not State.POST_COPY
        return self.given_up or self.state.settled or runs_whole

    def _expect(self, *states: State) -> None:
        if self.given_up:
            raise DestinationError("the migration was given up: its client was silent")
        if self.state not in states:
            raise DestinationError(f"the migration is {self.state.value}")

    def start_iter(self) -> None:
        """A directory and a page server for the next iteration."""
        with self._step:
            self._open_server().start_iter()

    def start_local(self) -> dict[str, bytes]:
        """A directory for final images of a post-copy move; the page maps of the one before."""
        with self._step:
            found = self._open_server().start_local()
            self.copy.lazy.await_started()
            return found

    def _open_server(self) -> PhaulServer:
        self._expect(State.ITERATING)
        memory = self.memory.wait()
        if self.server is None:
            config = PhaulConfig(0, memory.fileno(), str(self._dir))
            self.server = PhaulServer(
                config,
                self._criu,
                log_level=self._log_level,
                page_server=self.journal.facts["page_server"],
                ahead=self._ahead,
                client=PageFormat.of_number(int(self.journal.facts["page_format"])),
            )
            self._ahead = None
        return self.server

    def stop_iter(self) -> None:
        """The iteration's page server has ended well; a repetition changes nothing."""
        with self._step:
            if self.copy.life is Life.RUNNING:
                return
            self._expect(State.ITERATING)
            server = self._require_server()
            server.stop_iter()
            self.copy.lazy.add(Path(server.last_images_dir or ""))

    def _require_server(self) -> PhaulServer:
        if self.server is None:
            raise DestinationError("no iteration was started")
        return self.server

    @contextlib.contextmanager
    def _iterating(self) -> Iterator[None]:
        """One step at a time, and only before the freeze."""
        with self._step:
            self._expect(State.ITERATING)
            yield

    def put_files(self, parts: Iterable[FilePart]) -> None:
        """Stage files."""
        with self._iterating():
            self.carried.put_files(parts)

    def serve_tree(self, name: str, channel: socket.socket) -> None:
        """Let rsync have a connection until it ends; why it failed is told by `beat`."""
        logs.enter(self.id)
        self.carried.serve_tree(name, channel, self._iterating)

    def arrived(self, name: str) -> None:
        """A tree that goes first is whole: let the engine have it, and say all places anew.

        Raises:
            PhaulError: it is of no use to the engine; `abort` follows, which also ends this.
        """
        with self._iterating():
            self.carried.arrived(name)

    def put_images(self, messages: Iterable[pb.ImageParts]) -> None:
        """Take some of the final images; `prepare` brings the rest."""
        with self._iterating():
            images_dir = Path(self._require_server().last_images_dir or "")
            for message in messages:
                write_images(images_dir, message.parts)

    def prepare(self, parts: Iterable[pb.ImagePart]) -> Held:
        """Take the final images, or what `put_images` has left of them, restore, hold.

        Raises:
            PhaulError: nothing of it is left but the directory, which `abort` removes.
        """
        with self._iterating():
            server = self._require_server()
            self.carried.await_trees()
            begun = time.monotonic()
            images_dir = Path(server.last_images_dir or "")
            # On the disk with PREPARED: before that nothing is here that outlives this host.
            self.journal.pass_through(State.FROZEN, images_dir=str(images_dir))
            self._hooks.run(FROZEN, move_of(self.journal))
            write_images(images_dir, parts)
            # CRIU acknowledges pages before it has flushed them: only now is the chain whole.
            server.stop_iter()
            self.carried.install_files()
            lazy = self.copy.lazy.plan(images_dir)
            written = time.monotonic()
            self.copy.restore(images_dir, lazy=lazy)
            self.journal.enter(State.PREPARED, pid=self.copy.pid)
            done = time.monotonic()
            return Held(
                self.copy.pid,
                restore_ms=(done - written) * 1000,
                images_ms=(written - begun) * 1000,
                full_because=self.copy.lazy.why_not,
            )

    def commit(self) -> Running:
        """Let it run; a repetition only answers again.

        A copy that is no longer held (its CRIU or its agent died) is rebuilt from the images.
        """
        with self._step:
            if self.state is State.POST_COPY:
                self._take_up()
            elif self.copy.life is not Life.RUNNING:
                self._expect(State.PREPARED, State.COMMITTING)
                self.copy.run()
                self._settle_soon()
            since = (
                (time.monotonic() - self.copy.resumed_at) * 1000 if self.copy.resumed_at else 0.0
            )
            return Running(self.copy.pid, since, self.copy.resume_ms)

    def _take_up(self) -> None:
        """Attend to a copy that runs and misses pages, if that is not done already."""
        if self._settler is not None:
            return
        try:
            self.copy.resume_pager()
        except DestinationError:
            if Path(f"/proc/{self.copy.pid}").exists():
                raise
            # Its pager is gone because it is: nothing misses anything.
            self.journal.enter(State.DONE)
        self._settle_soon()

    @property
    def still_misses(self) -> bool:
        """Of a copy that runs: whether its pager waits for pages from elsewhere."""
        return self.state is State.POST_COPY and not self.copy.lazy.filled().over

    def serve_pages(self, channel: socket.socket) -> None:
        """Take the pages of a copy that runs from a connection to its source, until it ends."""
        logs.enter(self.id)
        # Without `_step`: the restore that holds it may need the first pages.
        if not self.copy.serve_pages(channel):
            return
        with self._step:
            if self.state is State.POST_COPY and not self.given_up:
                # From now on it is a lazy restore as any other: nothing depends on the source.
                self._is_done()

    def _is_done(self) -> bool:
        """What a running copy needs of this agent is done, once its hooks were told too.

        Returns:
            whether the journal says so.
        """
        if self.state is not State.DONE:
            if not self.journal.facts.get(ANNOUNCED):
                return False
            try:
                self.journal.enter(State.DONE)
            except MigrationFailed as error:
                log.error("%s; phaul-runtime recover %s completes it", error.message, self.id)
                return False
        forget_progress(self.journal.path.parents[1], self.id, Role.DESTINATION)
        return True

    def _settle_soon(self) -> None:
        self._settler = threading.Thread(target=self._settle, name="settle", daemon=True)
        self._settler.start()

    _settler: threading.Thread | None = None

    def wait_settled(self, within_s: float | None = None) -> bool:
        """Wait until a committed migration has put away its images.

        Args:
            within_s: at the most; None for as long as its pager has pages to fill in.

        Returns:
            Whether it has, or had nothing to put away.
        """
        if self._settler is None:
            return True
        self._settler.join(within_s)
        return not self._settler.is_alive()

    def _settle(self) -> None:
        """After the commit, when time no longer matters."""
        logs.enter(self.id)  # a thread has a context of its own
        try:
            self._put_in_order()
        except Exception:
            log.exception("it runs; what follows failed: phaul-runtime recover %s", self.id)
            with self._step:
                if not self.given_up:
                    self._close(keep_images=True)

    def _put_in_order(self) -> None:
        with self._step:
            if not self.given_up:
                for warning in announce(self._hooks, self.journal, self.copy.pid):
                    log.warning("%s", warning)
                self.carried.keep_files()
                if self.copy.whole:
                    # Its pager needs nothing but what is here, and outlives whatever comes.
                    self._is_done()
        if not self.copy.lazy.why_not:
            self.filling.watch(self.copy.lazy)
        with self._step:
            if self.given_up:
                return
            if self.state is State.POST_COPY and self.filling.lost:
                # Its pager is lost, or was told to stop: a recovery finds out.
                self._close(keep_images=True)
                return
            self._close(keep_images=not self._is_done())

    def abort(self, *, client_lost: bool = False) -> None:
        """Discard everything, unless it was told to run; idempotent.

        A held copy whose client is lost never runs by itself, but it may be the only one: the
        source may have been killed already. Its images are kept for a recovery.
        """
        with logs.about(self.id):
            self._abort(client_lost=client_lost)

    def _abort(self, *, client_lost: bool) -> None:
        # Ends a page server that waits for memory, and so the call that waits for it.
        self.memory.end(hang_up)
        self.copy.stop_pages()
        # Not before a step that takes its time has ended can anything be discarded.
        self.carried.give_up()
        if self.state is State.FROZEN and self.copy.post_copy:
            # A restore that waits for pages which nobody brings any more would last for minutes.
            self.copy.lazy.cut()
        with self._step:
            if self.given_up or self.state.settled:
                return
            if self.copy.may_run:
                # Nothing of it may go. What is left to do, `_settle` does, or a recovery: the pages
                # that a post-copy move misses do not come through this agent any more.
                if self._settler is None or self.state is State.POST_COPY:
                    self._close(keep_images=True)
                return
            keep = self.state is State.COMMITTING or (client_lost and self.state is State.PREPARED)
            if not keep and self.state is not State.ABORTING:
                self._journal_quietly(State.ABORTING)
            attempt("putting the copy away", self._engine.discard)
            attempt("ending its pager", self.copy.lazy.stop)
            if not keep:
                self.carried.undo()
                self._try_hooks(ON_ROLLBACK)
            self._try_hooks(ON_FAILURE, of_destination(client_lost, keep))
            self._close(keep_images=keep)
            if keep:
                log.error("its client is lost; images kept in %s", self._dir)

    def _try_hooks(self, event: str, failure: Failure | None = None) -> None:
        def run() -> None:
            for warning in self._hooks.try_to(event, move_of(self.journal), failure=failure):
                log.warning("%s", warning)

        attempt(f"hook {event}", run)

    def _journal_quietly(self, state: State) -> None:
        """On the way back a full disk is no reason to stop: the source's journal decides."""
        with contextlib.suppress(PhaulError):
            self.journal.enter(state)

    def _close(self, *, keep_images: bool) -> None:
        self.copy.close()
        if self.server is not None:
            self.server.close()
        for room in filter(None, (self._ahead, self._late_room)):
            room.drop()
        self.memory.end(socket.socket.close)
        if self._dir_lock >= 0:
            os.close(self._dir_lock)
            self._dir_lock = -1
        if not keep_images:
            remove_tree(self._dir)
            if self.state is State.ABORTING:
                self._journal_quietly(State.ABORTED)
        self.given_up = True
        self.journal.close()
