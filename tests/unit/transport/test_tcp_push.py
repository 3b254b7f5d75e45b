"""Memory over TCP: nothing is held back, and the connection ends when it is closed."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from phaul_runtime.transport.tcp_push import Uncorked

PUSHED = (socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.fixture
def ends() -> Iterator[tuple[Uncorked, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    with theirs:
        theirs.settimeout(20)
        yield Uncorked.of(ours), theirs


def pushers() -> int:
    return sum(thread.name == "push" for thread in threading.enumerate())


def wait_for_no_pusher() -> None:
    deadline = time.monotonic() + 20
    while pushers():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_is_pushed_again_and_again(ends: tuple[Uncorked, socket.socket]) -> None:
    ours, theirs = ends
    with ours:
        for _ in range(3):
            ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
            ours.setsockopt(*PUSHED, 0)
            deadline = time.monotonic() + 20
            while not ours.getsockopt(*PUSHED):
                assert time.monotonic() < deadline
        ours.sendall(b"the last of a round")
        assert theirs.recv(99) == b"the last of a round"
    assert theirs.recv(1) == b""
    wait_for_no_pusher()


@pytest.mark.parametrize("end", ["close", "detach"])
def test_it_leaves_a_descriptor_alone_that_is_no_longer_its_own(
    ends: tuple[Uncorked, socket.socket], end: str
) -> None:
    ours, theirs = ends
    if end == "close":
        ours.close()
        wait_for_no_pusher()
    else:
        with socket.socket(fileno=ours.detach()) as other:
            wait_for_no_pusher()
            other.setsockopt(*PUSHED, 0)
            assert not other.getsockopt(*PUSHED)
    assert theirs.recv(1) == b""
