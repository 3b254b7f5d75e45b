"""The image proxy: what it takes, what it sends, and that nothing gets stuck in it."""

from __future__ import annotations

import os
import random
import select
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from phaul_runtime.errors import Refused
from phaul_runtime.memory.hard_close import hang_up
from phaul_runtime.transport import image_proxy
from phaul_runtime.transport.image_proxy import Bucket, ImageProxy, restored

MIB = 1 << 20
PAGE = os.urandom(16) * 256


class Line:
    """CRIU's socket, the link in the middle, and the page server's socket."""

    def __init__(self, *, compress: bool, buffer: int = MIB, limit: int | None = None) -> None:
        self.proxy = ImageProxy(compress=compress, limit=limit, buffer=buffer)
        here, there = socket.socketpair()
        self.criu, self.stream = self.proxy.before(here, tree=False)
        self.link = there
        self.server = restored(there) if compress else there
        for end in (self.criu, self.server):
            end.settimeout(20)

    def close(self) -> None:
        self.stream.stop()
        for end in (self.criu, self.server):
            end.close()


@pytest.fixture
def lines() -> Iterator[Callable[..., Line]]:
    made: list[Line] = []

    def make(**how: object) -> Line:
        made.append(Line(**how))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for line in made:
        line.close()


def exactly(channel: socket.socket, size: int) -> bytes:
    got = bytearray()
    while len(got) < size and (data := channel.recv(min(MIB, size - len(got)))):
        got += data
    return bytes(got)


