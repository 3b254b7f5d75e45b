"""The agent as its client sees it: the calls of phaul.proto with deadlines, errors, heartbeat."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import grpc

from phaul_runtime import __version__
from phaul_runtime.cutover.cutover import Held, Running
from phaul_runtime.cutover.states import Role, Settled, Standing, State, Verdict
from phaul_runtime.engine.findings import Finding
from phaul_runtime.engine.targets import FileFact, FileVerdict
from phaul_runtime.errors import Cancelled, ChannelError, MigrationFailed, PhaulError, StillUnderWay
from phaul_runtime.files.staged_files import FilePart
from phaul_runtime.library.api import PhaulRemote
from phaul_runtime.memory.image_dirs import image_files
from phaul_runtime.rpc import phaul_pb2 as pb
from phaul_runtime.rpc import phaul_pb2_grpc
from phaul_runtime.rpc.codec import (
    fact_to_wire,
    finding_from_wire,
    from_wire,
    part_to_wire,
    verdict_from_wire,
)
from phaul_runtime.rpc.protocol import MAX_MESSAGE, PROTOCOL, VERSION_KEY
from phaul_runtime.system.cancel import Cancellation
from phaul_runtime.transport.base import Channel
from phaul_runtime.transport.preamble import PAGES

_Reply = TypeVar("_Reply", bound=Any)
_MESSAGE = MAX_MESSAGE // 2
_RETRY_S = 0.5
# An agent may wait for who still works on a migration; more often it is asked again.
_LOOK_S = 20.0
# For the reason of a failure that is certain already.
_ASK_S = 5.0
_VERSION = ((VERSION_KEY, str(PROTOCOL)),)


class RemoteAgent(PhaulRemote):
    """One agent, and at most one migration with it.

    Args:
        channel: open; closed by its owner.
        call_s: deadline of an ordinary call, seconds.
        prepare_s: deadline of files and restore.
        commit_s: how long a commit repeats itself while the channel is down.
        cancellation: a request cuts a call short.
    """

    def __init__(
        self,
        channel: Channel,
        *,
        call_s: float,
        prepare_s: float,
        commit_s: float,
        cancellation: Cancellation,
    ) -> None:
        self.name = channel.name
        self._channel = channel
        self._call_s = call_s
        self._prepare_s = prepare_s
        self._commit_s = commit_s
        self._cancellation = cancellation
        self._grpc = grpc.insecure_channel(
            channel.control_target(),
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE),
                # The name in the target is a path, of no use as an authority.
                ("grpc.default_authority", "phaul-runtime"),
                ("grpc.enable_http_proxy", 0),
            ],
        )
        self._stub = phaul_pb2_grpc.AgentStub(self._grpc)
        self._id = ""
        self._silent: ChannelError | None = None
        self._when_silent: list[Callable[[ChannelError], object]] = []
        self._beating = threading.Event()
        self.lost = False
        """The last call got no answer."""

    def close(self) -> None:
        """End the heartbeat and the control channel; idempotent."""
        self._beating.set()
        self._grpc.close()

    # -- calls -----------------------------------------------------------------------------

    def _call(
        self,
        method: Callable[..., Any],
        request: Any,
        timeout_s: float,
        *,
        cancellable: bool = True,
    ) -> Any:
        self.lost = True
        try:
            future = method(request, timeout=timeout_s, metadata=_VERSION)
        except ValueError as error:
            raise ChannelError("the control channel is closed", host=self.name) from error
        try:
            if cancellable:
                with self._cancellation.interrupt_with(lambda: _ignore(future.cancel())):
                    reply = future.result()
            else:
                reply = future.result()
        except grpc.FutureCancelledError as error:
            if cancellable and self._cancellation.requested:
                raise Cancelled("cancelled; the source's copy runs on") from error
            raise ChannelError("the agent gives no sign of life", host=self.name) from error
        except Cancelled:
            future.cancel()
            raise
        except grpc.RpcError as error:
            raise self._channel_error(error) from error
        self.lost = False
        if reply.HasField("error"):
            raise from_wire(reply.error, self.name)
        return reply

    def _channel_error(self, error: grpc.RpcError) -> ChannelError:
        # grpc's errors are calls as well, which its types do not say.
        call: Any = error
        code, said = call.code(), call.details()
        trouble = self._channel.trouble()
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            text = "the agent did not answer in time"
        else:
            text = f"the control channel broke: {said}"
        return ChannelError(text, host=self.name, log=[trouble] if trouble else [])

    def hello(self) -> pb.HostFacts:
        """Exchange versions; returns the destination's facts.

        Raises:
            Refused: the two versions do not speak with each other.
        """
        request = pb.HelloRequest(version=__version__)
        facts: pb.HostFacts = self._call(self._stub.Hello.future, request, self._call_s).facts
        return facts

    def check(
        self, request: pb.CheckRequest, files: Iterable[FileFact] = ()
    ) -> tuple[list[Finding], list[FileVerdict]]:
        """Hold a target against the destination; changes nothing there.

        Returns:
            What was found, and which of `files` differ.
        """
        request.files.extend(map(fact_to_wire, files))
        reply: pb.CheckReply = self._call(self._stub.Check.future, request, self._prepare_s)
        return [*map(finding_from_wire, reply.findings)], [*map(verdict_from_wire, reply.files)]

    def open(
        self,
        migration_id: str,
        *,
        engine: str,
        target: str,
        manifest: Mapping[str, Any],
        options: Mapping[str, Any],
        lost_s: float,
        log_level: int,
        restore: str,
        page_format: int,
        post_copy: bool = False,
        memory: int = 0,
        late_memory: int = 0,
        page_server: str = "",
    ) -> dict[str, str]:
        """Begin a migration; from now on the agent expects a heartbeat (`beat_every`).

        Args:
            memory: bytes that will come before the freeze and in it, about.
            late_memory: bytes that will come after the commit, about.

        Returns:
            Where each tree lies there, by name.
        """
        request = pb.OpenRequest(
            id=migration_id,
            engine=engine,
            target=target,
            source=socket.gethostname(),
            manifest=json.dumps(dict(manifest)).encode(),
            options=json.dumps(dict(options)).encode(),
            lost_s=lost_s,
            commit_s=self._prepare_s + self._commit_s,
            criu_log_level=log_level,
            restore=restore,
            post_copy=post_copy,
            memory=memory,
            late_memory=late_memory,
            page_server=page_server,
            page_format=page_format,
        )
        reply: pb.OpenReply = self._call(self._stub.Open.future, request, self._call_s)
        self._id = migration_id
        return _by_name(reply.trees)

    def _ref(self) -> pb.MigrationRef:
        return pb.MigrationRef(id=self._id)

    def beat_every(
        self,
        period_s: float,
        lost_s: float,
        on_bytes: Callable[[int], None],
    ) -> None:
        """Send signs of life from a thread until `close`.

        Args:
            period_s: between two of them.
            lost_s: an agent that has not answered for so long is lost: every call fails then.
            on_bytes: told how much has arrived.
        """

        def beat() -> None:
            heard = time.monotonic()
            while not self._beating.wait(period_s):
                try:
                    reply = self._stub.Beat(self._ref(), timeout=lost_s, metadata=_VERSION)
                except (grpc.RpcError, ValueError):
                    if time.monotonic() - heard > lost_s and not self._beating.is_set():
                        self._silent = ChannelError(
                            "the agent gives no sign of life", host=self.name
                        )
                        self._grpc.close()
                        for tell in tuple(self._when_silent):
                            tell(self._silent)
                        return
                    continue
                heard = time.monotonic()
                if not reply.HasField("error"):
                    on_bytes(reply.bytes)

        threading.Thread(target=beat, name="heartbeat", daemon=True).start()

    def when_silent(self, tell: Callable[[ChannelError], object]) -> None:
        """Have `tell` called once the agent is lost; at once if it is lost already."""
        self._when_silent.append(tell)
        if self._silent is not None:
            tell(self._silent)

    # -- recovery --------------------------------------------------------------------------

    def look(self, migration_id: str, wait_s: float) -> dict[Role, Standing]:
        """How the ends of a migration stand there.

        Raises:
            StillUnderWay: somebody still works on one after `wait_s` seconds.
        """
        reply = self._looked(migration_id, time.monotonic() + wait_s)
        ends = {Role.SOURCE: reply.source, Role.DESTINATION: reply.destination}
        return {
            role: Standing(State(end.state), end.alive, end.held)
            for role, end in ends.items()
            if end.state
        }

    def _looked(self, migration_id: str, deadline: float) -> pb.LookReply:
        """An agent waits a while for a process that works on it; then it is asked again."""
        while True:
            left = max(0.0, deadline - time.monotonic())
            wait_s = min(left, _LOOK_S)
            request = pb.LookRequest(id=migration_id, wait_s=wait_s)
            try:
                reply: pb.LookReply = self._call(
                    self._stub.Look.future, request, wait_s + self._call_s
                )
            except StillUnderWay:
                if left <= _LOOK_S:
                    raise
                time.sleep(_RETRY_S)
            else:
                return reply

    def settle(self, migration_id: str, role: Role, verdict: Verdict) -> Settled:
        """Settle an end there."""
        request = pb.SettleRequest(id=migration_id, role=role.value, verdict=verdict.value)
        reply: pb.SettleReply = self._call(
            self._stub.Settle.future, request, self._prepare_s, cancellable=False
        )
        missing = reply.missing if reply.post_copy else None
        return Settled(reply.pid, tuple(reply.warnings), missing)

    # -- PhaulRemote -----------------------------------------------------------------------

    def start_iter(self) -> None:
        self._call(self._stub.StartIter.future, pb.StartIterRequest(id=self._id), self._call_s)

    def start_local(self) -> dict[str, bytes]:
        request = pb.StartIterRequest(id=self._id, local=True)
        reply: pb.StartIterReply = self._call(self._stub.StartIter.future, request, self._call_s)
        return {part.name: part.data for part in reply.parent}

    def stop_iter(self) -> None:
        self._call(self._stub.StopIter.future, self._ref(), self._prepare_s)

    def failure(self) -> PhaulError | None:
        try:
            reply = self._stub.Beat(self._ref(), timeout=_ASK_S, metadata=_VERSION)
        except (grpc.RpcError, ValueError):
            return None
        return from_wire(reply.failure, self.name) if reply.HasField("failure") else None

    # -- files and trees -------------------------------------------------------------------

    def put_files(self, parts: Iterable[FilePart]) -> None:
        """Stage files there."""
        messages = (part_to_wire(part, self._id) for part in parts)
        self._call(self._stub.PutFiles.future, messages, self._prepare_s)

    def open_tree(self, name: str) -> socket.socket:
        """A new connection to rsync there, for a tree.

        Raises:
            ChannelError: it cannot be opened.
        """
        return self._channel.open_stream(self._id, name)

    def arrived(self, name: str) -> dict[str, str]:
        """A tree that goes first is whole; returns where each tree lies there from now on."""
        request = pb.ArrivedRequest(id=self._id, name=name)
        reply: pb.ArrivedReply = self._call(self._stub.Arrived.future, request, self._prepare_s)
        return _by_name(reply.trees)

    def tree_failure(self, name: str) -> PhaulError | None:
        """Why the last stream of a tree failed, where the agent knows a reason."""
        try:
            reply = self._stub.Beat(self._ref(), timeout=_ASK_S, metadata=_VERSION)
        except ValueError:
            return ChannelError("the agent gives no sign of life", host=self.name)
        except grpc.RpcError as error:
            return self._channel_error(error)
        found = [failure.error for failure in reply.trees if failure.name == name]
        return from_wire(found[0], self.name) if found else None

    # -- the cut-over ----------------------------------------------------------------------

    def prepare(self, images_dir: Path) -> tuple[Held, int]:
        """Send the images, restore, hold; returns the answer and the bytes sent."""
        *first, last = in_messages(self._id, images_dir)
        if first:
            self._call(self._stub.PutImages.future, iter(first), self._prepare_s)
        reply: pb.PrepareReply = self._call(self._stub.Prepare.future, last, self._prepare_s)
        sent = sum(len(part.data) for message in (*first, last) for part in message.parts)
        return Held(reply.pid, reply.restore_ms, reply.images_ms, reply.full_because), sent

    def commit(self) -> Running:
        """Let the held copy run; idempotent, repeats itself while the channel allows."""
        deadline = time.monotonic() + self._commit_s
        while True:
            try:
                reply: pb.CommitReply = self._call(
                    self._stub.Commit.future, self._ref(), self._commit_s, cancellable=False
                )
            except ChannelError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_S)
            else:
                return Running(reply.pid, reply.since_resume_ms, reply.resume_ms)

    def take_up(self, migration_id: str) -> None:
        """Speak of a migration that this agent has settled, and still works on."""
        self._id = migration_id

    def answers(self) -> bool:
        """Whether it still has the migration."""
        if self._silent is not None:
            return False
        try:
            reply = self._stub.Beat(self._ref(), timeout=_ASK_S, metadata=_VERSION)
        except (grpc.RpcError, ValueError):
            return False
        return not reply.HasField("error")

    def open_pages(self) -> socket.socket:
        """A new page channel of a post-copy move.

        Raises:
            ChannelError: it cannot be opened.
        """
        return self._channel.open_stream(self._id, PAGES)

    def filled(self) -> pb.FilledReply:
        """How far the pager of the copy that runs is; raises if its pages are lost."""
        reply: pb.FilledReply = self._call(
            self._stub.Filled.future, self._ref(), self._call_s, cancellable=False
        )
        return reply

    def abort(self) -> bool:
        """Discard the migration at the destination; True if it confirmed. Idempotent.

        One that was not opened is none, unless nobody lived to say so.
        """
        if not self._id:
            return not self.lost
        try:
            self._call(self._stub.Abort.future, self._ref(), self._call_s, cancellable=False)
        except PhaulError:
            return False
        return True


def in_messages(migration_id: str, images_dir: Path) -> list[pb.ImageParts]:
    """A dump's small images, in as few messages as hold them: each takes its time in the freeze.

    Raises:
        MigrationFailed: one cannot be read.
    """
    messages, room = [pb.ImageParts(id=migration_id)], _MESSAGE
    for path in image_files(images_dir):
        try:
            data, more = path.read_bytes(), False
        except OSError as error:
            raise MigrationFailed(f"cannot read the image {path}: {error.strerror}") from error
        while data or not more:
            if not room:
                messages.append(pb.ImageParts(id=migration_id))
                room = _MESSAGE
            part = data[:room]
            messages[-1].parts.add(name=path.name, data=part, more=more)
            data, more, room = data[len(part) :], True, room - len(part)
    return messages


def _by_name(places: Iterable[pb.TreePlace]) -> dict[str, str]:
    return {place.name: os.fsdecode(place.path) for place in places}


def _ignore(_value: object) -> None:
    """An interrupt returns nothing."""
