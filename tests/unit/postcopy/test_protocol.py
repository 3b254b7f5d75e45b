"""Both ends of a channel of pages, with cuts at any byte; the memory read is this process's own."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phaul_runtime.errors import ChannelError, DestinationError, MigrationFailed
from phaul_runtime.memory.fill_plan import PAGE
from phaul_runtime.pager import WANTED
from phaul_runtime.postcopy import protocol
from phaul_runtime.postcopy.pages import RemotePages
from phaul_runtime.postcopy.protocol import Kind
from phaul_runtime.postcopy.receiver import Receiver
from phaul_runtime.postcopy.sender import PageSender
from phaul_runtime.postcopy.store import PageStore

PAGES = 300
PID = 42


class Memory:
    """Pages that say their number, in runs with holes between them."""

    def __init__(self, pages: int = PAGES, run: int = 70) -> None:
        self.memory = mmap.mmap(-1, 2 * pages * PAGE + PAGE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        runs, at = [], 0
        for first in range(0, pages, run):
            count = min(run, pages - first)
            runs.append((PID, base + at * PAGE, count))
            for page in range(first, first + count):
                self.memory[at * PAGE : (at + 1) * PAGE] = content(page)
                at += 1
            at += 1
        self.pages = RemotePages(runs)
        assert self.pages.total == pages

    def source(self) -> PageSender:
        return PageSender(self.pages, {PID: os.getpid()})


def content(page: int) -> bytes:
    return struct.pack("=Q", page + 1) * (PAGE // 8)


MEMORY = Memory()


@contextlib.contextmanager
def running(function: Any, *args: Any, **keywords: Any) -> Iterator[list[Any]]:
    """A call in a thread; its result or error is what is given."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(function(*args, **keywords))
        except (ChannelError, DestinationError, MigrationFailed) as error:
            result.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield result
    thread.join(20)
    assert not thread.is_alive()


