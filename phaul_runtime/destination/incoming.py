"""One migration as the destination sees it: from Open to Commit or Abort."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from phaul_runtime.boundedjson import read_json
from phaul_runtime.bounds import LONGEST_LOST_S, LONGEST_S, bounded, plain_text
from phaul_runtime.config.peers import OWNER
from phaul_runtime.criu.page_format import OTHER_RECEIVER, PageFormat, unknown_format
from phaul_runtime.criu.session import Criu
from phaul_runtime.cutover.journal import RUNS, Journal, checked_id, lock_directory, trusted
from phaul_runtime.cutover.progress import forget_progress, write_progress
from phaul_runtime.cutover.states import Role, State
from phaul_runtime.destination.lazy_restore import PLACE, Filled, LazyRestore
from phaul_runtime.engine.interface import DestinationHalf, load_engine
from phaul_runtime.errors import DestinationError, MigrationFailed, OutcomeUnknown, PhaulError
from phaul_runtime.files.staged_files import FilePart, FileStage
from phaul_runtime.files.tree_server import TreeServer, read_line
from phaul_runtime.hooks.lifecycle import (
    ANNOUNCED,
    FROZEN,
    ON_FAILURE,
    ON_ROLLBACK,
    POST_RESTORE,
    Failure,
    Hooks,
    announce,
    move_of,
)
from phaul_runtime.library.api import PhaulConfig
from phaul_runtime.library.server import PhaulServer
from phaul_runtime.memory.hard_close import hang_up
from phaul_runtime.memory.image_dirs import (
    forget_resumed,
    new_directory,
    note_resumed,
    remove_tree,
    was_resumed,
)
from phaul_runtime.memory.preallocate import Ahead
from phaul_runtime.postcopy.late import LatePages
from phaul_runtime.rpc import phaul_pb2 as pb
from phaul_runtime.rpc.codec import to_wire
from phaul_runtime.system import logs
from phaul_runtime.system.cancel import Cancellation
from phaul_runtime.system.threads import attempt

log = logging.getLogger(__name__)

_IMAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.(img|json)")
MEMORY_WITHIN_S = 30.0
_AHEAD = "ahead.img"
_LATE_ROOM = "late.img"
CANNOT_BE_LAZY = "this engine, as configured, cannot restore lazily"


def checked_json(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object sent by the other side.

    Raises:
        DestinationError: it is none.
    """
    try:
        value = read_json(data or b"{}")
    except ValueError as error:
        raise DestinationError(f"malformed {what}: {error}") from error
    if not isinstance(value, dict):
        raise DestinationError(f"malformed {what}")
    return value


