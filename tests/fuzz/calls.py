"""The agent's calls and streams, and what is said to a pager: the real ones, over their sockets."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from pydantic import BaseModel, ConfigDict

from phaul_runtime.agent.server import Agent
from phaul_runtime.criu.page_format import PageFormat
from phaul_runtime.criu.session import Criu
from phaul_runtime.destination import memory_channel
from phaul_runtime.engine import OK, Engine, Finding
from phaul_runtime.errors import DestinationError, PhaulError
from phaul_runtime.memory.fill_plan import FillPlan, Runs
from phaul_runtime.pager import CONTROL_SOCKET, LAZY_SOCKET
from phaul_runtime.pager.client import PagerClient
from phaul_runtime.preflight.wiring import Wiring
from phaul_runtime.rpc import phaul_pb2 as pb
from phaul_runtime.rpc.protocol import MAX_MESSAGE, PROTOCOL, VERSION_KEY
from phaul_runtime.transport.preamble import CONTROL, ID_BYTES, MEMORY
from tests.fuzz.mutation import EDGES, STRINGS, Random, mutated, worse
from tests.fuzz.streams import page_session
from tests.fuzz.target import Target, Uncaught

_WITHIN_S = 30.0
_REPLIES: dict[str, Any] = {
    "Hello": pb.HelloReply, "Check": pb.CheckReply, "Open": pb.OpenReply,
    "Arrived": pb.ArrivedReply, "StartIter": pb.StartIterReply, "StopIter": pb.Done,
    "PutFiles": pb.Done, "PutImages": pb.Done, "Prepare": pb.PrepareReply,
    "Commit": pb.CommitReply, "Abort": pb.Done, "Filled": pb.FilledReply, "Beat": pb.BeatReply,
    "Look": pb.LookReply, "Settle": pb.SettleReply,
}  # fmt: skip
_STREAMED = ("PutFiles", "PutImages")
_IN_ORDER = ("Open", "memory", "StartIter", "pages", "StopIter", "PutFiles", "PutImages", "Prepare")


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Half:
    """A destination's half that makes nothing and runs nothing."""

    can_be_lazy = False
    place = Path("/nonexistent")

    def check(self, manifest: Mapping[str, Any]) -> Sequence[Finding]:
        return [Finding("name", OK, str(manifest)[:100])]

    def prepare(self, manifest: Mapping[str, Any], migration_id: str) -> None:
        if manifest.get("refused"):
            raise DestinationError("refused")

    def trees(self) -> Mapping[str, Path]:
        return {"rootfs": self.place}

    def arrived(self, name: str, cancellation: Any) -> None:
        pass

    def restore(self, *_: Any, **__: Any) -> int:
        raise DestinationError("nothing is restored here")

    def resume(self) -> float:
        raise DestinationError("nothing is held")

    def wait_let_go(self) -> None:
        pass

    def discard(self) -> None:
        pass

    def undo(self) -> None:
        pass


class _Engine:
    options_model = _Options

    def destination(self, *_: Any, **__: Any) -> _Half:
        return _Half()


def _load_engine(name: str) -> Engine:
    if name != "fuzz":
        raise DestinationError(f"no engine {name[:40]!r}")
    return _Engine()  # type: ignore[return-value]


