"""The receiver of pages, held against a model of what a source's CRIU sends."""

from __future__ import annotations

import contextlib
import random
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phaul_runtime.criu.page_format import PageFormat
from phaul_runtime.errors import DestinationError
from phaul_runtime.memory import preallocate as ahead_module
from phaul_runtime.memory.page_index import PageIndex
from phaul_runtime.memory.page_receiver import Aborted, Listed, PageReceiver
from phaul_runtime.memory.pagemap import IN_PARENT, LAZY, PRESENT, read_pagemap
from phaul_runtime.memory.preallocate import Preallocation

PAGE = 4096
OPEN, PARENT, ADD, CLOSE, FORCE_CLOSE = 4, 5, 6, 0x1023, 0x1024
HEADERS = {1: struct.Struct("<IIQQ"), 2: struct.Struct("<I4xQQQ")}
NAMES = {1: "pagemap-{}.img", 2: "pagemap-shmem-{}.img"}
SHM = Path("/dev/shm")


@dataclass
class Map:
    """A page map as its source has it: runs of pages, with their bytes where they are sent."""

    kind: int
    number: int
    runs: list[tuple[int, int, int, bytes]] = field(default_factory=list)

    @property
    def target(self) -> int:
        return self.number << 8 | self.kind

    @property
    def file(self) -> str:
        return NAMES[self.kind].format(self.number)

    def add(self, vaddr: int, pages: int, flags: int, seed: int = 0) -> Map:
        data = random.Random(seed or vaddr).randbytes(pages * PAGE) if flags & PRESENT else b""
        self.runs.append((vaddr, pages, flags, data))
        return self


@dataclass
class Wire:
    """What is sent, as parts after which an answer is waited for."""

    format: int = 1
    parts: list[tuple[bytes, bytes]] = field(default_factory=list)
    pending: bytes = b""

    def say(self, command: int, pages: int = 0, vaddr: int = 0, target: int = 0) -> Wire:
        self.pending += HEADERS[self.format].pack(command, pages, vaddr, target)
        return self

    def hear(self, answer: bytes) -> Wire:
        self.parts.append((self.pending, answer))
        self.pending = b""
        return self

    def map(self, what: Map, known: set[str], *, ask: bool = False) -> Wire:
        has = what.file in known
        if ask:
            self.say(PARENT, target=what.target).hear(struct.pack("<i", has))
        self.say(OPEN, target=what.target).hear(bytes([has]))
        for vaddr, pages, flags, data in what.runs:
            self.say(ADD | flags << 16, pages, vaddr, what.target)
            self.pending += data
        return self

    def close(self, command: int = FORCE_CLOSE) -> Wire:
        return self.say(command).hear(bytes(4))


def session(maps: list[Map], known: set[str] = frozenset(), wire: int = 1) -> Wire:  # type: ignore[assignment]
    sent = Wire(wire)
    for number, each in enumerate(maps):
        sent.map(each, known, ask=bool(number % 2))
    return sent.close()


class Line:
    """A sink in a thread, and the source's end of its stream."""

    def __init__(
        self,
        directory: Path,
        parent: dict[str, Listed] | None = None,
        wire: int = 1,
        ahead: Preallocation | None = None,
        tcp: bool = False,
        images: int = 0,
    ) -> None:
        directory.mkdir()
        if tcp:
            with socket.create_server(("127.0.0.1", 0)) as server:
                self.ours = socket.create_connection(server.getsockname())
                self.theirs = server.accept()[0]
        else:
            self.ours, self.theirs = socket.socketpair()
        self.ours.settimeout(20)
        self.sink = PageReceiver(
            self.theirs.fileno(),
            directory,
            wire=PageFormat(wire),
            images=PageFormat(images or wire),
            parent=parent or {},
            ahead=ahead,
        )
        self.result: dict[str, Listed] | Exception | None = None
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        try:
            self.result = self.sink.run()
        except Exception as error:  # noqa: BLE001 - looked at by the test
            self.result = error

    def send(self, sent: Wire, chunk: int = 1 << 20) -> None:
        for data, answer in sent.parts:
            for at in range(0, len(data), chunk):
                self.ours.sendall(data[at : at + chunk])
            got = b""
            while len(got) < len(answer):
                part = self.ours.recv(len(answer) - len(got))
                assert part, self.failed()
                got += part
            assert got == answer

    def over(self) -> dict[str, Listed]:
        self.thread.join(20)
        assert isinstance(self.result, dict), self.result
        self.sink.close()
        self.sink.close()
        return self.result

    def failed(self) -> str:
        self.thread.join(20)
        assert isinstance(self.result, DestinationError), self.result
        self.sink.close()
        return self.result.message

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()
        self.thread.join(20)
        self.sink.close()


