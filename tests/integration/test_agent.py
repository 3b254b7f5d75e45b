"""An agent, by its sockets: what it refuses, and that it does not die of it."""

from __future__ import annotations

import json
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from phaul_runtime.agent.server import Agent
from phaul_runtime.criu.session import Criu, CriuFeatures, CriuVersion
from phaul_runtime.cutover.journal import Journal, journal_path, migration_ids
from phaul_runtime.cutover.states import Role, State
from phaul_runtime.errors import ChannelError, PhaulError
from phaul_runtime.rpc import phaul_pb2 as pb
from phaul_runtime.rpc import phaul_pb2_grpc
from phaul_runtime.rpc.client import RemoteAgent
from phaul_runtime.rpc.protocol import PROTOCOL, VERSION_KEY
from phaul_runtime.system.cancel import Cancellation
from phaul_runtime.transport import Channel
from phaul_runtime.transport.preamble import CONTROL, ID_BYTES, MEMORY

ID = "1f" * 8


class Client:
    def __init__(self, tmp_path: Path) -> None:
        self.sockets = tmp_path / "sockets"
        self.workdir = tmp_path / "work"
        self.state_dir = tmp_path / "state"
        criu = Criu("no-such-criu")
        self.agent = Agent(self.sockets, self.workdir, self.state_dir, criu, history=3)
        self.agent.start()
        options = [("grpc.default_authority", "x")]
        self.channel = grpc.insecure_channel(f"unix:{self.sockets / CONTROL}", options=options)
        self.raw = phaul_pb2_grpc.AgentStub(self.channel)

    def call(self, name: str, request: Any, protocol: int = PROTOCOL) -> Any:
        metadata = ((VERSION_KEY, str(protocol)),)
        return getattr(self.raw, name)(request, timeout=30, metadata=metadata)

    def open(self, **fields: object) -> pb.Done:
        values: dict[str, Any] = {
            "id": ID,
            "engine": "process",
            "lost_s": 30.0,
            "commit_s": 5.0,
            "page_format": 1,
            **fields,
        }
        reply: pb.Done = self.call("Open", pb.OpenRequest(**values))
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
    requests = {"Hello": pb.HelloRequest(), "Open": pb.OpenRequest(id=ID, engine="process")}
    for name, request in requests.items():
        replies = [
            client.call(name, request, PROTOCOL + 1),
            getattr(client.raw, name)(request, timeout=30),
        ]
        for reply in replies:
            assert reply.error.kind == "Refused"
            assert "speaks protocol" in reply.error.message
    assert not client.open().HasField("error")


@pytest.mark.parametrize(("engine", "refuses"), [("crun", True), ("runc", False)])
def test_an_engine_without_lazy_restore_is_refused_by_name(
    client: Client, engine: str, refuses: bool
) -> None:
    manifest = json.dumps({"name": "web", "bundle": "/nowhere/web", "config": {}}).encode()
    for restore in ("lazy", "auto"):
        request = pb.CheckRequest(engine=engine, manifest=manifest, restore=restore)
        reply = client.call("Check", request)
        assert not reply.HasField("error"), reply.error
        found = [(f.check, f.level, f.hint) for f in reply.findings if f.check == "lazy-pages"]
        expected = [("lazy-pages", "refused", "--restore auto")]
        assert found == (expected if refuses and restore == "lazy" else [])


def test_a_missing_criu_is_a_fact_not_a_failure(client: Client) -> None:
    reply = client.call("Hello", pb.HelloRequest())
    assert not reply.HasField("error")
    assert "cannot start no-such-criu" in reply.facts.criu_problem


@pytest.mark.parametrize(
    "fields",
    [
        {"id": "../x"},
        {"engine": "jail"},
        {"manifest": b"["},
        {"options": b'{"zzz": 1}'},
        {"page_format": 0},
        {"page_format": 3},
        {"page_server": "other"},
    ],
)
def test_malformed_openings_are_refused(client: Client, fields: dict[str, object]) -> None:
    assert client.open(**fields).HasField("error")
    assert not client.open().HasField("error")
    assert client.open().error.message == f"migration {ID} is open already"


@pytest.mark.parametrize(("version", "known"), [((4, 2), True), ((4, 3), False)])
def test_page_maps_that_are_not_known_are_not_planned(
    client: Client, monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], known: bool
) -> None:
    """CRIU 4.3 on both hosts, and its own page server: a restore in full is CRIU's alone."""
    monkeypatch.setattr(Criu, "version", lambda _: CriuVersion(*version))
    monkeypatch.setattr(Criu, "feature_check", lambda _: CriuFeatures(True, True, True))
    client.open(page_server="criu", page_format=2 if known else 0)
    incoming = client.agent.service.find(ID)
    incoming.copy.lazy.await_started()
    assert ("page format of CRIU 4.3 is not known" in incoming.copy.lazy.why_not) is not known


