"""A port of the agent that many come to who say nothing, or everybody at once."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from phaul_runtime.config.model import AgentConfig, TransportConfig
from phaul_runtime.transport import lobby as lobby_module
from phaul_runtime.transport.lobby import Lobby
from tests.integration.fleet import Fleet
from tests.integration.serving import (
    Served,
    agent_behind,
    channel_to,
    exactly,
    open_migration,
    serving,
    wait,
)

HERE = TransportConfig(insecure=True)
THERE = AgentConfig(listen="tcp://127.0.0.1:0", insecure=True)


def lobby_of(served: Served) -> Lobby:
    found = served.service._front._lobby
    assert found is not None
    return found


def hello(served: Served, root: Path, transport: TransportConfig) -> None:
    with channel_to(served.url, root, transport) as channel, agent_behind(channel) as remote:
        remote.hello()


@contextlib.contextmanager
def silent(served: Served, number: int) -> Iterator[list[socket.socket]]:
    """Connections from the client's own address that say nothing."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(served.raw()) for _ in range(number)]


@pytest.mark.parametrize("secure", [True, False])
def test_who_says_nothing_keeps_nobody_out(root: Path, secure: bool) -> None:
    """Far more than were ever served at a time, all from the address of an honest client."""
    fleet = Fleet(root / "fleet") if secure else None
    with (
        serving(root, fleet.there() if fleet else THERE) as served,
        silent(served, 300),
    ):
        threads = threading.active_count()
        wait(lambda: lobby_of(served).waiting == 300)
        # They cost no thread each.
        assert threading.active_count() <= threads
        hello(served, root, fleet.here() if fleet else HERE)
        assert lobby_of(served).waiting == 300


def test_the_oldest_makes_place_and_the_log_says_so_once(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lobby_module, "_SILENT", 8)
    with serving(root, THERE) as served, silent(served, 40) as held:
        hello(served, root, HERE)
        for oldest in held[:32]:
            assert oldest.recv(1) == b""
        assert lobby_of(served).waiting <= 8
    said = [r.getMessage() for r in caplog.records if "not agreed on" in r.getMessage()]
    assert 1 <= len(said) < 20
    assert said[0].startswith("8 connections are not agreed on; the oldest, from 127.0.0.1")


def test_without_descriptors_the_oldest_makes_place_too(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(root, THERE) as served, silent(served, 3) as held:
        wait(lambda: lobby_of(served).waiting == 3)
        accept, failures = socket.socket.accept, [OSError(24, "Too many open files")]

        def scarce(listener: socket.socket) -> tuple[socket.socket, object]:
            if listener is lobby_of(served)._listener and failures:
                raise failures.pop()
            return accept(listener)

        monkeypatch.setattr(socket.socket, "accept", scarce)
        hello(served, root, HERE)
        assert held[0].recv(1) == b""


def test_who_begins_to_speak_and_does_not_go_on_makes_place(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lobby_module, "_SPEAKING", 4)
    with serving(root, THERE) as served, silent(served, 12) as held:
        for channel in held:
            channel.sendall(b"p")
        hello(served, root, HERE)
        for channel in held[:8]:
            with contextlib.suppress(ConnectionResetError):
                assert channel.recv(1) == b""


@pytest.mark.parametrize("speaking", [3, lobby_module._SPEAKING])
def test_of_streams_that_come_all_at_once_none_is_lost(
    root: Path, monkeypatch: pytest.MonkeyPatch, speaking: int
) -> None:
    """As of trees; where there is no place for all of them, a client tries again."""
    monkeypatch.setattr(lobby_module, "_SPEAKING", speaking)
    fleet = Fleet(root / "fleet")
    with (
        serving(root, fleet.there()) as served,
        channel_to(served.url, root, fleet.here()) as channel,
        agent_behind(channel) as remote,
        contextlib.ExitStack() as stack,
    ):
        ids = [f"{number:016x}" for number in range(64 if speaking > 3 else 12)]
        for migration_id in ids:
            open_migration(remote, migration_id, lost_s=3000)
        begin = threading.Barrier(len(ids))

        def stream(migration_id: str) -> None:
            begin.wait(120)
            ours = stack.enter_context(channel.open_memory(migration_id))
            ours.sendall(migration_id.encode())

        threads = [threading.Thread(target=stream, args=(each,)) for each in ids]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(240)
        for migration_id in ids:
            migration = served.agent.service.find(migration_id)
            assert migration.memory.wait()
            assert migration.memory.socket is not None
            assert exactly(migration.memory.socket, 16) == migration_id.encode()


def test_a_port_that_is_no_agent_s_is_not_tried_for_ever(root: Path) -> None:
    closed: list[int] = []

    def refuse(listener: socket.socket) -> None:
        while True:
            try:
                channel, _ = listener.accept()
            except OSError:
                return
            closed.append(1)
            channel.close()

    (root / "work here").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=refuse, args=(listener,), daemon=True).start()
        url = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(Exception, match=r"127\.0\.0\.1"), channel_to(url, root, HERE):
            pass
        listener.shutdown(socket.SHUT_RDWR)
    assert len(closed) == 6


def test_what_fails_in_its_thread_ends_it_not(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(root, THERE) as served:
        lobby = lobby_of(served)
        expire, failures = lobby._expire, [ZeroDivisionError("a bug")]

        def fail() -> None:
            if failures:
                raise failures.pop()
            expire()

        monkeypatch.setattr(lobby, "_expire", fail)
        with caplog.at_level(logging.ERROR), served.raw():
            wait(lambda: not failures)
        hello(served, root, HERE)
    assert "front: a step failed; it goes on" in caplog.text