class Cut:
    """Two ends of a channel; so many bytes pass in each direction, then it is cut."""

    def __init__(self, most: tuple[int, int]) -> None:
        self.ends = []
        inner = []
        for _ in range(2):
            outer, relay = socket.socketpair()
            self.ends.append(outer)
            inner.append(relay)
        self._inner = inner
        self._threads = [
            threading.Thread(target=self._carry, args=(*pair, left), daemon=True)
            for pair, left in zip((inner, inner[::-1]), most, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def _carry(self, a: socket.socket, b: socket.socket, left: int) -> None:
        with contextlib.suppress(OSError):
            while left > 0 and (data := a.recv(min(left, 50_000))):
                b.sendall(data)
                left -= len(data)
        for end in self._inner:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for end in (*self.ends, *self._inner):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(20)
        for end in (*self.ends, *self._inner):
            end.close()


def whole(place: Path) -> bool:
    wanted = b"".join(map(content, range(PAGES)))
    return (place / "remote.pages").read_bytes() == wanted


@given(st.lists(st.booleans(), max_size=200))
def test_bitmaps(here: list[bool]) -> None:
    flags = bytes(here)
    bitmap = protocol.to_bitmap(flags)
    assert len(bitmap) == (len(flags) + 7) // 8
    assert [bool(bitmap[at // 8] >> at % 8 & 1) for at in range(len(here))] == here
    assert protocol.from_bitmap(bitmap, len(flags)) == flags
    with pytest.raises(ValueError, match="another size"):
        protocol.from_bitmap(bitmap + b"\0", len(flags))
    if len(flags) % 8:
        with pytest.raises(ValueError, match="another size"):
            protocol.from_bitmap(b"\xff" * len(bitmap), len(flags))


HOLES = st.lists(st.tuples(st.integers(0, PAGES - 1), st.integers(1, 60)), max_size=6)
CUTS = st.lists(st.tuples(st.integers(0, 3000), st.integers(0, PAGES * PAGE)), max_size=4)
WANTS = st.lists(st.tuples(st.integers(0, PAGES + 5), st.integers(0, 40)), max_size=10)


@settings(deadline=None, max_examples=60)
@given(HOLES, CUTS, WANTS)
def test_all_pages_come_whatever_is_there_wanted_or_cut(
    tmp_path_factory: pytest.TempPathFactory,
    here: list[tuple[int, int]],
    cuts: list[tuple[int, int]],
    wants: list[tuple[int, int]],
) -> None:
    place = tmp_path_factory.mktemp("place")
    store = PageStore.create(place, PAGES)
    for first, count in here:
        for page in range(first, min(first + count, PAGES)):
            store.put(page, content(page))
    source = MEMORY.source()
    told: list[int] = []
    for most in [*cuts, (1 << 40, 1 << 40)]:
        before = store.missing_pages
        # Another agent each time.
        store.close()
        store = PageStore.open(place)
        arrival = Receiver(store, place)
        cut = Cut(most)
        at_source, at_destination = cut.ends
        sent = source.bytes_sent
        with (
            running(source.serve, at_source, told.append, silent_s=10) as served,
            running(arrival.serve, at_destination) as arrived,
        ):
            want(place, wants)
            last = most[0] > PAGES * 2 * PAGE
            # A cut ends both; a socket may be closed only once nobody uses it any more.
            deadline = time.monotonic() + 20
            while not (arrived and served) and time.monotonic() < deadline:
                time.sleep(0.001)
            cut.close()
        assert source.bytes_sent - sent <= before * (PAGE + protocol.MESSAGE.size)
        assert arrived == [store.complete]
        assert served == [None] or isinstance(served[0], ChannelError)
        if last:
            assert served == [None]
    assert told[-1] == 0
    assert all(0 <= missing <= PAGES for missing in told)
    assert store.complete
    assert whole(place)
    source.close()
    store.close()


def want(place: Path, wants: list[tuple[int, int]]) -> None:
    pager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    with pager, contextlib.suppress(OSError):
        pager.sendto(b"".join(WANTED.pack(*one) for one in wants), str(place / "wants.socket"))


def test_what_is_wanted_comes_first_and_the_rest_waits_for_its_receipt() -> None:
    memory = Memory(4000, 3000)
    ours, theirs = socket.socketpair()
    source = memory.source()
    order: list[tuple[int, int]] = []

    def piece(timeout_s: float) -> bool:
        ours.settimeout(timeout_s)
        try:
            kind, count, first = protocol.MESSAGE.unpack(exactly(ours, protocol.MESSAGE.size))
        except TimeoutError:
            return False
        assert kind == Kind.PAGES
        assert exactly(ours, count * PAGE) == b"".join(map(content, range(first, first + count)))
        order.append((first, count))
        return True

    def got() -> int:
        return sum(count for _, count in order)

    with running(source.serve, theirs, lambda _: None, silent_s=10) as served:
        wants = [protocol.message(Kind.WANT, first, 1) for first in (3500, 3505, 2995, 3500)]
        # At once: what is on its way already when it is asked for is not looked at.
        ours.sendall(protocol.HEAD.pack(protocol.MAGIC, 4000) + bytes(500) + b"".join(wants))
        while piece(0.5):
            pass
        assert protocol.FLIGHT - protocol.PIECE < got() <= protocol.FLIGHT
        # It comes although too much is on its way.
        ours.sendall(protocol.message(Kind.WANT, 3900, 32))
        assert piece(10)
        assert order[-1] == (3900, 32)
        while got() < 4000:
            ours.sendall(protocol.message(Kind.ACK, got()))
            assert piece(10)
        ours.sendall(protocol.message(Kind.DONE))
    assert served == [None]
    # With what lies beside it in one piece of memory; before, what was on its way already.
    urgent = [(3500, 32), (3532, 5), (2995, 5)]
    assert [one for one in order if one in urgent] == urgent
    assert max(map(order.index, urgent)) < 6
    pages = [page for first, count in order for page in range(first, first + count)]
    assert sorted(pages) == list(range(4000))
    source.close()
    ours.close()
    theirs.close()


def test_more_than_may_be_on_its_way_at_once(tmp_path: Path) -> None:
    memory = Memory(3 * protocol.FLIGHT)
    ours, theirs = socket.socketpair()
    store = PageStore.create(tmp_path, 3 * protocol.FLIGHT)
    source, told = memory.source(), []  # type: PageSender, list[int]
    with running(source.serve, ours, told.append, silent_s=5) as served:
        assert Receiver(store, tmp_path, silent_s=5).serve(theirs)
    assert served == [None]
    assert told[-1] == 0
    source.close()
    ours.close()
    theirs.close()


def exactly(channel: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = channel.recv(size - len(data))
        assert more
        data += more
    return data


GOOD = protocol.HEAD.pack(protocol.MAGIC, PAGES) + bytes((PAGES + 7) // 8)


@pytest.mark.parametrize(
    ("said", "match"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "speaks something else"),
        (protocol.HEAD.pack(protocol.MAGIC, PAGES + 1), "knows 301 pages, not 300"),
        (protocol.HEAD.pack(protocol.MAGIC, PAGES) + b"\xff" * 38, "list of pages is malformed"),
        (GOOD + protocol.message(Kind.WANT, PAGES, 1), "makes no sense: 1"),
        (GOOD + protocol.message(Kind.WANT, 0, 0), "makes no sense: 1"),
        (GOOD + protocol.message(Kind.WANT, 0, 33), "makes no sense: 1"),
        (GOOD + protocol.message(Kind.WANT, (1 << 64) - 1, 2), "makes no sense: 1"),
        (GOOD + protocol.message(Kind.ACK, PAGES + 1), "makes no sense: 2"),
        (GOOD + protocol.message(Kind.DONE, 5), "makes no sense: 3"),
        (GOOD + protocol.message(Kind.PAGES, 0, 1), "makes no sense: 4"),
        (GOOD + bytes(16), "makes no sense: 0"),
        (GOOD[:-1], "ended the channel"),
        (b"", "ended the channel"),
    ],
)
def test_a_destination_that_makes_no_sense(said: bytes, match: str) -> None:
    ours, theirs = socket.socketpair()
    source = MEMORY.source()
    with running(source.serve, theirs, lambda _: None, silent_s=10) as served:
        ours.sendall(said)
        ours.shutdown(socket.SHUT_WR)
    assert isinstance(served[0], ChannelError)
    with pytest.raises(ChannelError, match=match):
        raise served[0]
    source.close()
    ours.close()
    theirs.close()


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 400 Bad Request\r\n",
        protocol.message(Kind.PAGES, PAGES, 1),
        protocol.message(Kind.PAGES, 0, 0),
        protocol.message(Kind.PAGES, 0, protocol.PIECE + 1),
        protocol.message(Kind.PAGES, (1 << 64) - 1, 2),
        protocol.message(Kind.DONE),
    ],
)
def test_a_source_that_makes_no_sense(tmp_path: Path, said: bytes) -> None:
    ours, theirs = socket.socketpair()
    store = PageStore.create(tmp_path, PAGES)
    with running(Receiver(store, tmp_path).serve, theirs) as arrived:
        ours.sendall(said)
    with pytest.raises(DestinationError, match="makes no sense"):
        raise arrived[0]
    assert store.missing_pages == PAGES
    ours.close()
    theirs.close()
    assert not (tmp_path / "wants.socket").exists()


def test_silence_ends_it_at_both_ends(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    source = MEMORY.source()
    with running(source.serve, theirs, lambda _: None, silent_s=0.3) as served:
        pass
    with pytest.raises(ChannelError, match=r"nothing has moved .* for 0\.3 s"):
        raise served[0]
    store = PageStore.create(tmp_path, PAGES)
    with running(Receiver(store, tmp_path, silent_s=0.3).serve, theirs) as arrived:
        pass
    assert arrived == [False]
    source.close()
    ours.close()
    theirs.close()


def test_stop_ends_it_now_and_later(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    store = PageStore.create(tmp_path, PAGES)
    arrival = Receiver(store, tmp_path)
    with running(arrival.serve, theirs) as arrived:
        ours.recv(1)
        arrival.stop()
    assert arrived == [False]
    assert not arrival.serve(theirs)
    ours.close()
    theirs.close()


def test_a_store_that_is_complete_says_so_at_once(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    store = PageStore.create(tmp_path, PAGES)
    store.put(0, b"".join(map(content, range(PAGES))))
    source, told = MEMORY.source(), []  # type: PageSender, list[int]
    with running(source.serve, ours, told.append, silent_s=10) as served:
        assert Receiver(store, tmp_path).serve(theirs)
        theirs.close()
    assert served == [None]
    assert source.bytes_sent == 0
    source.close()
    ours.close()


def test_a_process_that_is_gone_or_unknown() -> None:
    with pytest.raises(MigrationFailed, match="process 42 of the images is not known"):
        PageSender(MEMORY.pages, {})
    with pytest.raises(MigrationFailed, match="cannot open /proc/0/mem"):
        PageSender(MEMORY.pages, {PID: 0})
    source = PageSender(RemotePages([(PID, PAGE, 1)]), {PID: os.getpid()})
    with pytest.raises(MigrationFailed, match="cannot read the memory of process 42 at 0x1000"):
        source.read(0, 1)
    source.close()
    with pytest.raises(MigrationFailed, match="it is closed"):
        source.read(0, 1)