def send(channel: socket.socket, data: bytes) -> threading.Thread:
    thread = threading.Thread(target=channel.sendall, args=(data,), daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("limit", [None, 1 << 30])
def test_it_arrives_as_it_was_sent(
    lines: Callable[..., Line], compress: bool, limit: int | None
) -> None:
    line = lines(compress=compress, limit=limit)
    chance = random.Random(7)
    parts = [os.urandom(chance.randrange(1, 3 * MIB)) for _ in range(4)]
    parts += [PAGE * chance.randrange(1, 600) for _ in range(4)] + [bytes(5 * MIB), b"x"]
    data = b"".join(parts)
    thread = send(line.criu, data)
    assert exactly(line.server, len(data)) == data
    thread.join()
    assert line.proxy.counts.taken == len(data)


@pytest.mark.parametrize("compress", [False, True])
def test_each_round_is_acknowledged_and_nothing_waits_for_more(
    lines: Callable[..., Line], compress: bool
) -> None:
    # As CRIU does: what is sent has to arrive although nothing follows it.
    line = lines(compress=compress)
    for number in range(20):
        line.criu.sendall(PAGE * number + b"flush")
        assert exactly(line.server, 4096 * number + 5) == PAGE * number + b"flush"
        line.server.sendall(b"ack!")
        assert exactly(line.criu, 4) == b"ack!"


@pytest.mark.parametrize("compress", [False, True])
def test_the_end_of_one_half_is_the_end_of_that_half(
    lines: Callable[..., Line], compress: bool
) -> None:
    line = lines(compress=compress)
    line.criu.sendall(PAGE)
    line.criu.shutdown(socket.SHUT_WR)
    assert exactly(line.server, 8192) == PAGE
    line.server.sendall(b"after that")
    assert exactly(line.criu, 10) == b"after that"
    line.server.shutdown(socket.SHUT_WR)
    assert line.criu.recv(1) == b""


@pytest.mark.parametrize("compress", [False, True])
def test_a_server_that_gives_up_ends_the_writer(lines: Callable[..., Line], compress: bool) -> None:
    line = lines(compress=compress)
    failed: list[OSError] = []

    def write() -> None:
        try:
            while True:
                line.criu.sendall(PAGE * 64)
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    exactly(line.server, MIB)
    hang_up(line.server)
    thread.join(20)
    assert isinstance(failed[0], (BrokenPipeError, ConnectionResetError))


def test_it_takes_from_criu_what_the_link_does_not_take_yet(lines: Callable[..., Line]) -> None:
    line = lines(compress=False, buffer=8 * MIB)
    line.criu.setblocking(False)
    taken = 0
    while select.select([], [line.criu], [], 20 if taken < 7 * MIB else 1)[1]:
        taken += line.criu.send(bytes(64 << 10))
    # Nobody has read a byte at the other end. Socket buffers come on top, and no more than that.
    assert 7 * MIB < taken < 11 * MIB
    assert line.proxy.counts.sent < 2 * MIB
    line.criu.setblocking(True)
    line.criu.shutdown(socket.SHUT_WR)
    assert len(exactly(line.server, taken + 1)) == taken


def test_compression_is_worth_it(lines: Callable[..., Line]) -> None:
    line = lines(compress=True)
    for data, worth in ((PAGE * 2560, True), (os.urandom(10 * MIB), False)):
        before = line.proxy.counts.sent
        thread = send(line.criu, data)
        assert exactly(line.server, len(data)) == data
        thread.join()
        # What cannot be compressed costs a header a piece.
        sent = line.proxy.counts.sent - before
        assert sent < len(data) / 20 if worth else sent < len(data) * 1.001


@pytest.mark.parametrize(
    ("sent", "cut"),
    [
        (b"\x80\x00\x00\x04none", False),
        ((1 << 20).to_bytes(4, "big"), False),
        (b"\x00\x00", True),
        (b"\x00\x00\x10\x00" + bytes(100), True),
    ],
    ids=["garbled", "too large", "cut in a header", "cut in a piece"],
)
def test_what_is_none_of_its_pieces_ends_it(sent: bytes, cut: bool) -> None:
    link, there = socket.socketpair()
    server = restored(there)
    with link, server:
        server.settimeout(20)
        link.settimeout(20)
        link.sendall(sent)
        if cut:
            link.shutdown(socket.SHUT_WR)
        assert exactly(server, 1 << 20) == b""
        # Cut off, not ended: writing to it fails too.
        with pytest.raises(OSError, match=r"pipe|reset"):
            server.sendall(bytes(64 * MIB))


def test_a_piece_that_would_fill_the_memory_is_not_unpacked() -> None:
    bomb = image_proxy.require_zstandard().ZstdCompressor().compress(bytes(64 * MIB))
    assert len(bomb) < 64 << 10
    link, there = socket.socketpair()
    server = restored(there)
    with link, server:
        server.settimeout(20)
        link.sendall((image_proxy._COMPRESSED | len(bomb)).to_bytes(4, "big") + bomb)
        assert server.recv(1) == b""


def test_a_bucket_lets_through_what_its_rate_says() -> None:
    now = 0.0
    bucket = Bucket(1000, clock=lambda: now)
    assert bucket.piece == 100
    sent = 0
    while now < 60:
        now += bucket.take(bucket.piece)
        sent += bucket.piece
    assert 60_000 <= sent <= 60_200
    # Who was silent for long may not make up for it.
    now += 3600
    assert bucket.take(100) == 0
    assert bucket.take(100) == pytest.approx(0.1)
    # Who takes more than there is waits for it, and so does the next.
    assert bucket.take(500) == pytest.approx(0.6)
    assert bucket.take(0) == pytest.approx(0.6)


def test_all_streams_share_one_limit(lines: Callable[..., Line]) -> None:
    size = 192 << 10
    proxy = ImageProxy(compress=False, limit=640 << 10, buffer=MIB)
    assert proxy._bucket is not None
    asked: list[int] = []
    take = proxy._bucket.take
    proxy._bucket.take = lambda size: asked.append(size) or take(size)  # type: ignore
    ends = []
    for tree in (False, True):
        here, there = socket.socketpair()
        criu, stream = proxy.before(here, tree=tree)
        ends.append((criu, there, stream))
        send(criu, bytes(size))
        assert len(exactly(there, size)) == size
    # All of it went through the bucket, in pieces that let others in between.
    assert sum(asked) == 2 * size
    assert max(asked) <= proxy._bucket.piece
    for criu, there, stream in ends:
        stream.stop()
        criu.close()
        there.close()


def test_zstandard_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(Refused, match="needs the Python package zstandard"):
        ImageProxy(compress=True, limit=None, buffer=MIB)
    one, other = socket.socketpair()
    with one, other, pytest.raises(Refused, match="zstandard"):
        restored(one)
    ImageProxy(compress=False, limit=None, buffer=MIB)
