"""tcp://: an agent that is a service, in the clear."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from phaul_runtime.config.model import AgentConfig, TransportConfig
from phaul_runtime.errors import DestinationUnreachable, Refused
from phaul_runtime.transport import lobby as lobby_module
from phaul_runtime.transport.handshake import _HELLO
from tests.integration.serving import (
    ID,
    agent_behind,
    channel_to,
    gives_up_in_the_middle,
    memory,
    open_migration,
    serving,
)

HERE = TransportConfig(insecure=True)
THERE = AgentConfig(listen="tcp://127.0.0.1:0", insecure=True)


def test_it_is_refused_unless_the_configuration_says_insecure(root: Path) -> None:
    with (
        pytest.raises(Refused, match=r"peer that reaches the port.*\n.*agent\.insecure: true"),
        serving(root, AgentConfig(listen="tcp://127.0.0.1:0")),
    ):
        pass
    with serving(root, THERE) as served:
        with (
            pytest.raises(Refused, match=r"in the clear.*\n.*transport\.insecure: true"),
            channel_to(served.url, root, TransportConfig()),
        ):
            pass
        with channel_to(served.url, root, HERE) as channel, agent_behind(channel) as remote:
            assert remote.hello().hostname == socket.gethostname()


def test_memory_arrives_at_its_migration_by_the_tcp_connection_itself(root: Path) -> None:
    with (
        serving(root, THERE) as served,
        channel_to(served.url, root, HERE) as channel,
        agent_behind(channel) as remote,
    ):
        open_migration(remote)
        migration = served.agent.service.find(ID)
        with channel.open_memory(ID) as ours:
            assert migration.memory.wait()
            theirs = migration.memory.socket
            assert theirs is not None
            # As CRIU gets them: the two ends of one connection, and both wait for as long as it
            # takes.
            assert ours.getsockname() == theirs.getpeername()
            assert (ours.family, ours.getblocking()) == (socket.AF_INET, True)
            assert theirs.getblocking()
            sent = bytes(range(256)) * 4096
            thread = threading.Thread(target=ours.sendall, args=(sent,))
            thread.start()
            got = b""
            while len(got) < len(sent):
                got += theirs.recv(1 << 16)
            thread.join()
            assert got == sent
        assert remote.abort()


def test_an_agent_that_gives_up_ends_a_writer_in_the_middle(root: Path) -> None:
    with (
        serving(root, THERE) as served,
        memory(served, served.url, root, HERE) as (ours, theirs),
    ):
        gives_up_in_the_middle(ours, theirs)


def test_many_clients_one_after_the_other_and_a_lost_one(root: Path) -> None:
    with serving(root, THERE) as served:
        for number in range(3):
            with channel_to(served.url, root, HERE) as channel, agent_behind(channel) as remote:
                migration_id = f"{number:08x}"
                open_migration(remote, migration_id)
                # The last is lost without a word: the service goes on.
                if number < 2:
                    assert remote.abort()
        with channel_to(served.url, root, HERE) as channel, agent_behind(channel) as remote:
            remote.hello()


def test_what_says_nothing_or_nonsense_keeps_nobody_out(root: Path) -> None:
    with serving(root, THERE) as served:
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00", b"x" * 1000, b"\n"):
            with served.raw() as channel_:
                channel_.sendall(words)
                answer = b""
                try:
                    while data := channel_.recv(4096):
                        answer += data
                except ConnectionResetError:
                    pass
                assert not answer or answer.startswith(b"no ")
        with served.raw() as channel_:
            channel_.sendall(_HELLO + b"shell\n")
            assert channel_.recv(100).startswith(b"no such purpose")
        with channel_to(served.url, root, HERE) as channel, agent_behind(channel) as remote:
            remote.hello()


def test_a_connection_that_says_too_little_in_time_is_closed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lobby_module, "GREETING_S", 0.5)
    with serving(root, THERE) as served, served.raw() as channel:
        # A byte now and then does not win it more time.
        ended = threading.Event()

        def drip() -> None:
            while not ended.wait(0.1):
                try:
                    channel.send(b"p")
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        with contextlib.suppress(ConnectionResetError):
            assert channel.recv(1) == b""
        ended.set()
        thread.join()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("tcp://127.0.0.1:{closed}", "Connection refused"),
        ("tcp://no-such-host.invalid", "no-such-host.invalid: port 7007: "),
        ("tcp://127.0.0.1:{silent}", "timed out"),
    ],
)
def test_where_no_agent_answers(root: Path, url: str, says: str) -> None:
    with socket.socket() as closed, socket.create_server(("127.0.0.1", 0)) as silent:
        closed.bind(("127.0.0.1", 0))
        target = url.format(closed=closed.getsockname()[1], silent=silent.getsockname()[1])
        here = TransportConfig(insecure=True, connect_timeout_s=0.5)
        (root / "work here").mkdir()
        with pytest.raises(DestinationUnreachable) as caught, channel_to(target, root, here):
            pass
        assert says in str(caught.value).splitlines()[0]


def test_one_address_has_one_agent(root: Path) -> None:
    with serving(root, THERE) as served:
        again = AgentConfig(listen=served.url, insecure=True)
        with pytest.raises(Refused, match="Address already in use"), serving(root, again):
            pass


def test_the_command_serves_until_sigterm(root: Path) -> None:
    argv = [sys.executable, "-m", "phaul_runtime", "agent", "--listen", "tcp://127.0.0.1:0"]
    argv += ["--insecure", "--workdir", str(root / "w"), "--state-dir", str(root / "s")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True) as it:
        assert it.stdout is not None
        ready = it.stdout.readline()
        assert ready.startswith("phaul-runtime agent ready ")
        url = ready.split()[-1]
        with channel_to(url, root, HERE) as channel, agent_behind(channel) as remote:
            remote.hello()
        it.terminate()
        assert it.wait(30) == 0
    assert not list((root / "w").iterdir())


@pytest.mark.parametrize(
    ("flags", "says", "code"),
    [
        (["--listen", "tcp://127.0.0.1:0"], "agent.insecure: true", 3),
        (["--listen", "ssh://127.0.0.1"], "cannot listen on", 2),
        ([], "no address to listen on", 2),
        (["--sockets", "x", "--listen", "tcp://127.0.0.1:0"], "exclude each other", 2),
    ],
)
def test_how_the_command_is_refused(flags: list[str], says: str, code: int) -> None:
    argv = [sys.executable, "-m", "phaul_runtime", "agent", *flags]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, says in done.stderr) == (code, True), done.stderr
