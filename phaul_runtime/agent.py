"""The destination's service: control by gRPC, memory by a stream socket, both unix sockets.

Whoever may open the sockets may restore processes as root: they lie in a directory of mode 0700,
and are reached from other hosts only through ssh, or through the port of `front`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import grpc

from phaul_runtime import __version__, cgroup, logs
from phaul_runtime.checks import check_cpu, check_hooks, check_space
from phaul_runtime.criu import Criu
from phaul_runtime.engine import REFUSED, Finding, load_engine
from phaul_runtime.errors import DestinationError, PhaulError, Refused
from phaul_runtime.filesystem import compare
from phaul_runtime.hostfacts import PROTOCOL, gather_facts
from phaul_runtime.incoming import CANNOT_BE_LAZY, Incoming, checked_json
from phaul_runtime.journal import KEPT, checked_id, forget_old, lock_directory
from phaul_runtime.lifecycle import Hooks, Move
from phaul_runtime.rpc import phaul_pb2 as pb
from phaul_runtime.rpc import phaul_pb2_grpc
from phaul_runtime.settle import Settler
from phaul_runtime.states import Role, Settled, State, Verdict
from phaul_runtime.transport.image_proxy import restored
from phaul_runtime.wire import (
    CONTROL,
    ID_BYTES,
    MAX_MESSAGE,
    MEMORY,
    PAGES,
    VERSION_KEY,
    ZSTD,
    to_wire,
)

log = logging.getLogger(__name__)

# Started as they are needed; a service may have many restores under way, and each keeps one.
_WORKERS = 64
_WATCH_S = 1.0
_PREAMBLE_S = 10.0
_STOP_S = 5.0
# An agent that nobody has called for so long, and that holds nothing, has lost its client.
_IDLE_S = 900.0
# What is over can still be asked for that long after its client's last sign of life.
_REMEMBERED_S = 900.0

_Reply = TypeVar("_Reply", bound=Any)


def _answers(
    reply: Callable[..., _Reply],
) -> Callable[[Callable[..., _Reply | None]], Callable[..., _Reply]]:
    """Turn a handler's exceptions into its reply's `error`: an agent does not die of a request."""

    def decorate(handler: Callable[..., _Reply | None]) -> Callable[..., _Reply]:
        @functools.wraps(handler)
        def answer(*args: Any) -> _Reply:
            args[0].heard = time.monotonic()
            logs.enter(getattr(args[1], "id", ""))
            try:
                _require_protocol(args[2])
                return handler(*args) or reply()
            except PhaulError as error:
                return reply(error=to_wire(error))
            except Exception as error:
                log.exception("%s failed", handler.__name__)
                return reply(error=to_wire(error))

        return answer

    return decorate


def _require_protocol(context: grpc.ServicerContext) -> None:
    """Refuse a client that speaks another version, whatever it asks for."""
    told = dict(context.invocation_metadata())
    spoken = told.get(VERSION_KEY, "none")
    if spoken != str(PROTOCOL):
        raise Refused(
            f"phaul-runtime {__version__} speaks protocol {PROTOCOL}, the client speaks {spoken!r}",
            hint="install the same version on both hosts",
        )


class AgentService(phaul_pb2_grpc.AgentServicer):
    """The calls of phaul.proto."""

    def __init__(
        self, workdir: Path, state_dir: Path, criu: Criu, hooks: Hooks, *, history: int = KEPT
    ) -> None:
        self._workdir = workdir
        self._history = history
        self._hooks = hooks
        self._state_dir = state_dir
        self._criu = criu
        self._settler = Settler(state_dir, workdir, criu, hooks)
        self.heard = time.monotonic()
        self._migrations: dict[str, Incoming] = {}
        self._opening: set[str] = set()
        self._closed = False
        self._lock = threading.Lock()

    def find(self, migration_id: str) -> Incoming:
        """The migration with that id; raises DestinationError if there is none."""
        with self._lock:
            found = self._migrations.get(checked_id(migration_id))
        if found is None:
            raise DestinationError(f"no migration {migration_id}")
        return found

    def all(self) -> list[Incoming]:
        """All migrations of this agent."""
        with self._lock:
            return list(self._migrations.values())

    def close(self) -> list[Incoming]:
        """Open no more; returns all migrations. One that opens just now is put away by itself."""
        with self._lock:
            self._closed = True
            return list(self._migrations.values())

    def forget(self, silent_s: float) -> None:
        """Drop what is over, and whose client has been silent for so long."""
        with self._lock:
            for migration in list(self._migrations.values()):
                silent = time.monotonic() - migration.seen
                if migration.over and silent > silent_s and migration.wait_settled(0):
                    del self._migrations[migration.id]

    @_answers(pb.HelloReply)
    def Hello(self, request: pb.HelloRequest, _context: object) -> pb.HelloReply:  # noqa: D102, N802
        facts = gather_facts(str(self._workdir), str(self._state_dir), self._criu)
        return pb.HelloReply(protocol=PROTOCOL, facts=facts)

    @_answers(pb.CheckReply)
    def Check(self, request: pb.CheckRequest, _context: object) -> pb.CheckReply:  # noqa: D102, N802
        findings: list[Finding] = []
        if request.engine:
            engine = load_engine(request.engine)
            move = Move(
                request.id, Role.DESTINATION, request.engine, request.target, request.source
            )
            findings.extend(check_hooks(self._hooks, move))
            half = engine.destination(engine.options_model(), criu_log_level=4, hold_s=1.0)
            manifest = checked_json(request.manifest, "manifest")
            findings.extend(half.check({**manifest, "same_host": request.same_host}))
            if request.restore == "lazy" and not half.can_be_lazy:
                findings.append(Finding("lazy-pages", REFUSED, CANNOT_BE_LAZY, "--restore auto"))
        if request.memory:
            facts = gather_facts(str(self._workdir), str(self._state_dir), self._criu)
            findings.append(check_space(facts, request.memory))
        if request.cpuinfo:
            findings.append(check_cpu(str(self._workdir), self._criu, request.cpuinfo))
        return pb.CheckReply(
            findings=[
                pb.Finding(check=f.check, level=f.level, text=f.text, hint=f.hint) for f in findings
            ],
            files=compare(request.files),
        )

    @_answers(pb.OpenReply)
    def Open(self, request: pb.OpenRequest, _context: object) -> pb.OpenReply:  # noqa: D102, N802
        with self._lock:
            if checked_id(request.id) in {*self._migrations, *self._opening}:
                raise DestinationError(f"migration {request.id} is open already")
            self._opening.add(request.id)
        try:
            # It may take its time, in which others are served.
            incoming = Incoming.open(
                request, self._workdir, self._state_dir, self._criu, self._hooks
            )
            self._take_up(incoming)
        finally:
            with self._lock:
                self._opening.discard(request.id)
        forget_old(self._state_dir, self._history)
        return pb.OpenReply(trees=_places(incoming))

    @_answers(pb.ArrivedReply)
    def Arrived(self, request: pb.ArrivedRequest, _context: object) -> pb.ArrivedReply:  # noqa: D102, N802
        incoming = self.find(request.id)
        incoming.arrived(request.name)
        return pb.ArrivedReply(trees=_places(incoming))

    @_answers(pb.StartIterReply)
    def StartIter(self, request: pb.StartIterRequest, _context: object) -> pb.StartIterReply:  # noqa: D102, N802
        migration = self.find(request.id)
        if not request.local:
            migration.start_iter()
            return pb.StartIterReply()
        maps = migration.start_local()
        return pb.StartIterReply(
            parent=[pb.ImagePart(name=name, data=data) for name, data in maps.items()]
        )

    @_answers(pb.Done)
    def StopIter(self, request: pb.MigrationRef, _context: object) -> None:  # noqa: D102, N802
        self.find(request.id).stop_iter()

    @_answers(pb.Done)
    def PutFiles(self, request: Iterator[pb.FilePart], _context: object) -> None:  # noqa: D102, N802
        first = next(request, None)
        if first is not None:
            self.find(first.id).put_files(_chain(first, request))

    @_answers(pb.Done)
    def PutImages(self, request: Iterator[pb.ImageParts], _context: object) -> None:  # noqa: D102, N802
        first = next(request, None)
        if first is not None:
            self.find(first.id).put_images(_chain(first, request))

    @_answers(pb.PrepareReply)
    def Prepare(self, request: pb.ImageParts, _context: object) -> pb.PrepareReply:  # noqa: D102, N802
        return self.find(request.id).prepare(request.parts)

    @_answers(pb.CommitReply)
    def Commit(self, request: pb.MigrationRef, _context: object) -> pb.CommitReply:  # noqa: D102, N802
        return self.find(request.id).commit()

    @_answers(pb.Done)
    def Abort(self, request: pb.MigrationRef, _context: object) -> None:  # noqa: D102, N802
        self.find(request.id).abort()

    @_answers(pb.FilledReply)
    def Filled(self, request: pb.MigrationRef, _context: object) -> pb.FilledReply:  # noqa: D102, N802
        incoming = self.find(request.id)
        if incoming.full_because:
            return pb.FilledReply(over=True, full_because=incoming.full_because)
        now = incoming.filled()
        return pb.FilledReply() if now is None else pb.FilledReply(**asdict(now))

    @_answers(pb.BeatReply)
    def Beat(self, request: pb.MigrationRef, _context: object) -> pb.BeatReply:  # noqa: D102, N802
        return self.find(request.id).beat()

    @_answers(pb.LookReply)
    def Look(self, request: pb.LookRequest, _context: object) -> pb.LookReply:  # noqa: D102, N802
        reply = pb.LookReply()
        mine = self._running(request.id)
        for role, end in ((Role.SOURCE, reply.source), (Role.DESTINATION, reply.destination)):
            if mine is not None and role is Role.DESTINATION:
                end.CopyFrom(pb.End(state=mine.state.value))
                continue
            standing = self._settler.look(request.id, role, wait_s=request.wait_s)
            if standing is not None:
                end.CopyFrom(
                    pb.End(state=standing.state.value, alive=standing.alive, held=standing.held)
                )
        return reply

    @_answers(pb.SettleReply)
    def Settle(self, request: pb.SettleRequest, _context: object) -> pb.SettleReply:  # noqa: D102, N802
        try:
            role, verdict = Role(request.role), Verdict(request.verdict)
        except ValueError as error:
            raise DestinationError(f"malformed request: {error}") from error
        mine = self._running(request.id)
        if mine is not None and (role, verdict) == (Role.DESTINATION, Verdict.RUN):
            mine.seen = time.monotonic()
            settled = Settled(mine.commit().pid, missing=mine.missing)
        else:
            settled = self._settler.settle(request.id, role, verdict, self._take_up)
        return pb.SettleReply(
            pid=settled.pid,
            warnings=settled.warnings,
            post_copy=settled.missing is not None,
            missing=settled.missing or 0,
        )

    def _running(self, migration_id: str) -> Incoming | None:
        """A copy of this agent's own that misses pages: its client has come back."""
        with self._lock:
            found = self._migrations.get(migration_id)
        if found is None or found.given_up or found.state is not State.POST_COPY:
            return None
        return found

    def _take_up(self, incoming: Incoming) -> None:
        """One that was opened, or a copy that runs and misses pages, which its source will bring.

        Raises:
            DestinationError: this agent ends.
        """
        with self._lock:
            if not self._closed:
                self._migrations[incoming.id] = incoming
                return
        incoming.abort(client_lost=True)
        raise DestinationError("the agent ends")


