"""An agent, by its sockets: what it refuses, and that it does not die of it."""

from __future__ import annotations

import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from phaul_runtime.agent import Agent
from phaul_runtime.criu import Criu
from phaul_runtime.hostfacts import PROTOCOL
from phaul_runtime.rpc import phaul_pb2 as pb
from phaul_runtime.rpc import phaul_pb2_grpc
from phaul_runtime.wire import CONTROL, ID_BYTES, MEMORY

ID = "1f" * 8


class Client:
    def __init__(self, tmp_path: Path) -> None:
        self.sockets = tmp_path / "sockets"
        self.workdir = tmp_path / "work"
        self.agent = Agent(self.sockets, self.workdir, Criu("no-such-criu"))
        self.agent.start()
        options = [("grpc.default_authority", "x")]
        self.channel = grpc.insecure_channel(f"unix:{self.sockets / CONTROL}", options=options)
        self.stub = phaul_pb2_grpc.AgentStub(self.channel)

    def open(self, **fields: object) -> pb.Done:
        values: dict[str, Any] = {
            "id": ID,
            "engine": "process",
            "lost_s": 30.0,
            "commit_s": 5.0,
            **fields,
        }
        reply: pb.Done = self.stub.Open(pb.OpenRequest(**values), timeout=30)
        return reply


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    found = Client(tmp_path)
    yield found
    found.channel.close()
    found.agent.stop()
    assert not found.sockets.exists()
    assert not list(found.workdir.iterdir())


def test_its_sockets_are_private(client: Client) -> None:
    assert stat.S_IMODE(client.sockets.stat().st_mode) == 0o700
    assert stat.S_IMODE(client.workdir.stat().st_mode) == 0o700


def test_another_protocol_is_refused(client: Client) -> None:
    reply = client.stub.Hello(pb.HelloRequest(protocol=PROTOCOL + 1, version="9"), timeout=30)
    assert reply.error.kind == "Refused"
    assert "speaks protocol" in reply.error.message


def test_a_missing_criu_is_a_fact_not_a_failure(client: Client) -> None:
    reply = client.stub.Hello(pb.HelloRequest(protocol=PROTOCOL), timeout=30)
    assert not reply.HasField("error")
    assert "cannot start no-such-criu" in reply.facts.criu_problem


@pytest.mark.parametrize(
    "fields",
    [{"id": "../x"}, {"engine": "jail"}, {"manifest": b"["}, {"options": b'{"zzz": 1}'}],
)
def test_malformed_openings_are_refused(client: Client, fields: dict[str, object]) -> None:
    assert client.open(**fields).HasField("error")
    assert not client.open().HasField("error")
    assert client.open().error.message == f"migration {ID} is open already"


def test_steps_out_of_order_are_refused(client: Client) -> None:
    ref = pb.MigrationRef(id=ID)
    assert "no migration" in client.stub.Commit(ref, timeout=30).error.message
    client.open()
    for call in (client.stub.StopIter, client.stub.Commit):
        assert call(ref, timeout=30).error.message == "the migration is open"
    parts = iter([pb.PreparePart(id=ID, name="a.img")])
    assert client.stub.Prepare(parts, timeout=30).error.message == "the migration is open"
    assert client.stub.Prepare(iter([]), timeout=30).HasField("error")
    for _ in range(2):
        assert not client.stub.Abort(ref, timeout=30).HasField("error")
    assert client.stub.Beat(ref, timeout=30).state == "aborted"


def test_memory_for_nobody_is_closed(client: Client) -> None:
    for preamble in (b"x" * ID_BYTES, ID.ljust(ID_BYTES).encode()):
        with socket.socket(socket.AF_UNIX) as channel:
            channel.connect(str(client.sockets / MEMORY))
            channel.sendall(preamble)
            channel.settimeout(10)
            assert channel.recv(1) == b""


def test_a_silent_client_is_given_up(client: Client) -> None:
    client.open(lost_s=0.5)
    migration = client.agent.service.find(ID)
    deadline = time.monotonic() + 30
    while migration.state != "aborted":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not list(client.workdir.iterdir())


def test_oversized_and_garbled_messages_do_not_end_it(client: Client) -> None:
    call: Any = client.channel.unary_unary("/phaul.v1.Agent/Hello")
    for body in (b"\xff" * 100, b"\n" * (9 << 20)):
        with pytest.raises(grpc.RpcError):
            call(body, timeout=30)
    reply = client.stub.Hello(pb.HelloRequest(protocol=PROTOCOL), timeout=30)
    assert reply.protocol == PROTOCOL
