"""The calls of phaul.proto, as the destination's agent answers them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import grpc

from phaul_runtime.agent.answers import answers
from phaul_runtime.agent.streams import Streams
from phaul_runtime.agent.turnstile import Turnstile
from phaul_runtime.bounds import LONGEST_S, bounded, plain_text
from phaul_runtime.config.peers import NOBODY, OWNER, Allowed, Callers, Peer
from phaul_runtime.criu.session import Criu
from phaul_runtime.cutover.journal import (
    KEPT,
    checked_id,
    forget_old,
    read_records,
    replay,
)
from phaul_runtime.cutover.states import Role, Settled, Standing, State, Verdict
from phaul_runtime.destination.copy import CANNOT_BE_LAZY
from phaul_runtime.destination.incoming import Incoming
from phaul_runtime.destination.requests import checked_json
from phaul_runtime.engine.findings import REFUSED, Finding
from phaul_runtime.engine.interface import Claim, DestinationHalf, Engine
from phaul_runtime.errors import DestinationError, Refused, StillUnderWay
from phaul_runtime.files.compare import compare
from phaul_runtime.hooks.lifecycle import Hooks, Move
from phaul_runtime.preflight.checks import check_cpu, check_hooks, check_space
from phaul_runtime.preflight.wiring import STANDARD, Wiring
from phaul_runtime.recovery.resolve import Settler
from phaul_runtime.rpc import phaul_pb2 as pb
from phaul_runtime.rpc import phaul_pb2_grpc
from phaul_runtime.rpc.codec import (
    fact_from_wire,
    finding_to_wire,
    part_from_wire,
    to_wire,
    verdict_to_wire,
)
from phaul_runtime.rpc.protocol import PROTOCOL

Context = grpc.ServicerContext

# Workers that one client gets, of `server.WORKERS`.
SHARE = 256
# A stream from which nothing has come for so long has ended.
_SILENT_STREAM_S = 60.0
# A worker waits no longer for who still works on a migration; who asks may ask again.
_LOOK_S, _LOOK_AGAIN_S = 30.0, 1.0


class AgentService(phaul_pb2_grpc.AgentServicer):
    """The calls of phaul.proto.

    Args:
        workdir: private directory for images.
        state_dir: of the journals.
        criu: a session factory.
        hooks: of this host.
        history: how many settled migrations are remembered.
        callers: who is behind a connection.
        allowed: who may send what.
        wiring: what migrations are made with.
    """

    def __init__(
        self,
        workdir: Path,
        state_dir: Path,
        criu: Criu,
        hooks: Hooks,
        *,
        history: int = KEPT,
        callers: Callers | None = None,
        allowed: Allowed | None = None,
        wiring: Wiring = STANDARD,
    ) -> None:
        self._wiring = wiring
        self.turnstile = Turnstile(SHARE)
        self.streams = Streams(_SILENT_STREAM_S)
        self._callers = callers or Callers(workdir)
        self._allowed = allowed or Allowed()
        self._workdir = workdir
        self._history = history
        self._hooks = hooks
        self._state_dir = state_dir
        self._criu = criu
        self._settler = Settler(state_dir, workdir, criu, hooks, engines=wiring.engine)
        self.heard = time.monotonic()
        self._migrations: dict[str, Incoming] = {}
        self._opening: set[str] = set()
        self._closed = False
        self._lock = threading.Lock()

    def who(self, context: Context) -> Peer:
        """Whose call it is."""
        return self._callers.of(str(context.peer()))

    def find(self, migration_id: str, peer: Peer = NOBODY) -> Incoming:
        """The migration with that id, if it belongs to the peer.

        Raises:
            DestinationError: there is none.
            Refused: it is another one's.
        """
        with self._lock:
            found = self._migrations.get(checked_id(migration_id))
        if found is None:
            raise DestinationError(f"no migration {migration_id}")
        peer.require(migration_id, found.owner)
        return found

    def _of(self, migration_id: str, context: Context) -> Incoming:
        return self.find(migration_id, self.who(context))

    def _require_ends(self, migration_id: str, peer: Peer) -> None:
        """Refuse a peer that does not own every end of a migration that this host has."""
        if not peer.certificate:
            return
        for role in Role:
            _, facts = replay(read_records(self._state_dir, migration_id, role))
            if facts:
                peer.require(migration_id, str(facts.get(OWNER, "")))

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

    @answers(pb.HelloReply)
    def Hello(self, request: pb.HelloRequest, _context: Context) -> pb.HelloReply:  # noqa: N802
        facts = self._wiring.facts(str(self._workdir), str(self._state_dir), self._criu)
        return pb.HelloReply(protocol=PROTOCOL, facts=facts)

    @answers(pb.CheckReply)
    def Check(self, request: pb.CheckRequest, context: Context) -> pb.CheckReply:  # noqa: N802
        findings: list[Finding] = []
        if request.engine:
            for name, text in (("target", request.target), ("source", request.source)):
                plain_text(name, text)
            move = Move(
                request.id, Role.DESTINATION, request.engine, request.target, request.source
            )
            findings.extend(check_hooks(self._hooks, move))
            half = _arriving(self._wiring.engine(request.engine))
            manifest = checked_json(request.manifest, "manifest")
            try:
                self._allowed.send(self.who(context), request.engine, lambda: half.claim(manifest))
            except Refused as error:
                findings.append(Finding("allowed", REFUSED, error.message, error.hint))
            else:
                findings.extend(half.check({**manifest, "same_host": request.same_host}))
            if request.restore == "lazy" and not half.can_be_lazy:
                findings.append(Finding("lazy-pages", REFUSED, CANNOT_BE_LAZY, "--restore auto"))
        if request.memory:
            facts = self._wiring.facts(str(self._workdir), str(self._state_dir), self._criu)
            findings.append(check_space(facts, request.memory))
        if request.cpuinfo:
            findings.append(check_cpu(str(self._workdir), self._criu, request.cpuinfo))
        return pb.CheckReply(
            findings=map(finding_to_wire, findings),
            files=map(verdict_to_wire, compare(map(fact_from_wire, request.files))),
        )

    @answers(pb.OpenReply)
    def Open(self, request: pb.OpenRequest, context: Context) -> pb.OpenReply:  # noqa: N802
        peer = self.who(context)
        self._require_allowed(peer, request)
        with self._lock:
            if checked_id(request.id) in {*self._migrations, *self._opening}:
                raise DestinationError(f"migration {request.id} is open already")
            self._opening.add(request.id)
        try:
            # It may take its time, in which others are served.
            incoming = Incoming.open(
                request,
                self._workdir,
                self._state_dir,
                self._criu,
                self._hooks,
                owner=peer.certificate,
                engines=self._wiring.engine,
            )
            self._take_up(incoming)
        finally:
            with self._lock:
                self._opening.discard(request.id)
        forget_old(self._state_dir, self._history)
        return pb.OpenReply(trees=_places(incoming))

    def _require_allowed(self, peer: Peer, request: pb.OpenRequest) -> None:
        def claim() -> Claim | None:
            return _arriving(self._wiring.engine(request.engine)).claim(
                checked_json(request.manifest, "manifest")
            )

        self._allowed.send(peer, request.engine, claim)

    @answers(pb.ArrivedReply)
    def Arrived(self, request: pb.ArrivedRequest, context: Context) -> pb.ArrivedReply:  # noqa: N802
        incoming = self._of(request.id, context)
        incoming.arrived(request.name)
        return pb.ArrivedReply(trees=_places(incoming))

    @answers(pb.StartIterReply)
    def StartIter(self, request: pb.StartIterRequest, context: Context) -> pb.StartIterReply:  # noqa: N802
        migration = self._of(request.id, context)
        if not request.local:
            migration.start_iter()
            return pb.StartIterReply()
        maps = migration.start_local()
        return pb.StartIterReply(
            parent=[pb.ImagePart(name=name, data=data) for name, data in maps.items()]
        )

    @answers(pb.Done)
    def StopIter(self, request: pb.MigrationRef, context: Context) -> None:  # noqa: N802
        self._of(request.id, context).stop_iter()

    @answers(pb.Done)
    def PutFiles(self, request: Iterator[pb.FilePart], context: Context) -> None:  # noqa: N802
        with self.streams.moving(request, context) as parts:
            first = next(parts, None)
            if first is not None:
                self._of(first.id, context).put_files(map(part_from_wire, _chain(first, parts)))

    @answers(pb.Done)
    def PutImages(self, request: Iterator[pb.ImageParts], context: Context) -> None:  # noqa: N802
        with self.streams.moving(request, context) as parts:
            first = next(parts, None)
            if first is not None:
                self._of(first.id, context).put_images(_chain(first, parts))

    @answers(pb.PrepareReply)
    def Prepare(self, request: pb.ImageParts, context: Context) -> pb.PrepareReply:  # noqa: N802
        held = self._of(request.id, context).prepare(request.parts)
        return pb.PrepareReply(
            pid=held.pid,
            full_because=held.full_because,
            images_ms=held.images_ms,
            restore_ms=held.restore_ms,
        )

    @answers(pb.CommitReply)
    def Commit(self, request: pb.MigrationRef, context: Context) -> pb.CommitReply:  # noqa: N802
        runs = self._of(request.id, context).commit()
        return pb.CommitReply(
            pid=runs.pid, since_resume_ms=runs.since_resume_ms, resume_ms=runs.resume_ms
        )

    @answers(pb.Done)
    def Abort(self, request: pb.MigrationRef, context: Context) -> None:  # noqa: N802
        self._of(request.id, context).abort()

    @answers(pb.FilledReply)
    def Filled(self, request: pb.MigrationRef, context: Context) -> pb.FilledReply:  # noqa: N802
        incoming = self._of(request.id, context)
        if incoming.copy.lazy.why_not:
            return pb.FilledReply(over=True, full_because=incoming.copy.lazy.why_not)
        now = incoming.filling.now()
        return pb.FilledReply() if now is None else pb.FilledReply(**asdict(now))

    @answers(pb.BeatReply)
    def Beat(self, request: pb.MigrationRef, context: Context) -> pb.BeatReply:  # noqa: N802
        incoming = self._of(request.id, context)
        incoming.seen = time.monotonic()
        failure = incoming.server.failure if incoming.server else None
        return pb.BeatReply(
            bytes=incoming.server.received if incoming.server else 0,
            state=incoming.state.value,
            failure=to_wire(failure) if failure else None,
            trees=[
                pb.TreeFailure(name=name, error=to_wire(error))
                for name, error in incoming.carried.failures.items()
            ],
        )

    @answers(pb.LookReply)
    def Look(self, request: pb.LookRequest, context: Context) -> pb.LookReply:  # noqa: N802
        wait_s = bounded("wait_s", request.wait_s, 0, LONGEST_S)
        peer = self.who(context)
        self._require_ends(request.id, peer)
        reply = pb.LookReply()
        mine = self._running(request.id)
        deadline = time.monotonic() + min(wait_s, _LOOK_S)
        for role, end in ((Role.SOURCE, reply.source), (Role.DESTINATION, reply.destination)):
            if mine is not None and role is Role.DESTINATION:
                end.CopyFrom(pb.End(state=mine.state.value))
                continue
            standing = self._look(request.id, role, deadline, context)
            if standing is not None:
                end.CopyFrom(
                    pb.End(state=standing.state.value, alive=standing.alive, held=standing.held)
                )
        return reply

    def _look(
        self, migration_id: str, role: Role, deadline: float, context: Context
    ) -> Standing | None:
        """As `Settler.look`; nothing is waited for on behalf of a client that has left."""
        while True:
            left = deadline - time.monotonic()
            try:
                return self._settler.look(migration_id, role, wait_s=min(left, _LOOK_AGAIN_S))
            except StillUnderWay:
                if left <= _LOOK_AGAIN_S or not context.is_active():
                    raise

    @answers(pb.SettleReply)
    def Settle(self, request: pb.SettleRequest, context: Context) -> pb.SettleReply:  # noqa: N802
        try:
            role, verdict = Role(request.role), Verdict(request.verdict)
        except ValueError as error:
            raise DestinationError(f"malformed request: {error}") from error
        self._require_ends(request.id, self.who(context))
        mine = self._running(request.id)
        if mine is not None and (role, verdict) == (Role.DESTINATION, Verdict.RUN):
            mine.seen = time.monotonic()
            settled = Settled(mine.commit().pid, missing=mine.copy.missing)
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


def _arriving(found: Engine) -> DestinationHalf:
    """An engine's half here with no options of its own: to ask it, not to move with it."""
    return found.destination(found.options_model(), criu_log_level=4, hold_s=1.0)


def _places(incoming: Incoming) -> list[pb.TreePlace]:
    return [
        pb.TreePlace(name=name, path=os.fsencode(path))
        for name, path in incoming.carried.places.items()
    ]


_Part = TypeVar("_Part")


def _chain(first: _Part, rest: Iterator[_Part]) -> Iterator[_Part]:
    yield first
    yield from rest
