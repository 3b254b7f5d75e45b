"""An agent as a service in this process, and a client of it, over loopback."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from phaul_runtime.agent.service import Service
from phaul_runtime.config.model import AgentConfig, Config, TransportConfig
from phaul_runtime.criu.session import Criu
from phaul_runtime.hooks.lifecycle import Hooks
from phaul_runtime.memory.hard_close import hang_up
from phaul_runtime.rpc.client import RemoteAgent
from phaul_runtime.system.cancel import Cancellation
from phaul_runtime.transport import Channel, Destination, load_transport

ID = "2f" * 8


def wait(condition: Callable[[], object], within_s: float = 20) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def exactly(channel: socket.socket, size: int) -> bytes:
    """So many bytes; fewer if the peer ended."""
    got = bytearray()
    while len(got) < size and (data := channel.recv(min(1 << 16, size - len(got)))):
        got += data
    return bytes(got)


def gives_up_in_the_middle(ours: socket.socket, theirs: socket.socket) -> None:
    """A page server fails while CRIU writes to it: the write has to fail, not to wait for ever."""
    failed: list[OSError] = []

    def write() -> None:
        try:
            while True:
                ours.sendall(bytes(1 << 20))
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    exactly(theirs, 1 << 20)
    # Nothing more fits in between.
    wait(lambda: not select.select([], [ours], [], 0.5)[1])
    hang_up(theirs)
    thread.join(20)
    assert isinstance(failed[0], (BrokenPipeError, ConnectionResetError))


class Served:
    """A running service."""

    def __init__(self, root: Path, config: AgentConfig, criu: str) -> None:
        self.workdir = root / "work there"
        self.state_dir = root / "state there"
        self.service = Service(config, self.workdir, self.state_dir, Criu(criu), Hooks())
        self.url = self.service.start()
        self.port = Destination.parse(self.url).port or 0
        self.agent = self.service._agent

    def raw(self) -> socket.socket:
        """A connection that has said nothing yet."""
        channel = socket.create_connection(("127.0.0.1", self.port), 10)
        channel.settimeout(10)
        return channel


@contextlib.contextmanager
def serving(root: Path, config: AgentConfig, *, criu: str = "no-such-criu") -> Iterator[Served]:
    served = Served(root, config, criu)
    try:
        yield served
    finally:
        served.service.stop()
        assert not [p for p in served.workdir.iterdir() if p.name.startswith("agent-")]


@contextlib.contextmanager
def channel_to(url: str, root: Path, transport: TransportConfig) -> Iterator[Channel]:
    destination = Destination.parse(url)
    config = Config(workdir=str(root / "work here"), transport=transport)
    channel = load_transport(destination).open(destination, config, Cancellation(), "ab" * 8)
    try:
        yield channel
    finally:
        channel.close()
        assert not list((root / "work here").iterdir())


@contextlib.contextmanager
def agent_behind(channel: Channel) -> Iterator[RemoteAgent]:
    remote = RemoteAgent(channel, call_s=20, prepare_s=20, commit_s=5, cancellation=Cancellation())
    try:
        yield remote
    finally:
        remote.close()


def open_migration(remote: RemoteAgent, migration_id: str = ID, lost_s: float = 30) -> None:
    remote.open(
        migration_id, engine="process", target="1", manifest={}, options={}, lost_s=lost_s,
        log_level=0, restore="full", page_format=1,
    )  # fmt: skip


@contextlib.contextmanager
def memory(
    served: Served, url: str, root: Path, transport: TransportConfig
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A migration's memory channel: what the client's CRIU would get, and the agent's."""
    with channel_to(url, root, transport) as channel, agent_behind(channel) as remote:
        open_migration(remote)
        with channel.open_memory(ID) as ours:
            migration = served.agent.service.find(ID)
            wait(lambda: migration.memory.socket)
            theirs = migration.memory.socket
            assert theirs is not None
            for end in (ours, theirs):
                assert end.getblocking()
            yield ours, theirs
        # Where the test has cut the connection, it is opened anew for one of these.
        wait(remote.abort)