class _Logged(logging.Handler):
    """Exceptions that were logged: nobody expected them."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.found.append(logging.Formatter().format(record)[-1500:])


class Calls(Target):
    """Migrations of the agent: calls out of order, with other fields, with other bytes."""

    name = "calls"
    share = 10

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        _Half.place = root / "tree"
        self._patched = [
            (module, name, getattr(module, name))
            for module, name in (
                (memory_channel, "WITHIN_S"),
            )
        ]  # fmt: skip
        for module, name, _ in self._patched:
            setattr(module, name, 0.05)
        self._sockets = root / "s"
        (root / "files").mkdir()
        self._agent = Agent(
            self._sockets, root / "w", root / "j", Criu("no-such-criu"), history=3,
            wiring=Wiring(engine=_load_engine),
        )  # fmt: skip
        self._agent.start()
        self._channel = grpc.insecure_channel(
            f"unix:{self._sockets / CONTROL}",
            options=[("grpc.max_send_message_length", 2 * MAX_MESSAGE)],
        )
        self._logged = _Logged()
        logging.getLogger("phaul_runtime").addHandler(self._logged)
        self._hook, threading.excepthook = threading.excepthook, self._died

    def _died(self, args: threading.ExceptHookArgs) -> None:
        self._logged.found.append(f"a thread died: {args.exc_type.__name__}: {args.exc_value}")

    def case(self, rng: Random) -> tuple[int, bool]:
        """See `Target`."""
        self._logged.found.clear()
        one = f"{rng.randrange(1 << 63):016x}"
        count = refused = 0
        channels: list[socket.socket] = []
        # In their order first, mostly; then whatever.
        names = [
            "Open",
            "memory",
            "StartIter",
            "pages",
            "StopIter",
            "PutFiles",
            "PutImages",
            "Prepare",
        ]
        names = names[: rng.randrange(1, len(names) + 1)]
        names += rng.choices([*_REPLIES, "memory", "pages", "tree"], k=rng.randrange(6))
        try:
            for name in names:
                if name in ("memory", "tree"):
                    channels.append(self._connect(rng, one, name))
                    count += 1
                elif name == "pages":
                    data, headers = page_session(rng, PageFormat.NARROW)
                    with contextlib.suppress(OSError, IndexError):
                        channels[-1].send(data[:100_000])
                    count += headers
                else:
                    count += 1
                    refused += self._call(rng, name, one)
        finally:
            for channel in channels:
                channel.close()
            self._say("Abort", [pb.MigrationRef(id=one).SerializeToString()], PROTOCOL)
            self._agent.service.forget(0)
        if self._logged.found:
            raise Uncaught(self._logged.found[0])
        return count + 1, not refused

    def _connect(self, rng: Random, one: str, what: str) -> socket.socket:
        words = {"memory": one, "tree": f"{one} rootfs"}[what]
        words = rng.choice((words, words, words, f"{words} +zstd", f"{one} @pages", f"{words} \0"))
        line = words.encode().ljust(ID_BYTES)[:ID_BYTES]
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        channel.connect(str(self._sockets / MEMORY))
        channel.setblocking(False)
        channel.send(mutated(rng, line) if rng.random() < 0.3 else line)
        if what == "tree":
            with contextlib.suppress(OSError):
                channel.send(mutated(rng, b"--server -logDtpAXRre.iLsfxCIvu . rootfs\n"))
        return channel

    def _call(self, rng: Random, name: str, one: str) -> bool:
        messages = [self._request(rng, name, one) for _ in range(rng.choice((1, 1, 2, 0)))]
        if name not in _STREAMED:
            messages = messages[:1] or [b""]
        protocol = PROTOCOL if rng.random() < 0.97 else rng.choice((0, PROTOCOL + 1, 1 << 70))
        return self._say(name, messages, protocol)

    def _say(self, name: str, messages: list[bytes], protocol: int) -> bool:
        """Whether it was refused."""
        metadata = ((VERSION_KEY, str(protocol)),)
        path = f"/phaul.v1.Agent/{name}"
        try:
            # Without serializers: bytes go as they are.
            if name in _STREAMED:
                stream: Any = self._channel.stream_unary(path)
                said = stream(iter(messages), metadata=metadata, timeout=_WITHIN_S)
            else:
                call: Any = self._channel.unary_unary(path)
                said = call(messages[0], metadata=metadata, timeout=_WITHIN_S)
        except grpc.RpcError as error:
            # Bytes that are no message are gRPC's to refuse.
            details = error.details() or ""
            if error.code() is grpc.StatusCode.INTERNAL and "serializ" in details:
                return True
            raise Uncaught(f"{name}: {error.code()}: {details}") from error
        told = _REPLIES[name].FromString(said).error
        if told.message.startswith("internal error"):
            logged = "".join(self._logged.found)
            raise Uncaught(f"{name}: {told.message}\n{logged}")
        return bool(told.message)

    def _request(self, rng: Random, name: str, one: str) -> bytes:
        message = self._message(rng, name, one)
        for field in message.DESCRIPTOR.fields:
            if rng.random() < 0.08:
                with contextlib.suppress(TypeError, ValueError, ArithmeticError, AttributeError):
                    setattr(message, field.name, self._other(rng, getattr(message, field.name)))
        data: bytes = message.SerializeToString()
        if rng.random() < 0.3:
            data = self._bounded(message, mutated(rng, data))
        return self._bounded(message, data)

    def _other(self, rng: Random, value: object) -> object:
        if isinstance(value, str):
            return rng.choice(STRINGS)
        if isinstance(value, bytes):
            return rng.choice(STRINGS).encode() if rng.random() < 0.5 else rng.randbytes(40)
        if isinstance(value, float):
            return rng.choice((0.0, -1.0, 1e300, float("inf"), float("nan"), 1e-300))
        return rng.choice(EDGES) >> rng.choice((0, 32, 33))

    def _bounded(self, message: Any, data: bytes) -> bytes:
        """No wait is long, and no file is anywhere else than here: root runs this."""
        try:
            message = type(message).FromString(data)
        except DecodeError:
            return data
        if isinstance(message, pb.LookRequest):
            message.wait_s = min(message.wait_s, 0.01)
        if isinstance(message, pb.FilePart) and message.head.path not in STRINGS:
            message.head.path = str(self.root / "files" / f"f{len(message.head.path)}")
        if isinstance(message, pb.FilePart):
            message.head.size = min(message.head.size, 1 << 20)
            message.offset = min(message.offset, 1 << 20)
        if isinstance(message, pb.CheckRequest):
            for fact in message.files:
                fact.path = str(self.root / "files" / "x") if len(fact.path) > 9 else fact.path
        if isinstance(message, pb.OpenRequest):
            message.restore = "full" if message.restore in ("auto", "lazy") else message.restore
            message.post_copy = False
            message.memory = min(message.memory, 1 << 22)
        return bytes(message.SerializeToString())

    def _message(self, rng: Random, name: str, one: str) -> Any:
        manifest = json.dumps(worse(rng, {"pids": [1], "rootfs": "shared"})).encode()
        path = str(self.root / "files" / "f")
        fact = pb.FileFact(path=path, size=9, mode=0o100644, mtime_ns=1, digest=b"d" * 32)
        part = pb.ImagePart(
            name=rng.choice(("core-1.img", "mm-1.img", "pstree.img", *STRINGS)), data=b"x" * 50
        )
        match name:
            case "Hello":
                return pb.HelloRequest(version="1")
            case "Check":
                return pb.CheckRequest(
                    engine=rng.choice(("fuzz", "fuzz", "")), manifest=manifest, files=[fact],
                    id=one, target="t", source="a", restore="full",
                )  # fmt: skip
            case "Open":
                return pb.OpenRequest(
                    id=one, engine="fuzz", manifest=manifest, options=b"{}", lost_s=30, commit_s=30,
                    criu_log_level=4, target="t", source="a", restore="full", memory=1 << 20,
                    page_server="phaul", page_format=1,
                )  # fmt: skip
            case "Arrived":
                return pb.ArrivedRequest(id=one, name="rootfs")
            case "StartIter":
                return pb.StartIterRequest(id=one, local=rng.random() < 0.2)
            case "PutFiles":
                return pb.FilePart(id=one, head=fact, offset=0, data=b"some data")
            case "PutImages" | "Prepare":
                return pb.ImageParts(id=one, parts=[part] * rng.randrange(3))
            case "Look":
                return pb.LookRequest(id=one, wait_s=0.0)
            case "Settle":
                role = rng.choice(("source", "destination", *STRINGS))
                return pb.SettleRequest(id=one, role=role, verdict=rng.choice(("run", "discard")))
        return pb.MigrationRef(id=one)

    def close(self) -> None:
        """See `Target`."""
        self._channel.close()
        self._agent.stop(settle_within_s=1.0)
        threading.excepthook = self._hook
        logging.getLogger("phaul_runtime").removeHandler(self._logged)
        for module, name, value in self._patched:
            setattr(module, name, value)


class PagerWords(Target):
    """What is said to a pager on its two sockets, by an agent and by CRIU."""

    name = "pager"
    share = 5
    _FINISHED = 0x52535446

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._work = root / "pager"
        self._work.mkdir()
        (self._work / "pages").write_bytes(bytes(16 << 12))
        self._plan = self._work / "plan"
        runs = Runs()
        runs.add(0x10000, 8, 0, 0)
        FillPlan([str(self._work / "pages")], {1: runs}).save(self._plan)
        self._client = self._started()

    def _started(self) -> PagerClient:
        client = PagerClient.start(self._work, extra=["--grace", "600"])
        self._worker = client.status()["pids"][0]
        return client

    def case(self, rng: Random) -> tuple[int, bool]:
        """See `Target`."""
        count = 1
        if rng.random() < 0.5:
            self._client.plan(self._plan)
            count += self._criu(rng)
        else:
            count += self._agent(rng)
        try:
            status = self._client.status(timeout_s=_WITHIN_S)
        except PhaulError as error:
            self._client = self._started()
            raise Uncaught(f"the pager has ended: {error}") from error
        if status["pids"][0] != self._worker:
            self._worker = status["pids"][0]
            raise Uncaught("one of the pager's processes has died")
        return count, not status["trouble"]

    def _agent(self, rng: Random) -> int:
        words: list[object] = [
            {"do": "plan", "path": str(self._plan)}, {"do": "status"}, {"do": "wait"},
            {"do": "verify", "pids": {"1": 1, "2": 2}}, {"do": rng.choice(STRINGS)}, [], 7,
        ]  # fmt: skip
        lines = [
            json.dumps(worse(rng, rng.choice(words))).encode() for _ in range(rng.randrange(1, 12))
        ]
        if rng.random() < 0.05:
            lines.append(b"[" * 200_000)
        data = b"\n".join(lines) + b"\n"
        data = mutated(rng, data) if rng.random() < 0.5 else data
        # It may not be told to end; nor is that a finding.
        self._send(CONTROL_SOCKET, data.replace(b'"stop"', b'"post"'))
        return len(lines)

    def _criu(self, rng: Random) -> int:
        """Anything but the word that the restore is over: it cannot be taken back."""
        out = b"".join(
            struct.pack("=i", rng.choice((1, -1, 2, 0, 1 << 20, -(1 << 31), (1 << 31) - 1)))
            for _ in range(rng.randrange(1, 6))
        )
        out = mutated(rng, out).replace(struct.pack("=i", self._FINISHED), b"")
        self._send(LAZY_SOCKET, out, descriptor=rng.random() < 0.3)
        return max(1, len(out) // 4)

    def _send(self, name: str, data: bytes, *, descriptor: bool = False) -> None:
        place = os.open(self._work, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.settimeout(_WITHIN_S)
                with contextlib.suppress(OSError):
                    sock.connect(f"/proc/self/fd/{place}/{name}")
                    sock.sendall(data)
                    if descriptor:
                        # No userfaultfd, as CRIU would send one.
                        socket.send_fds(sock, [b"\0"], [place])
                    sock.shutdown(socket.SHUT_WR)
                    while sock.recv(1 << 16):
                        pass
        finally:
            os.close(place)

    def close(self) -> None:
        """See `Target`."""
        deadline = time.monotonic() + _WITHIN_S
        with contextlib.suppress(PhaulError):
            self._client.stop()
        while (self._work / CONTROL_SOCKET).exists() and time.monotonic() < deadline:
            time.sleep(0.05)


CALLS: tuple[type[Target], ...] = (Calls, PagerWords)