def same(directory: Path, maps: list[Map], written: int = 1) -> None:
    """The images say what was sent, as a reader of CRIU's images sees it."""
    assert len(list(directory.glob("*.img"))) == 2 * len(maps)
    for number, each in enumerate(maps, 1):
        found = read_pagemap(directory / each.file)
        assert found.pages_id == number
        assert found.entries == [run[:3] for run in each.runs]
        assert found.format == (written if each.runs else 1)
        pages = directory / f"pages-{number}.img"
        assert pages.read_bytes() == b"".join(run[3] for run in each.runs)
        assert pages.stat().st_mode & 0o777 == 0o600


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory on a memory file system."""
    directory = Path(tempfile.mkdtemp(dir=SHM))
    yield directory
    shutil.rmtree(directory)


RUNS = st.lists(
    st.tuples(
        st.sampled_from([0, 0, 1, 2, 60]),  # pages left out before it
        st.sampled_from([1, 1, 2, 3, 15, 16, 17, 40, 130]),
        st.sampled_from([PRESENT, PRESENT | LAZY, IN_PARENT, IN_PARENT | LAZY]),
        st.integers(1, 1 << 30),
    ),
    max_size=20,
)
MAPS = st.lists(
    st.tuples(st.sampled_from([1, 2]), st.integers(0, 3), RUNS),
    max_size=5,
    unique_by=lambda each: each[:2],
)


def made(
    drawn: list[tuple[int, int, list[tuple[int, int, int, int]]]], old: list[Map]
) -> list[Map]:
    """Maps of what was drawn; a hole only where the map before has all of its pages."""
    maps = []
    for kind, number, runs in drawn:
        each, at = Map(kind, number), 0
        before = [
            page
            for one in old
            if one.target == each.target
            for vaddr, pages, _, _ in one.runs
            for page in range(vaddr // PAGE, vaddr // PAGE + pages)
        ]
        listed = set(before)
        for gap, pages, flags, seed in runs:
            at += gap
            hole = flags & IN_PARENT and listed.issuperset(range(at, at + pages))
            each.add(at * PAGE, pages, flags if hole or flags & PRESENT else PRESENT, seed)
            at += pages
        maps.append(each)
    return maps


@settings(max_examples=60, deadline=None)
@given(
    rounds=st.lists(MAPS, min_size=1, max_size=3),
    wire=st.sampled_from([1, 2]),
    written=st.sampled_from([1, 2]),
    chunk=st.sampled_from([1 << 20, 100_000, 4099, 333]),
    tcp=st.booleans(),
    expected=st.sampled_from([0, PAGE, 3 << 20, 40 << 20]),
)
def test_what_is_sent_is_what_the_images_have(
    rounds: list[list[tuple[int, int, list[tuple[int, int, int, int]]]]],
    wire: int,
    written: int,
    chunk: int,
    tcp: bool,
    expected: int,
) -> None:
    directory = Path(tempfile.mkdtemp(dir=SHM))
    index = PageIndex()
    room: Preallocation | None = Preallocation(directory / "ahead.img", expected)
    assert room is not None
    room.begin()
    try:
        parent: dict[str, Listed] = {}
        maps: list[Map] = []
        for number, drawn in enumerate(rounds, 1):
            maps = made(drawn, maps)
            images = directory / str(number)
            line = Line(images, parent, wire, room, tcp, written)
            room = None
            if number > 1:
                (images / "parent").symlink_to(f"../{number - 1}")
            sent = session(maps, {f"{name}.img" for name in parent}, wire)
            try:
                line.send(sent, chunk)
                parent = line.over()
            finally:
                line.close()
            same(images, maps, written)
            assert line.sink.received == sum(len(data) for data, _ in sent.parts)
            index.add(images)
            assert not (directory / "ahead.img").exists()
    finally:
        shutil.rmtree(directory)


def test_the_stream_goes_on_after_a_session(tmp_path: Path) -> None:
    """The same socket serves every iteration, and what was allocated ahead is for the first."""
    first = [Map(1, 7).add(PAGE, 300, PRESENT)]
    second = [Map(1, 7).add(PAGE, 200, IN_PARENT).add(201 * PAGE, 3, PRESENT)]
    line = Line(tmp_path / "1")
    line.send(session(first))
    parent = line.over()
    narrow = PageFormat.NARROW
    again = PageReceiver(line.theirs.fileno(), tmp_path, wire=narrow, images=narrow, parent=parent)
    line.sink, line.thread = again, threading.Thread(target=line.run)
    line.thread.start()
    line.send(session(second, {"pagemap-7.img"}))
    line.over()
    same(tmp_path, second)
    line.close()


def test_both_ways_to_close(tmp_path: Path) -> None:
    line = Line(tmp_path / "1")
    line.send(Wire().map(Map(1, 1), set()).close(CLOSE))
    assert list(line.over()) == ["pagemap-1"]
    line.close()


BAD = {
    "unknown command 9": Wire().say(9),
    "unknown command 1": Wire().say(1, 1, PAGE, 0x101),
    "unknown kind 3": Wire().say(OPEN, target=0x103),
    "unknown kind 0": Wire().say(PARENT, target=0x100),
    "not open": Wire().say(ADD | PRESENT << 16, 1, PAGE, 0x101),
    "came twice": Wire().map(Map(1, 1), set()).say(OPEN, target=0x101),
    "0 pages at": Wire().map(Map(1, 1).add(PAGE, 0, PRESENT), set()),
    "pages at 0x1800": Wire().map(Map(1, 1).add(PAGE + 0x800, 1, PRESENT), set()),
    "pages at 0x1000,": Wire().map(Map(1, 1).add(PAGE, 2, PRESENT).add(PAGE, 1, PRESENT), set()),
    "flags 0": Wire().map(Map(1, 1).add(PAGE, 1, 0), set()),
    "flags 2": Wire().map(Map(1, 1).add(PAGE, 1, LAZY), set()),
    "flags 5": Wire().map(Map(1, 1).add(PAGE, 1, PRESENT | IN_PARENT), set()),
    "flags 12": Wire().map(Map(1, 1).add(PAGE, 1, PRESENT | 8), set()),
    "is not in the parent": Wire().map(Map(1, 1).add(PAGE, 1, IN_PARENT), set()),
    "pages at 0xfffffffffffff000": Wire().map(Map(1, 1).add((1 << 64) - PAGE, 1, PRESENT), set()),
    "behind the end": Wire().say(FORCE_CLOSE).say(OPEN, target=0x101),
    "pages-shmem": Wire().map(Map(2, 1), set()).say(ADD | PRESENT << 16, 1, PAGE, 0x101),
}


@pytest.mark.parametrize("says", BAD)
def test_what_no_page_map_can_hold_is_refused(tmp_path: Path, says: str) -> None:
    line = Line(tmp_path / "1")
    line.send(BAD[says])
    line.ours.sendall(BAD[says].pending)
    found = line.failed()
    assert says.replace("pages-shmem", "pages for pagemap-1, which is not open") in found
    line.close()


def test_more_pages_than_a_page_map_can_count(tmp_path: Path) -> None:
    line = Line(tmp_path / "1", wire=2)
    line.send(Wire(2).map(Map(1, 1), set()))
    line.ours.sendall(Wire(2).say(ADD | PRESENT << 16, 1 << 33, PAGE, 0x101).pending)
    assert f"{1 << 33} pages at 0x1000" in line.failed()
    line.close()


def test_a_hole_is_in_the_parent_as_a_whole(tmp_path: Path) -> None:
    parent = Map(1, 1).add(PAGE, 2, PRESENT).add(3 * PAGE, 2, PRESENT).add(6 * PAGE, 1, PRESENT)
    for number, (vaddr, pages, fits) in enumerate(
        [(1, 4, True), (2, 3, True), (6, 1, True), (4, 3, False), (5, 1, False), (7, 1, False)]
    ):
        directory = tmp_path / str(number)
        directory.mkdir()
        line = Line(directory / "1")
        line.send(session([parent]))
        listed = line.over()
        line.close()
        line = Line(directory / "2", listed)
        hole = Map(1, 1).add(vaddr * PAGE, pages, IN_PARENT)
        if fits:
            line.send(session([hole], {"pagemap-1.img"}))
            line.over()
        else:
            sent = Wire().map(hole, {"pagemap-1.img"})
            line.send(sent)
            line.ours.sendall(sent.pending)
            assert "is not in the parent" in line.failed()
        line.close()


def test_a_stream_that_is_cut_anywhere_fails(tmp_path: Path) -> None:
    maps = [
        Map(1, 1).add(PAGE, 1, PRESENT).add(3 * PAGE, 40, PRESENT),
        Map(2, 5).add(0, 1, PRESENT),
    ]
    parts = session(maps).parts
    size = sum(len(data) for data, _ in parts)
    for number, cut in enumerate([*range(130), 4000, 4200, *range(5000, size, 7000), size - 1]):
        line = Line(tmp_path / str(number))
        left = cut
        for data, answer in parts:
            line.ours.sendall(data[:left])
            if left < len(data):
                break
            left -= len(data)
            assert line.ours.recv(len(answer)) == answer
        line.ours.close()
        assert "closed before the round was over" in line.failed()
        line.close()


def test_a_connection_that_is_reset_fails(tmp_path: Path) -> None:
    line = Line(tmp_path / "1", tcp=True)
    line.send(Wire().map(Map(1, 1), set()))
    line.ours.sendall(Wire().say(ADD | PRESENT << 16, 100, PAGE, 0x101).pending + bytes(PAGE))
    line.ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    line.ours.close()
    assert "pagemap-1: " in line.failed()
    line.close()


@pytest.mark.parametrize("where", ["header", "small", "big", "ahead"])
def test_it_can_be_stopped_wherever_it_waits(memory: Path, where: str) -> None:
    room = Preallocation(memory / "ahead.img", 64 << 20)
    if where == "ahead":
        room.begin()
    line = Line(memory / "1", ahead=room)
    if where != "ahead":
        line.send(Wire().map(Map(1, 1), set()))
    if where in ("small", "big"):
        pages = 2 if where == "small" else 1000
        line.ours.sendall(Wire().say(ADD | PRESENT << 16, pages, PAGE, 0x101).pending + b"x" * 99)
    time.sleep(0.1)
    assert line.thread.is_alive()
    line.sink.stop()
    line.thread.join(20)
    assert isinstance(line.result, Aborted)
    line.close()
    assert not (memory / "ahead.img").exists()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A memory file system of 1 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", "size=1M", "none", str(place)]
    if subprocess.run(argv, check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.parametrize("pages", [1, 15, 1000])
@pytest.mark.parametrize("expected", [0, 4 << 20])
def test_a_full_disk_is_told(small: Path, pages: int, expected: int) -> None:
    room = Preallocation(small / "ahead.img", expected)
    room.begin()
    line = Line(small / "1", ahead=room)
    line.ours.settimeout(1)  # nobody hangs up
    line.send(Wire().map(Map(1, 1), set()))
    with contextlib.suppress(OSError):
        for number in range(1200 // pages):
            vaddr = number * (pages + 1) * PAGE
            line.ours.sendall(Wire().say(ADD | PRESENT << 16, pages, vaddr, 0x101).pending)
            line.ours.sendall(bytes(pages * PAGE))
            if not line.thread.is_alive():
                break
    assert line.failed() == "pagemap-1: No space left on device"
    line.close()


# -- room ahead ----------------------------------------------------------------------------


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def wait(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_room_is_made_used_and_given_back(memory: Path) -> None:
    room = Preallocation(memory / "ahead.img", 9 << 20)
    room.begin()
    wait(lambda: room.allocated == 9 << 20)
    assert allocated(room.path) == 9 << 20
    inode = room.path.stat().st_ino
    small = Map(1, 1).add(PAGE, 3, PRESENT)
    big = Map(1, 2).add(PAGE, 3, PRESENT).add(8 * PAGE, 200, PRESENT).add(300 * PAGE, 1, PRESENT)
    other = Map(2, 2).add(0, 400, PRESENT)
    line = Line(memory / "1", ahead=room)
    line.send(session([small, big, other]))
    line.over()
    line.close()
    same(memory / "1", [small, big, other])
    used = memory / "1" / "pages-2.img"
    assert used.stat().st_ino == inode
    assert allocated(used) == 204 * PAGE
    assert not room.path.exists()


def test_a_page_map_that_has_grown_already_keeps_its_file(memory: Path) -> None:
    room = Preallocation(memory / "ahead.img", 9 << 20)
    room.begin()
    each = Map(1, 1)
    for number in range(40):
        each.add(number * 40 * PAGE, 4, PRESENT)
    each.add(4000 * PAGE, 300, PRESENT)
    line = Line(memory / "1", ahead=room)
    line.send(session([each]))
    assert not room.taken
    line.over()
    line.close()
    same(memory / "1", [each])


def test_room_is_made_while_nothing_comes(memory: Path) -> None:
    room = Preallocation(memory / "ahead.img", 20 << 20)
    room._stop.set()
    room.begin()
    assert room.claim()
    assert room.allocated == 0
    line = Line(memory / "1", ahead=room)
    wait(lambda: room.allocated == 20 << 20)
    line.send(session([Map(1, 1).add(0, 1000, PRESENT)]))
    line.over()
    line.close()


@pytest.mark.parametrize("scarce", ["memory", "space"])
def test_no_room_is_made_where_it_is_scarce(
    memory: Path, monkeypatch: pytest.MonkeyPatch, scarce: str
) -> None:
    expected = 8 << 20
    if scarce == "memory":
        monkeypatch.setattr(ahead_module, "memory_available", lambda: 2 * expected)
    else:
        expected = shutil.disk_usage(memory).free
        monkeypatch.setattr(ahead_module, "memory_available", lambda: 1 << 60)
    room = Preallocation(memory / "ahead.img", expected)
    room.begin()
    room.claim()
    assert not room.step()
    assert room.allocated == 0
    each = Map(1, 1).add(0, 300, PRESENT)
    line = Line(memory / "1", ahead=room)
    line.send(session([each]))
    line.over()
    line.close()
    same(memory / "1", [each])


def test_no_room_is_made_on_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead_module, "filesystem_of", lambda _: "ext4")
    room = Preallocation(tmp_path / "ahead.img", 8 << 20)
    room.begin()
    assert not room.claim()
    room.drop()
    assert list(tmp_path.iterdir()) == []


def test_room_that_nobody_wanted_is_given_back(memory: Path) -> None:
    room = Preallocation(memory / "ahead.img", 8 << 20)
    room.begin()
    for _ in range(2):
        room.drop()
    assert list(memory.iterdir()) == []
