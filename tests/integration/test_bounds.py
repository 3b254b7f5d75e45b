"""A client of the service that is mad or hostile: it harms its own migrations, and no other's."""

from __future__ import annotations

import logging
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from phaul_runtime.agent import calls as agent_module
from phaul_runtime.agent import server
from phaul_runtime.agent.streams import Streams
from phaul_runtime.agent.turnstile import Turnstile
from phaul_runtime.cutover.states import State
from phaul_runtime.destination.incoming import Incoming
from phaul_runtime.engine import load_engine
from phaul_runtime.hooks.lifecycle import Hooks
from phaul_runtime.rpc import phaul_pb2 as pb
from phaul_runtime.rpc import phaul_pb2_grpc
from phaul_runtime.rpc.protocol import PROTOCOL, VERSION_KEY
from tests.integration import fakecriu
from tests.integration.serving import Served, agent_behind, channel_to, serving, wait
from tests.integration.test_tcp import HERE, THERE

VERSION = ((VERSION_KEY, str(PROTOCOL)),)
A, B = "aa" * 8, "bb" * 8
HEADER = struct.Struct("<IIQQ")
OPEN, ADD, CLOSE, WHERE = 4, 6 | 4 << 16, 0x1024, 1 << 8 | 1


@pytest.fixture
def criu(tmp_path: Path) -> str:
    path = tmp_path / "criu"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {fakecriu.__file__} "$@"\n')
    path.chmod(0o755)
    return str(path)


class Client:
    """The calls themselves, with a channel of its own."""

    def __init__(self, target: str) -> None:
        options = [("grpc.default_authority", "x"), ("grpc.use_local_subchannel_pool", 1)]
        self.channel = grpc.insecure_channel(target, options=options)
        self.stub = phaul_pb2_grpc.AgentStub(self.channel)

    def call(self, name: str, request: Any, timeout: float = 30) -> Any:
        return getattr(self.stub, name)(request, timeout=timeout, metadata=VERSION)

    def open(self, migration_id: str = A, **more: Any) -> Any:
        values: dict[str, Any] = {
            "id": migration_id, "engine": "process", "target": "1", "lost_s": 30.0,
            "commit_s": 5.0, "page_format": 1, "restore": "full", **more,
        }  # fmt: skip
        return self.call("Open", pb.OpenRequest(**values))

    def opened(self, migration_id: str = A, **more: Any) -> None:
        reply = self.open(migration_id, **more)
        assert not reply.HasField("error"), reply.error

    def beats(self, migration_id: str) -> Any:
        return self.call("Beat", pb.MigrationRef(id=migration_id), 10)


@pytest.fixture
def served(root: Path) -> Iterator[Served]:
    with serving(root, THERE) as found:
        yield found


@pytest.fixture
def client(served: Served, root: Path) -> Iterator[Client]:
    with channel_to(served.url, root, HERE) as channel:
        found = Client(channel.control_target())
        yield found
        found.channel.close()


# -- numbers, names, deadlines -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"lost_s": float("nan")}, "lost_s is nan"),
        ({"lost_s": float("inf")}, "lost_s is inf"),
        ({"lost_s": 1e9}, "lost_s is 1e\\+09, not from 0.1 to 3600"),
        ({"lost_s": -1.0}, "lost_s is -1"),
        ({"lost_s": 0.0}, "lost_s is 0"),
        ({"commit_s": float("nan")}, "commit_s is nan"),
        ({"commit_s": 1e12}, "commit_s is 1e"),
        ({"target": "x\0y"}, r"target is 'x\\x00y'"),
        ({"target": "x\x1b[2J"}, "target is"),
        ({"target": "x" * 5000}, "target is"),
        ({"source": "a\nerror forged: line"}, "source is"),
        ({"restore": "never"}, "restore 'never'"),
        ({"manifest": b"[" * 100_000}, "malformed manifest"),
        ({"manifest": b'{"a": NaN}'}, "malformed manifest"),
        ({"options": b'{"ghost_limit_mib": Infinity}'}, "malformed options"),
    ],
)
def test_what_it_says_has_bounds(client: Client, fields: dict[str, Any], said: str) -> None:
    import re

    error = client.open(**fields).error
    assert re.search(said, error.message), error.message
    assert "internal" not in error.message
    client.opened()