def test_steps_out_of_order_are_refused(client: Client) -> None:
    ref = pb.MigrationRef(id=ID)
    assert "no migration" in client.call("Commit", ref).error.message
    client.open()
    assert client.call("Commit", ref).error.message == "the migration is iterating"
    assert client.call("StopIter", ref).error.message == "no iteration was started"
    parts = pb.ImageParts(id=ID, parts=[pb.ImagePart(name="a.img")])
    assert client.call("PutImages", iter([parts])).error.message == "no iteration was started"
    assert client.call("Prepare", parts).error.message == "no iteration was started"
    assert client.call("Prepare", pb.ImageParts()).HasField("error")
    for _ in range(2):
        assert not client.call("Abort", ref).HasField("error")
    assert client.call("Beat", ref).state == "aborted"
    assert client.call("Commit", ref).HasField("error")


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
    while migration.state is not State.ABORTED:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not list(client.workdir.iterdir())


def test_oversized_and_garbled_messages_do_not_end_it(client: Client) -> None:
    call: Any = client.channel.unary_unary("/phaul.v1.Agent/Hello")
    for body in (b"\xff" * 100, b"\n" * (9 << 20)):
        with pytest.raises(grpc.RpcError):
            call(body, timeout=30)
    reply = client.call("Hello", pb.HelloRequest())
    assert reply.protocol == PROTOCOL


def test_what_it_knows_nothing_of_is_settled_already(client: Client) -> None:
    reply = client.call("Look", pb.LookRequest(id=ID))
    assert not reply.HasField("source")
    assert not reply.HasField("destination")
    request = pb.SettleRequest(id=ID, role="destination", verdict="discard")
    assert not client.call("Settle", request).HasField("error")
    for wrong in ({"role": "judge"}, {"verdict": "maybe"}, {"id": "../x"}):
        values = {"id": ID, "role": "source", "verdict": "run", **wrong}
        assert client.call("Settle", pb.SettleRequest(**values)).HasField("error")


def test_a_migration_under_way_is_not_settled(client: Client) -> None:
    client.open()
    for name, request in (
        ("Look", pb.LookRequest(id=ID, wait_s=0.1)),
        ("Settle", pb.SettleRequest(id=ID, role="destination", verdict="discard")),
    ):
        assert client.call(name, request).error.kind == "StillUnderWay"


def settled(state_dir: Path, number: int) -> Path:
    with Journal.create(state_dir, f"{number:08x}", Role.DESTINATION) as journal:
        for state in (State.ITERATING, State.ABORTING, State.ABORTED):
            journal.enter(state)
    return journal.path


def test_old_migrations_are_forgotten_here_too(client: Client) -> None:
    damaged = settled(client.state_dir, 1)
    damaged.write_bytes(b"{" + damaged.read_bytes())
    for number in range(2, 8):
        settled(client.state_dir, number)
    assert not client.open().HasField("error")
    assert migration_ids(client.state_dir) == ["00000001", "00000006", "00000007", ID]


def test_a_damaged_journal_is_named_and_ends_nothing(client: Client) -> None:
    path = settled(client.state_dir, 1)
    path.write_bytes(path.read_bytes().replace(b"aborted", b"abortee"))
    path.with_name("source.journal").write_bytes(b"\xff")
    reply = client.call("Hello", pb.HelloRequest())
    assert not reply.HasField("error")
    assert sorted(line.split(" is damaged")[0] for line in reply.facts.leftovers) == [
        f"migration 00000001: {path}",
        f"migration 00000001: {path.with_name('source.journal')}",
    ]
    assert not client.call("Check", pb.CheckRequest(memory=1)).HasField("error")
    assert not client.open().HasField("error")
    for name, request in (
        ("Look", pb.LookRequest(id="00000001")),
        ("Settle", pb.SettleRequest(id="00000001", role="destination", verdict="discard")),
    ):
        error = client.call(name, request).error
        assert error.kind == "JournalDamaged"
        assert "phaul-runtime show 00000001" in error.hint
    assert journal_path(client.state_dir, "00000001", Role.DESTINATION).exists()


class Sockets:
    """The channel of a client to an agent's sockets."""

    name = "there"

    def __init__(self, sockets: Path) -> None:
        self.sockets = sockets

    def control_target(self) -> str:
        return f"unix:{self.sockets / CONTROL}"

    def trouble(self) -> str:
        return ""


@pytest.mark.parametrize("dead", [True, False])
def test_an_agent_that_dies_at_the_opening_may_have_left_something(
    client: Client, dead: bool
) -> None:
    remote = RemoteAgent(
        cast(Channel, Sockets(client.sockets)),
        call_s=10,
        prepare_s=10,
        commit_s=1,
        cancellation=Cancellation(),
    )
    remote.hello()
    if dead:
        client.agent.stop()
    with pytest.raises(ChannelError if dead else PhaulError):
        remote.open(
            ID if dead else "malformed",
            engine="process",
            target="1",
            manifest={},
            options={},
            lost_s=30,
            log_level=0,
            restore="full",
            page_format=1,
        )
    # Told by the agent itself, a failure has left nothing.
    assert remote.abort() is not dead
    remote.close()