def _places(incoming: Incoming) -> list[pb.TreePlace]:
    return [
        pb.TreePlace(name=name, path=os.fsencode(path)) for name, path in incoming.places.items()
    ]


def _chain(first: _Reply, rest: Iterator[_Reply]) -> Iterator[_Reply]:
    yield first
    yield from rest


class Agent:
    """Sockets, threads and the watch over lost clients around an `AgentService`.

    Args:
        sockets: directory for the two sockets; created with mode 0700, removed by `stop`.
        workdir: private directory for images, one below it for each migration.
        state_dir: of the journals.
        criu: a session factory.
        hooks: of this host.
        on_lost: called once a client was given up: what was started for it may end.
        history: how many settled migrations are remembered.
    """

    def __init__(
        self,
        sockets: Path,
        workdir: Path,
        state_dir: Path,
        criu: Criu,
        *,
        on_lost: Callable[[], object] = lambda: None,
        hooks: Hooks | None = None,
        history: int = KEPT,
    ) -> None:
        self._sockets = sockets
        self._on_lost = on_lost
        self.service = AgentService(workdir, state_dir, criu, hooks or Hooks(), history=history)
        self._made = False
        self._lock = -1
        self._workdir = workdir
        self._server = grpc.server(
            futures.ThreadPoolExecutor(_WORKERS, thread_name_prefix="call"),
            options=[("grpc.max_receive_message_length", MAX_MESSAGE)],
        )
        phaul_pb2_grpc.add_AgentServicer_to_server(self.service, self._server)
        self._stopping = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def start(self) -> None:
        """Listen on both sockets.

        Raises:
            Refused: the directories cannot be made or the sockets not be bound; nothing is left.
        """
        try:
            self._workdir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._sockets.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._sockets.mkdir(mode=0o700)
            self._made = True
            self._lock = lock_directory(self._sockets)
            self._listener.bind(str(self._sockets / MEMORY))
            self._listener.listen()
            self._server.add_insecure_port(f"unix:{self._sockets / CONTROL}")
        except (OSError, RuntimeError) as error:
            self._leave()
            raise Refused(f"cannot listen in {self._sockets}: {error}") from error
        # Of trees and pagers that ended while no agent was there.
        cgroup.sweep()
        self._server.start()
        threading.Thread(target=self._accept, name="accept", daemon=True).start()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def stop(self, *, settle_within_s: float | None = None) -> None:
        """Discard what was not committed, and go; what was committed runs on. Idempotent.

        Args:
            settle_within_s: how long to wait for pagers whose copies still miss pages, to put away
                the images after them; None for as long as it takes. A pager goes on by itself.
        """
        self._stopping.set()
        for migration in self.service.close():
            migration.abort(client_lost=True)
        self._server.stop(_STOP_S).wait(_STOP_S)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._leave()
        deadline = time.monotonic() + (settle_within_s or 0)
        for migration in self.service.all():
            left = None if settle_within_s is None else max(0.0, deadline - time.monotonic())
            if not migration.wait_settled(left):
                log.warning("%s: left to its pager; its images are put away later", migration.id)

    def _leave(self) -> None:
        """Give up the sockets and their directory; idempotent."""
        self._listener.close()
        if self._made:
            shutil.rmtree(self._sockets, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                channel, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self.take_stream, args=(channel,), daemon=True).start()

    def take_stream(self, channel: socket.socket) -> None:
        """Hand a connection to the migration that it names: for memory, a tree, or late pages.

        Returns once it is handed over, or has ended; never raises.
        """
        try:
            deadline = time.monotonic() + _PREAMBLE_S
            name = b""
            while len(name) < ID_BYTES:
                channel.settimeout(max(0.001, deadline - time.monotonic()))
                data = channel.recv(ID_BYTES - len(name))
                if not data:
                    raise DestinationError("the memory channel closed before it named a migration")
                name += data
            channel.settimeout(None)
            words = name.decode("ascii", "replace").split()
            migration = self.service.find(words.pop(0) if words else "")
            if words[-1:] == [ZSTD]:
                words.pop()
                try:
                    channel = restored(channel)
                except Refused as error:
                    migration.refuse_memory(error)
                    raise
            tree = " ".join(words)
            if tree == PAGES:
                migration.serve_pages(channel)
            elif tree:
                migration.serve_tree(tree, channel)
            else:
                migration.connect_memory(channel)
        except (OSError, PhaulError) as error:
            log.warning("memory channel refused: %s", error)
            channel.close()
        except Exception:
            log.exception("memory channel failed")
            channel.close()

    def _watch(self) -> None:
        """Discard the migrations whose client is gone."""
        while not self._stopping.wait(_WATCH_S):
            for migration in self.service.all():
                silent = time.monotonic() - migration.seen
                if silent > migration.lost_s and not migration.over:
                    log.warning(
                        "no sign of its client for %.0f s",
                        silent,
                        extra={"migration": migration.id},
                    )
                    migration.abort(client_lost=True)
                    self._on_lost()
            self.service.forget(_REMEMBERED_S)
            if time.monotonic() - self.service.heard > _IDLE_S:
                self._on_lost()