@pytest.mark.parametrize("wait_s", [float("nan"), -1.0, 1e9])
def test_nobody_looks_for_ever(client: Client, wait_s: float) -> None:
    error = client.call("Look", pb.LookRequest(id=A, wait_s=wait_s)).error
    assert error.message.startswith("malformed request: wait_s is")


def test_a_look_ends_with_its_client(
    client: Client, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "_LOOK_AGAIN_S", 0.1)
    client.opened()
    inside = served.agent.service.turnstile._inside
    looks = [
        client.stub.Look.future(pb.LookRequest(id=A, wait_s=80_000), timeout=60, metadata=VERSION)
        for _ in range(8)
    ]
    wait(lambda: inside.total() == 8)
    for look in looks:
        look.cancel()
    wait(lambda: not inside, 15)


def test_a_look_is_waited_for_in_pieces(
    client: Client, served: Served, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent keeps no worker for longer; who has more patience asks again."""
    from phaul_runtime.rpc import client as remote_module

    monkeypatch.setattr(agent_module, "_LOOK_S", 0.2)
    monkeypatch.setattr(remote_module, "_LOOK_S", 0.2)
    monkeypatch.setattr(remote_module, "_RETRY_S", 0.01)
    client.opened()
    threading.Timer(2, lambda: client.call("Abort", pb.MigrationRef(id=A))).start()
    with channel_to(served.url, root / "other", HERE) as channel, agent_behind(channel) as remote:
        found = remote.look(A, 60)
    assert [standing.state for standing in found.values()] == [State.ABORTED]


def test_a_call_without_a_deadline_is_refused(client: Client) -> None:
    reply = client.stub.Hello(pb.HelloRequest(), metadata=VERSION)
    assert reply.error.message == "malformed request: a call without a deadline"


# -- workers -----------------------------------------------------------------------------------


def silent_stream(gone: threading.Event, first: bool) -> Iterator[pb.FilePart]:
    if first:
        yield pb.FilePart(id=A, head=pb.FileFact(path="/nowhere/x"))
    gone.wait(60)


@pytest.mark.parametrize("first", [True, False])
def test_streams_from_which_nothing_comes_do_not_last(
    served: Served, client: Client, first: bool
) -> None:
    served.agent.service.streams.silent_s = 0.5
    client.opened()
    gone = threading.Event()
    calls = [
        client.stub.PutFiles.future(silent_stream(gone, first), timeout=300, metadata=VERSION)
        for _ in range(8)
    ]
    assert not client.beats(A).HasField("error")
    for call in calls:
        with pytest.raises((grpc.RpcError, grpc.FutureCancelledError)):
            call.result(30)
    gone.set()
    wait(lambda: not served.agent.service.turnstile._inside)
    assert not served.agent.service.streams._moving


def test_one_client_gets_its_share_of_the_workers(
    served: Served, client: Client, root: Path
) -> None:
    """Streams of one address take its places; over the agent's own socket all goes on."""
    service = served.agent.service
    service.turnstile = Turnstile(4)
    client.opened()
    gone = threading.Event()
    calls = [
        client.stub.PutFiles.future(silent_stream(gone, False), timeout=300, metadata=VERSION)
        for _ in range(4)
    ]
    wait(lambda: service.turnstile._inside["127.0.0.1"] == 4)
    assert "4 calls of this client are under way" in client.beats(A).error.message
    other = Client(f"unix:{served.agent._sockets / 'control.sock'}")
    assert not other.beats(A).HasField("error")
    other.channel.close()
    gone.set()
    for call in calls:
        call.result(30)
    assert not client.beats(A).HasField("error")


def test_there_are_more_workers_than_one_client_gets() -> None:
    assert agent_module.SHARE * 4 <= server.WORKERS


def test_streams_that_move_are_left_alone() -> None:
    class Context:
        def cancel(self) -> None:
            raise AssertionError("cancelled")

    streams = Streams(0.0)
    context: Any = Context()
    with streams.moving(iter([1, 2, 3]), context) as parts:
        for _ in parts:
            time.sleep(0.01)
            streams.end_silent()


# -- one Criu for all --------------------------------------------------------------------------


def test_many_say_hello_at_once(root: Path, criu: str) -> None:
    with serving(root, THERE, criu=criu) as served, channel_to(served.url, root, HERE) as channel:
        client = Client(channel.control_target())
        calls = [
            client.stub.Hello.future(pb.HelloRequest(), timeout=120, metadata=VERSION)
            for _ in range(12)
        ]
        replies = [call.result() for call in calls]
        client.channel.close()
        assert {reply.facts.criu_version for reply in replies} == {"4.1"}


# -- memory ------------------------------------------------------------------------------------


def round_of(channel: socket.socket, page: bytes) -> None:
    channel.settimeout(20)
    channel.sendall(HEADER.pack(OPEN, 0, 0, WHERE))
    assert channel.recv(1)
    channel.sendall(HEADER.pack(ADD, len(page) >> 12, 0x1000, WHERE) + page)
    channel.sendall(HEADER.pack(CLOSE, 0, 0, 0))
    assert len(channel.recv(4)) == 4


def test_a_second_memory_connection_is_refused_and_the_first_stays(root: Path, criu: str) -> None:
    with serving(root, THERE, criu=criu) as served, channel_to(served.url, root, HERE) as channel:
        client = Client(channel.control_target())
        client.opened(A)
        client.opened(B)
        first = channel.open_memory(A)
        migration = served.agent.service.find(A)
        wait(lambda: migration.memory.socket)
        start = pb.StartIterRequest(id=A)
        assert not client.call("StartIter", start).HasField("error")
        round_of(first, b"A" * 4096)
        assert not client.call("StopIter", pb.MigrationRef(id=A)).HasField("error")
        with channel.open_memory(A) as second:
            second.settimeout(20)
            assert second.recv(1) == b""
        # What comes next may get any number; it is not A's.
        other = channel.open_memory(B)
        wait(lambda: served.agent.service.find(B).memory.socket)
        assert not client.call("StartIter", start).HasField("error")
        round_of(first, b"a" * 4096)
        assert not client.call("StopIter", pb.MigrationRef(id=A)).HasField("error")
        pages = sorted((served.workdir / A).rglob("pages-*.img"))
        assert [path.read_bytes()[:1] for path in pages] == [b"A", b"a"]
        assert not client.call("Abort", pb.MigrationRef(id=A)).HasField("error")
        # The end of the one is not that of the other.
        other.settimeout(0.2)
        with pytest.raises(TimeoutError):
            other.recv(1)
        with channel.open_memory(A) as third:
            third.settimeout(20)
            assert third.recv(1) == b""
        for each in (first, other):
            each.close()
        client.channel.close()


def test_a_number_that_became_another_s_is_not_used(tmp_path: Path) -> None:
    """A `PhaulServer` has a hand of its own on its connection."""
    from phaul_runtime.library.api import PhaulConfig
    from phaul_runtime.library.server import PhaulServer

    ours, theirs = socket.socketpair()
    number = theirs.fileno()
    (tmp_path / "w").mkdir()
    server = PhaulServer(PhaulConfig(0, number, str(tmp_path / "w")))
    theirs.close()
    stranger, end = socket.socketpair()
    assert number in (stranger.fileno(), end.fileno())
    server._ended(1)
    # It ends its own, not what has the number now.
    assert ours.recv(1) == b""
    stranger.send(b"x")
    assert end.recv(1) == b"x"
    server.close()
    for each in (ours, stranger, end):
        each.close()


# -- what fails, or takes its time -------------------------------------------------------------


def ended(served: Served, migration_id: str) -> bool:
    return served.agent.service.find(migration_id).state is State.ABORTED


def test_a_watch_survives_what_fails_in_a_migration(
    served: Served,
    client: Client,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    abort = Incoming.abort

    def fail(self: Incoming, *, client_lost: bool = False) -> None:
        if self.id == A and client_lost:
            raise ZeroDivisionError("a bug")
        abort(self, client_lost=client_lost)

    monkeypatch.setattr(Incoming, "abort", fail)
    client.opened(A, lost_s=0.2)
    client.opened(B, lost_s=0.2)
    wait(lambda: ended(served, B))
    assert "giving it up failed: ZeroDivisionError: a bug" in caplog.text
    client.opened("cc" * 8, lost_s=0.2)
    wait(lambda: ended(served, "cc" * 8))
    monkeypatch.setattr(Incoming, "abort", abort)
    assert not client.call("Abort", pb.MigrationRef(id=A)).HasField("error")


def test_what_cannot_be_undone_keeps_nothing_from_what_follows(
    served: Served,
    client: Client,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As files in whose place somebody has made a directory."""
    client.opened(lost_s=0.2)
    migration = served.agent.service.find(A)
    for part, name in ((migration.carried._stage, "undo"), (migration._engine, "undo")):
        monkeypatch.setattr(part, name, lambda: (_ for _ in ()).throw(IsADirectoryError(21, "x")))
    wait(lambda: ended(served, A))
    assert "undoing its files failed: IsADirectoryError" in caplog.text
    assert not (served.workdir / A).exists()


@pytest.mark.parametrize("how", ["lost", "aborted"])
def test_one_that_is_put_away_slowly_keeps_nobody_waiting(
    served: Served, client: Client, how: str
) -> None:
    """Its hooks take their time: another's client is noticed, and served, meanwhile."""
    begun, may_end = threading.Event(), threading.Event()

    def slow(event: str, move: Any, _failure: Any) -> None:
        if move.id == A and event == "on_rollback":
            begun.set()
            assert may_end.wait(60)

    client.opened(A, lost_s=0.2 if how == "lost" else 30)
    served.agent.service.find(A)._hooks = Hooks(observe=slow)
    putting = None
    if how == "aborted":
        putting = client.stub.Abort.future(pb.MigrationRef(id=A), timeout=60, metadata=VERSION)
    assert begun.wait(30)
    client.opened(B, lost_s=0.2)
    wait(lambda: ended(served, B))
    client.opened("cc" * 8)
    for name in ("Beat", "Abort"):
        reply = client.call(name, pb.MigrationRef(id="cc" * 8), 20)
        assert not reply.HasField("error"), reply.error
    assert not ended(served, A)
    may_end.set()
    wait(lambda: ended(served, A))
    if putting is not None:
        putting.result()


def test_all_are_put_away_at_the_end_whatever_one_of_them_does(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(root, THERE) as served, channel_to(served.url, root, HERE) as channel:
        client = Client(channel.control_target())
        for each in (A, B):
            client.opened(each)
        first, second = (served.agent.service.find(each) for each in (A, B))
        monkeypatch.setattr(first.carried._stage, "undo", lambda: 1 / 0)
        client.channel.close()
        served.service.stop()
        assert (first.state, second.state) == (State.ABORTED, State.ABORTED)


def test_a_process_has_no_name_to_be_limited_by() -> None:
    engine = load_engine("process")
    half = engine.destination(engine.options_model(), criu_log_level=0, hold_s=1)
    claim = half.claim({"name": "web"})
    assert claim is not None
    assert not claim.name


def test_a_thread_that_must_not_die_does_not(caplog: pytest.LogCaptureFixture) -> None:
    from phaul_runtime.system import threads

    steps: list[int] = []
    stopping = threading.Event()

    def step() -> None:
        steps.append(1)
        if len(steps) == 1:
            raise ValueError("a bug")
        stopping.set()

    with caplog.at_level(logging.ERROR):
        threads.keep_doing("watch", step, stopping)
        wait(stopping.is_set)
    assert "watch: a step failed; it goes on" in caplog.text


@pytest.mark.parametrize("name", ["../x", "/etc/x", "criu.conf", "pagemap-1.img/../x", "..", ""])
def test_a_destination_names_no_files_of_the_source(tmp_path: Path, name: str) -> None:
    """It answers with the page maps that a dump is to build on."""
    from phaul_runtime.errors import MigrationFailed
    from phaul_runtime.memory.image_dirs import keep_page_maps

    (tmp_path / "1").mkdir()
    with pytest.raises(MigrationFailed, match="the destination names a page map"):
        keep_page_maps(tmp_path / "1", {name: b"x"})
    assert [path.name for path in tmp_path.rglob("*")] == ["1"]


def test_a_thread_that_dies_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from phaul_runtime.system import threads

    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    threads.report_deaths()
    thread = threading.Thread(target=lambda: 1 / 0, name="pages")
    thread.start()
    thread.join(20)
    assert "pages died; the service goes on" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_what_no_program_can_be_told_is_refused() -> None:
    """A hook's environment has words of the other side."""
    from phaul_runtime.errors import Refused
    from phaul_runtime.system import proc

    with pytest.raises(Refused, match="null byte"):
        proc.run(["true"], timeout_s=10, env={"PHAUL_TARGET": "x\0y"})
