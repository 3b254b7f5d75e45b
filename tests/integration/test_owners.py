"""Two hosts with certificates of one CA: neither ends what the other has begun."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from phaul_runtime.config.model import AgentConfig, TransportConfig
from phaul_runtime.cutover.journal import Journal, read_records, replay
from phaul_runtime.cutover.states import Role, State, Verdict
from phaul_runtime.errors import DestinationUnreachable, PhaulError, Refused
from phaul_runtime.rpc import phaul_pb2 as pb
from phaul_runtime.rpc import phaul_pb2_grpc
from phaul_runtime.rpc.client import RemoteAgent
from phaul_runtime.rpc.protocol import PROTOCOL, VERSION_KEY
from phaul_runtime.transport import Channel
from phaul_runtime.transport.certs import Host, add_hosts
from tests.integration.fleet import Fleet
from tests.integration.serving import Served, agent_behind, channel_to, open_migration, serving
from tests.integration.test_bounds import Client

MINE, PREPARED, SENT, OLD = "aa" * 8, "d0" * 8, "50" * 8, "0d" * 8


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    found = Fleet(tmp_path_factory.mktemp("fleet") / "f")
    add_hosts(found.root, [Host.parse("c,127.0.0.1")], days=9)
    return found


@pytest.fixture
def served(root: Path, fleet: Fleet) -> Iterator[Served]:
    with serving(root, fleet.there()) as found:
        yield found


def files(fleet: Fleet, host: str) -> TransportConfig:
    return TransportConfig.model_validate(fleet.files(host))


def waits(state_dir: Path, migration_id: str, role: Role, **more: Any) -> None:
    """An end that waits for a recovery."""
    with Journal.create(state_dir, migration_id, role) as journal:
        journal.enter(
            State.ITERATING, engine="process", target="1", options={}, manifest={}, peer="here",
            to="tls://there", identity={"boot_id": "x", "members": []}, workdir="/none",
            lost_s=20.0, log_level=4, hold_s=5.0, restore="full", page_server="phaul",
            page_format=1, **more,
        )  # fmt: skip
        journal.enter(State.FROZEN, images_dir="/none")


@pytest.fixture
def remote(root: Path, served: Served, fleet: Fleet) -> Iterator[Callable[..., RemoteAgent]]:
    """Agents as a host of the fleet sees them."""
    import contextlib

    with contextlib.ExitStack() as stack:

        def reach(host: str) -> tuple[Channel, RemoteAgent]:
            channel = stack.enter_context(channel_to(served.url, root / host, files(fleet, host)))
            return channel, stack.enter_context(agent_behind(channel))

        yield reach  # type: ignore[misc]


def call(channel: Channel, name: str, request: Any) -> Any:
    with grpc.insecure_channel(
        channel.control_target(), options=[("grpc.default_authority", "x")]
    ) as way:
        method = getattr(phaul_pb2_grpc.AgentStub(way), name)
        return method(request, timeout=30, metadata=((VERSION_KEY, str(PROTOCOL)),))


def test_another_certificate_ends_nothing(served: Served, remote: Any) -> None:
    _, here = remote("here")
    there, _ = remote("c")
    open_migration(here, MINE)
    for name in ("Beat", "Abort", "Commit", "StopIter", "Filled"):
        reply = call(there, name, pb.MigrationRef(id=MINE))
        assert reply.error.kind == "Refused", name
        assert "does not belong to the certificate 'c'" in reply.error.message
    for name, request in (
        ("StartIter", pb.StartIterRequest(id=MINE)),
        ("Prepare", pb.ImageParts(id=MINE)),
        ("Arrived", pb.ArrivedRequest(id=MINE, name="rootfs")),
        ("PutFiles", iter([pb.FilePart(id=MINE)])),
        ("PutImages", iter([pb.ImageParts(id=MINE)])),
    ):
        assert call(there, name, request).error.kind == "Refused", name
    for name in ("", "rootfs", "@pages"):
        with there.open_stream(MINE, name) if name else there.open_memory(MINE) as stream:
            stream.settimeout(20)
            assert stream.recv(1) == b""
    assert served.agent.service.find(MINE).memory.socket is None
    assert here.failure() is None
    assert here.abort()


@pytest.mark.parametrize(
    ("migration_id", "role"), [(PREPARED, Role.DESTINATION), (SENT, Role.SOURCE)]
)
def test_only_its_own_certificate_settles_an_end_that_waits(
    served: Served, remote: Any, migration_id: str, role: Role
) -> None:
    """As after a crash, from the host that has the other end."""
    waits(served.state_dir, migration_id, role, owner="here")
    _, c = remote("c")
    asks: tuple[Callable[[], object], ...] = (
        lambda: c.look(migration_id, 1),
        lambda: c.settle(migration_id, role, Verdict.DISCARD),
        # The other end, of which there is none here, neither.
        lambda: c.settle(migration_id, next(r for r in Role if r is not role), Verdict.DISCARD),
    )
    for ask in asks:
        with pytest.raises(Refused, match="does not belong to the certificate 'c'"):
            ask()
    _, here = remote("here")
    assert here.look(migration_id, 1)[role].state is State.FROZEN
    here.settle(migration_id, role, Verdict.DISCARD)
    assert here.look(migration_id, 1)[role].state is State.ABORTED


def test_what_no_certificate_has_opened_is_root_s(served: Served, remote: Any) -> None:
    waits(served.state_dir, OLD, Role.DESTINATION)
    _, here = remote("here")
    with pytest.raises(Refused, match="does not belong to the certificate 'here'") as caught:
        here.settle(OLD, Role.DESTINATION, Verdict.DISCARD)
    assert "as root of this host, or by ssh" in str(caught.value)
    root = Client(f"unix:{served.agent._sockets / 'control.sock'}")
    request = pb.SettleRequest(id=OLD, role="destination", verdict="discard")
    assert not root.call("Settle", request).HasField("error")
    root.channel.close()


def test_root_of_this_host_ends_what_a_certificate_has_opened(served: Served, remote: Any) -> None:
    _, here = remote("here")
    open_migration(here, MINE)
    _, facts = replay(read_records(served.state_dir, MINE, Role.DESTINATION))
    assert facts["owner"] == "here"
    root = Client(f"unix:{served.agent._sockets / 'control.sock'}")
    assert not root.call("Abort", pb.MigrationRef(id=MINE)).HasField("error")
    root.channel.close()


def test_the_source_learns_whose_the_agent_is(root: Path, served: Served, fleet: Fleet) -> None:
    from phaul_runtime.transport.image_proxy import ImageProxy, ProxiedChannel

    with channel_to(served.url, root, fleet.here()) as channel:
        assert channel.certificate == "there"
        proxy = ImageProxy.of(fleet.here(bandwidth_limit="10MiB"))
        assert proxy is not None
        assert ProxiedChannel(channel, proxy).certificate == "there"


def test_a_host_lets_in_whom_it_likes(root: Path, fleet: Fleet) -> None:
    rule = {"name": "here", "engines": ["process", "runc"], "hooks": False}
    config = AgentConfig.model_validate(
        {"listen": "tls://127.0.0.1:0", **fleet.files("there"), "allow": [rule]}
    )
    hooks = {"poststop": [{"path": "/x"}]}
    hooked = {"name": "web", "bundle": "/none", "config": {"hooks": hooks}}
    with serving(root, config) as served:
        (root / "c" / "work here").mkdir(parents=True)
        with (
            pytest.raises(DestinationUnreachable, match="no rule for the certificate 'c'"),
            channel_to(served.url, root / "c", files(fleet, "c")),
        ):
            pass
        with (
            channel_to(served.url, root, fleet.here()) as channel,
            agent_behind(channel) as remote,
        ):
            remote.hello()
            open_migration(remote, MINE)
            assert remote.abort()
            import json

            for engine, manifest, said in (
                ("docker", {"name": "web"}, "not send engine 'docker'"),
                ("runc", hooked, "hooks of its own"),
            ):
                request = pb.CheckRequest(engine=engine, manifest=json.dumps(manifest).encode())
                refused = [f.text for f in remote.check(request)[0] if f.check == "allowed"]
                assert [said in text for text in refused] == [True]
                with pytest.raises(PhaulError, match=said):
                    remote.open(
                        OLD, engine=engine, target="web", manifest=manifest, options={},
                        lost_s=30, log_level=0, restore="full", page_format=1,
                    )  # fmt: skip
        assert not read_records(served.state_dir, OLD, Role.DESTINATION)


def test_without_certificates_there_is_nothing_to_allow(root: Path) -> None:
    config = AgentConfig.model_validate(
        {"listen": "tcp://127.0.0.1:0", "insecure": True, "allow": []}
    )
    with pytest.raises(Refused, match="tcp:// has none"), serving(root, config):
        pass