class Incoming:
    """A migration that arrives at this host.

    Made of its journal alone, so that a recovery can take it up where an earlier agent left it.
    Calls may come from several threads; steps exclude each other.

    Args:
        journal: of the destination's role, open and locked.
        criu: a session factory.
        hooks: of this host.
    """

    def __init__(self, journal: Journal, criu: Criu, hooks: Hooks) -> None:
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
        self._memory: socket.socket | None = None
        self._connecting = threading.Lock()
        self._memory_here = threading.Event()
        self._server: PhaulServer | None = None
        self._ahead: Ahead | None = None
        self._late_room: Ahead | None = None
        self._log_level = int(facts["log_level"])
        self._stage = FileStage(journal)
        self._trees = TreeServer(journal)
        self._giving_up = Cancellation()
        self._late = LatePages()
        engine = load_engine(facts["engine"])
        options = engine.options_model.model_validate(facts["options"])
        self._engine: DestinationHalf = engine.destination(
            options, criu_log_level=self._log_level, hold_s=float(facts["hold_s"])
        )
        self._lazy = LazyRestore("full", self._dir, f"{self.id}-pager")
        self._filled: Filled | PhaulError | None = None
        self._held = False
        self._pid = int(facts.get("pid", 0))

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
    ) -> Incoming:
        """Begin a migration: its journal, its directory, its engine half.

        Args:
            request: as it came.
            workdir: private directory for images.
            state_dir: of the journals.
            criu: a session factory.
            hooks: of this host.
            owner: the certificate that it belongs to; empty for none.

        Raises:
            PhaulError: the request is malformed, or something cannot be created.
        """
        checked_id(request.id)
        engine = load_engine(request.engine)
        manifest = checked_json(request.manifest, "manifest")
        options = checked_json(request.options, "options")
        engine.options_model.model_validate(options)
        page_server = _page_server(request)
        restore = "lazy" if request.post_copy else request.restore or "auto"
        if restore not in ("auto", "lazy", "full"):
            raise DestinationError(f"malformed request: restore {restore[:40]!a}")
        facts = {
            "engine": request.engine,
            "target": plain_text("target", request.target),
            "peer": plain_text("source", request.source),
            "lost_s": bounded("lost_s", request.lost_s, 0.1, LONGEST_LOST_S),
            # Two deadlines of the client's, and more than none.
            "hold_s": bounded("commit_s", request.commit_s, 0.1, 2 * LONGEST_S),
        }
        journal = Journal.create(state_dir, request.id, Role.DESTINATION)
        try:
            journal.enter(
                State.ITERATING,
                **facts,
                **{OWNER: owner},
                manifest=manifest,
                options=options,
                workdir=str(workdir),
                log_level=min(4, request.criu_log_level),
                restore=restore,
                post_copy=request.post_copy,
                page_server=page_server,
                page_format=request.page_format,
            )
            incoming = cls(journal, criu, hooks)
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
                self._ahead = Ahead(self._dir / _AHEAD, memory)
                self._ahead.begin()
            if late_memory:
                self._late_room = Ahead(self._dir / _LATE_ROOM, late_memory)
                self._late_room.begin()
            self._engine.prepare(manifest, self.id)
            self._trees.place(self._engine.trees())
            self._lazy = LazyRestore(
                str(self.journal.facts["restore"]), self._dir, f"{self.id}-pager", self._cannot,
                room=self._late_room,
            )  # fmt: skip
            if self.journal.facts["restore"] == "lazy" and not self._engine.can_be_lazy:
                raise DestinationError(CANNOT_BE_LAZY, hint="--restore auto")
            self._lazy.begin()
        except OSError as error:
            self.abort()
            raise DestinationError(f"cannot create {self._dir}: {error.strerror}") from error
        except BaseException:
            self.abort()
            raise

    def _cannot(self) -> str:
        """Why this host or engine cannot restore lazily."""
        if not self._engine.can_be_lazy:
            return CANNOT_BE_LAZY
        if not self._criu.feature_check().lazy_pages:
            return "this kernel has no userfaultfd for CRIU"
        version = self._criu.known_version or self._criu.version()
        if version.page_format is None:
            return unknown_format(version)
        return ""

    @classmethod
    def revive(cls, journal: Journal, criu: Criu, hooks: Hooks) -> Incoming:
        """Take up what an earlier agent left; then `commit` or `abort` it.

        Raises:
            JournalDamaged: the journal does not say what it was.
            PhaulError: what the engine made cannot be found again; the journal is as it was.
        """
        with trusted(journal.path):
            return cls._revived(journal, criu, hooks)

    @classmethod
    def _revived(cls, journal: Journal, criu: Criu, hooks: Hooks) -> Incoming:
        incoming = cls(journal, criu, hooks)
        incoming._stage.recall()
        if journal.facts.get("post_copy") and incoming._dir.exists():
            # Nobody tidies up while its pages come.
            incoming._dir_lock = lock_directory(incoming._dir)
        if not incoming._may_run():
            # What runs there already is not to be prepared for.
            incoming._engine.prepare(journal.facts["manifest"], journal.id)
        return incoming

    def _may_run(self) -> bool:
        """Whether the copy was let run, as far as this host can tell: then nothing discards it."""
        return self._ran or may_run(self.journal)

    @property
    def state(self) -> State:
        """Where its journal stands."""
        return self.journal.state or State.ITERATING

    @property
    def over(self) -> bool:
        """There is nothing left that the end of its client could change."""
        runs_whole = self._ran and self.state is not State.POST_COPY
        return self.given_up or self.state.settled or runs_whole

    def connect_memory(self, channel: socket.socket) -> None:
        """The memory channel has arrived; it is this object's from now on.

        Raises:
            DestinationError: there is one already, or nothing more is to come; it is the caller's.
        """
        with self._connecting:
            if self._memory_refused is not None or self._memory is not None:
                raise DestinationError("it has its memory channel already")
            if self._memory_over:
                raise DestinationError("no more memory is taken for it")
            self._memory = channel
        self._memory_here.set()

    def refuse_memory(self, error: PhaulError) -> None:
        """The memory channel has arrived and is of no use; `start_iter` says why.

        One that comes beside another changes nothing.
        """
        with self._connecting:
            if self._memory is None:
                self._memory_refused = error
        self._memory_here.set()

    _memory_refused: PhaulError | None = None
    _memory_over = False

    def _end_memory(self, end: Callable[[socket.socket], object]) -> None:
        """No connection for memory is taken any more, and the one that there is ends."""
        with self._connecting:
            self._memory_over = True
            if self._memory is not None:
                end(self._memory)

    def beat(self) -> pb.BeatReply:
        """The client lives."""
        self.seen = time.monotonic()
        failure = self._server.failure if self._server else None
        return pb.BeatReply(
            bytes=self._server.received if self._server else 0,
            state=self.state.value,
            failure=to_wire(failure) if failure else None,
            trees=[
                pb.TreeFailure(name=name, error=to_wire(error))
                for name, error in self._trees.failures.items()
            ],
        )

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
            self._lazy.await_started()
            return found

    def _open_server(self) -> PhaulServer:
        self._expect(State.ITERATING)
        arrived = self._memory_here.wait(MEMORY_WITHIN_S)
        if self._memory_refused is not None:
            raise self._memory_refused
        if not arrived or self._memory is None:
            raise DestinationError("the memory channel did not arrive")
        if self._server is None:
            config = PhaulConfig(0, self._memory.fileno(), str(self._dir))
            self._server = PhaulServer(
                config,
                self._criu,
                log_level=self._log_level,
                page_server=self.journal.facts["page_server"],
                ahead=self._ahead,
                client=PageFormat.of_number(int(self.journal.facts["page_format"])),
            )
            self._ahead = None
        return self._server

    def stop_iter(self) -> None:
        """The iteration's page server has ended well; a repetition changes nothing."""
        with self._step:
            if self._ran or self.state in (State.POST_COPY, State.DONE):
                return
            self._expect(State.ITERATING)
            server = self._require_server()
            server.stop_iter()
            self._lazy.add(Path(server.last_images_dir or ""))

    def _require_server(self) -> PhaulServer:
        if self._server is None:
            raise DestinationError("no iteration was started")
        return self._server

    def put_files(self, parts: Iterable[FilePart]) -> None:
        """Stage files."""
        with self._step:
            self._expect(State.ITERATING)
            try:
                for part in parts:
                    self._stage.take(part)
            finally:
                self._stage.end_stream()

    @property
    def places(self) -> Mapping[str, Path]:
        """Where each tree of this migration lies here."""
        return self._trees.places

    def serve_tree(self, name: str, channel: socket.socket) -> None:
        """Let rsync have a connection until it ends; why it failed is told by `beat`."""
        logs.enter(self.id)
        try:
            line = read_line(channel)
            if not line:
                return
            with self._step:
                self._expect(State.ITERATING)
                process = self._trees.start(name, line, channel)
            self._trees.attend(name, process)
        except PhaulError as error:
            self._trees.failed(name, error)
        finally:
            # Only now, with the reason told, may the client see the end.
            with contextlib.suppress(OSError):
                channel.shutdown(socket.SHUT_RDWR)
            channel.close()

    def arrived(self, name: str) -> None:
        """A tree that goes first is whole: let the engine have it, and say all places anew.

        Raises:
            PhaulError: it is of no use to the engine; `abort` follows, which also ends this.
        """
        with self._step:
            self._expect(State.ITERATING)
            if name not in self._trees.places:
                raise DestinationError(f"no tree {name[:40]!r} in this migration")
            self._trees.wait_ended()
            self._engine.arrived(name, self._giving_up)
            self._trees.place(self._engine.trees())

    def put_images(self, messages: Iterable[pb.ImageParts]) -> None:
        """Take some of the final images; `prepare` brings the rest."""
        with self._step:
            self._expect(State.ITERATING)
            images_dir = Path(self._require_server().last_images_dir or "")
            for message in messages:
                write_images(images_dir, message.parts)

    def prepare(self, parts: Iterable[pb.ImagePart]) -> pb.PrepareReply:
        """Take the final images, or what `put_images` has left of them, restore, hold.

        Raises:
            PhaulError: nothing of it is left but the directory, which `abort` removes.
        """
        with self._step:
            self._expect(State.ITERATING)
            server = self._require_server()
            self._trees.wait_ended()
            begun = time.monotonic()
            images_dir = Path(server.last_images_dir or "")
            # On the disk with PREPARED: before that nothing is here that outlives this host.
            self.journal.pass_through(State.FROZEN, images_dir=str(images_dir))
            self._hooks.run(FROZEN, move_of(self.journal))
            write_images(images_dir, parts)
            # CRIU acknowledges pages before it has flushed them: only now is the chain whole.
            server.stop_iter()
            self._stage.install()
            lazy = self._lazy.plan(images_dir)
            written = time.monotonic()
            self._restore(images_dir, lazy=lazy)
            self.journal.enter(State.PREPARED, pid=self._pid)
            return pb.PrepareReply(
                pid=self._pid,
                full_because=self._lazy.why_not,
                images_ms=(written - begun) * 1000,
                restore_ms=(time.monotonic() - written) * 1000,
            )

    def _restore(self, images_dir: Path, *, lazy: bool = False) -> None:
        forget_resumed(images_dir)
        if lazy:
            self._pid = self._engine.restore(self._criu, images_dir, lazy=True)
            if not self._lazy_handed():
                self._engine.discard()
                self._lazy.stop()
                lazy = False
        if not lazy:
            self._pid = self._engine.restore(self._criu, images_dir)
        try:
            self._hooks.run(POST_RESTORE, move_of(self.journal), self._pid)
        except PhaulError:
            self._engine.discard()
            raise
        self._held = True

    def _lazy_handed(self) -> bool:
        try:
            return self._lazy.handed(self._pid)
        except PhaulError:
            self._engine.discard()
            raise

    def commit(self) -> pb.CommitReply:
        """Let it run; a repetition only answers again.

        A copy that is no longer held (its CRIU or its agent died) is rebuilt from the images.
        """
        with self._step:
            if self.state is State.POST_COPY:
                self._take_up()
            elif not self._ran and self.state is not State.DONE:
                self._expect(State.PREPARED, State.COMMITTING)
                self._run()
                self._settle_soon()
            since = (time.monotonic() - self._resumed_at) * 1000 if self._resumed_at else 0.0
            return pb.CommitReply(
                pid=self._pid,
                since_resume_ms=since,
                resume_ms=self._resume_ms,
            )

    @property
    def missing(self) -> int | None:
        """Pages that are still at the source; None in a move that leaves none there."""
        if not self.journal.facts.get("post_copy"):
            return None
        store = self._lazy.store
        return store.missing_pages if store else 0

    def _take_up(self) -> None:
        """Attend to a copy that runs and misses pages, if that is not done already."""
        if self._settler is not None:
            return
        try:
            self._resume_pager()
        except DestinationError:
            if Path(f"/proc/{self._pid}").exists():
                raise
            # Its pager is gone because it is: nothing misses anything.
            self.journal.enter(State.DONE)
        self._settle_soon()

    @property
    def still_misses(self) -> bool:
        """Of a copy that runs: whether its pager waits for pages from elsewhere."""
        return self.state is State.POST_COPY and not self._lazy.filled().over

    def _pager_at(self, place: str) -> LazyRestore:
        return LazyRestore("lazy", self._dir, f"{self.id}-pager", place=place)

    def _resume_pager(self) -> None:
        """Take up the pager of the copy that runs."""
        self._lazy = self._pager_at(str(self.journal.facts.get("pager", PLACE)))
        self._lazy.resume()

    def serve_pages(self, channel: socket.socket) -> None:
        """Take the pages of a copy that runs from a connection to its source, until it ends."""
        logs.enter(self.id)
        # Without `_step`: the restore that holds it may need the first pages.
        if not self._late.serve(channel, lambda: (self._lazy.store, self._lazy.place)):
            return
        with self._step:
            if self.state is State.POST_COPY and not self.given_up:
                # From now on it is a lazy restore as any other: nothing depends on the source.
                self._is_done()

    _resumed_at = 0.0
    _resume_ms = 0.0
    _ran = False

    def _run(self) -> None:
        images_dir = Path(self.journal.facts["images_dir"])
        if self.state is State.COMMITTING and not self._held:
            # Told to run before, by an agent that did not live to say what came of it.
            if not _was_let_run(self.journal):
                self._engine.wait_let_go()
            if _was_let_run(self.journal):
                if self.journal.facts.get("post_copy"):
                    self._resume_pager()
                self._runs()
                return
            if not images_dir.is_dir():
                raise OutcomeUnknown(
                    f"the copy was told to run, and its images in {images_dir} are gone: it is not "
                    "known whether it runs",
                    hint="look for it on this host; nothing was changed",
                )
        if self.state is State.PREPARED:
            self.journal.enter(State.COMMITTING)
        if self._held and not self._lazy.why_not and self._lazy.lost():
            log.warning("the pager was lost; rebuilding the copy in full")
            self._held = False
        if self._held:
            self._held = False
            told = time.monotonic()
            try:
                self._resumed_at = self._engine.resume()
                self._resume_ms = (self._resumed_at - told) * 1000
            except PhaulError as error:
                if was_resumed(images_dir):
                    raise
                log.warning("the held copy was lost: %s; rebuilding it", error)
        if not self._resumed_at:
            self._engine.discard()
            self._lazy.stop("the copy was rebuilt after the loss of the first")
            self._restore(images_dir, lazy=self._plan_anew(images_dir))
            self._held = False
            self._resumed_at = self._engine.resume()
        self._runs(pid=self._pid)

    def _plan_anew(self, images_dir: Path) -> bool:
        """A second restore is in full, where all pages are here."""
        if not self.journal.facts.get("post_copy"):
            return False
        # What came so far came for the pager of the first attempt.
        self._late.stop()
        # Of that one it is not known when it ends.
        place = new_directory(self._dir, PLACE)
        self.journal.note(pager=place.name)
        self._lazy = self._pager_at(place.name)
        self._lazy.follow(images_dir)
        self._lazy.begin()
        return self._lazy.plan(images_dir)

    def _runs(self, **facts: Any) -> None:
        """The copy runs: from here on nothing discards it, whatever can be written or told.

        In a post-copy move it may miss pages that are not here yet. Done it is once its hooks were
        told and it is put in order (`_settle`). A disk that refuses changes nothing: the images are
        kept, and show to a recovery that it runs.
        """
        self._ran = True
        note_resumed(Path(self.journal.facts["images_dir"]))
        store = self._lazy.store
        over = store is None or store.complete
        try:
            if over:
                self.journal.note(**{RUNS: True}, **facts)
            else:
                self.journal.enter(State.POST_COPY, **facts)
        except MigrationFailed as error:
            log.error("the copy runs, and its journal cannot say so: %s", error)

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
                    self._let_go()

    def _put_in_order(self) -> None:
        with self._step:
            if not self.given_up:
                for warning in announce(self._hooks, self.journal, self._pid):
                    log.warning("%s", warning)
                self._stage.keep()
                store = self._lazy.store
                if store is None or store.complete:
                    # Its pager needs nothing but what is here, and outlives whatever comes.
                    self._is_done()
        if not self._lazy.why_not:
            self._watch_pager()
        with self._step:
            if self.given_up:
                return
            if self.state is State.POST_COPY and isinstance(self._filled, PhaulError):
                # Its pager is lost, or was told to stop: a recovery finds out.
                self._let_go()
                return
            self._close(keep_images=not self._is_done())

    def _watch_pager(self) -> None:
        def tell(now: Filled) -> None:
            self._filled = now
            if self.state is State.POST_COPY:
                write_progress(
                    self.journal.path.parents[1],
                    self.id,
                    Role.DESTINATION,
                    pages=now.pages,
                    missing=now.missing,
                )
            if self.given_up:
                raise DestinationError("left to its pager")

        try:
            self._lazy.watch(tell)
        except PhaulError as error:
            if not self.given_up:
                log.error("%s", error)
            self._filled = error

    @property
    def full_because(self) -> str:
        """Why the copy has no pager; empty if it has, or may yet have."""
        return self._lazy.why_not

    def filled(self) -> Filled | None:
        """How far the pager of the running copy is; None before anything is known.

        Raises:
            PhaulError: it is lost, and pages with it.
        """
        if isinstance(self._filled, PhaulError):
            raise self._filled
        return self._filled

    def abort(self, *, client_lost: bool = False) -> None:
        """Discard everything, unless it was told to run; idempotent.

        A held copy whose client is lost never runs by itself, but it may be the only one: the
        source may have been killed already. Its images are kept for a recovery.
        """
        with logs.about(self.id):
            self._abort(client_lost=client_lost)

    def _abort(self, *, client_lost: bool) -> None:
        # Ends a page server that waits for memory, and so whoever waits for it.
        self._end_memory(hang_up)
        self._late.stop()
        self._trees.stop()
        # Not before a step that takes its time has ended can anything be discarded.
        self._giving_up.request()
        if self.state is State.FROZEN and self.journal.facts.get("post_copy"):
            # A restore that waits for pages which nobody brings any more would last for minutes.
            self._lazy.cut()
        with self._step:
            if self.given_up or self.state.settled:
                return
            if self._may_run():
                # Nothing of it may go. What is left to do, `_settle` does, or a recovery: the pages
                # that a post-copy move misses do not come through this agent any more.
                if self._settler is None or self.state is State.POST_COPY:
                    self._let_go()
                return
            keep = self.state is State.COMMITTING or (client_lost and self.state is State.PREPARED)
            if not keep and self.state is not State.ABORTING:
                self._journal_quietly(State.ABORTING)
            self._held = False
            attempt("putting the copy away", self._engine.discard)
            attempt("ending its pager", self._lazy.stop)
            if not keep:
                self._undo()
                self._try_hooks(ON_ROLLBACK)
            self._try_hooks(ON_FAILURE, _failure(client_lost, keep))
            self._close(keep_images=keep)
            if keep:
                log.error("its client is lost; images kept in %s", self._dir)

    def _try_hooks(self, event: str, failure: Failure | None = None) -> None:
        def run() -> None:
            for warning in self._hooks.try_to(event, move_of(self.journal), failure=failure):
                log.warning("%s", warning)

        attempt(f"hook {event}", run)

    def _undo(self) -> None:
        """Put this host back to what it was; what cannot be is left, and logged."""
        self._trees.stop()
        attempt("ending its trees", self._trees.wait_ended)
        attempt("undoing its files", self._stage.undo)
        attempt("undoing what its engine made", self._engine.undo)
        attempt("undoing its trees", self._trees.undo)

    def _journal_quietly(self, state: State) -> None:
        """On the way back a full disk is no reason to stop: the source's journal decides."""
        with contextlib.suppress(PhaulError):
            self.journal.enter(state)

    def _let_go(self) -> None:
        """Another agent may take it up."""
        self._close(keep_images=True)

    def _close(self, *, keep_images: bool) -> None:
        self._late.close()
        if self._lazy.store is not None:
            self._lazy.store.close()
        if self._server is not None:
            self._server.close()
        for room in filter(None, (self._ahead, self._late_room)):
            room.drop()
        self._end_memory(socket.socket.close)
        if self._dir_lock >= 0:
            os.close(self._dir_lock)
            self._dir_lock = -1
        if not keep_images:
            remove_tree(self._dir)
            if self.state is State.ABORTING:
                self._journal_quietly(State.ABORTED)
        self.given_up = True
        self.journal.close()


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


def _page_server(request: pb.OpenRequest) -> str:
    """Who receives pages: `criu`, or `phaul` unless it is said."""
    asked = request.page_server or "phaul"
    if asked not in ("phaul", "criu"):
        raise DestinationError(f"malformed request: page_server {asked[:40]!r}")
    if asked == "phaul" and PageFormat.of_number(request.page_format) is None:
        raise DestinationError(unknown_format("at the source"), hint=OTHER_RECEIVER)
    return asked


def _failure(client_lost: bool, keep: bool) -> Failure:
    """What on_failure's hooks of the destination are told: the reason is the source's to know."""
    reason = "its client is lost" if client_lost else "the source called it off"
    return Failure("unknown", f"{reason}; images are kept") if keep else Failure("failed", reason)


def write_images(images_dir: Path, parts: Iterable[pb.ImagePart]) -> None:
    """Write images by name into `images_dir`, mode 0600; names that lead elsewhere are refused."""
    for part in parts:
        if not _IMAGE_NAME.fullmatch(part.name):
            raise DestinationError(f"malformed image name {part.name[:80]!r}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        flags |= os.O_APPEND if part.more else os.O_TRUNC
        try:
            with os.fdopen(os.open(images_dir / part.name, flags, 0o600), "wb") as file:
                file.write(part.data)
        except OSError as error:
            raise DestinationError(f"cannot write {part.name}: {error.strerror}") from error
