"""The receiving end of CRIU's page-server protocol: an iteration's pages, straight into its images.

What it writes is what CRIU's own page server writes (`pagemap-*.img`, `pages-*.img`), so that a
restore reads the chain as ever. It speaks as the source's CRIU does and writes what the CRIU here
reads, which may be of another version. Beside it there is no process to start for a round, the
bytes are counted as they come, and room for them can have been made before (`preallocate`).

A session (criu/page-xfer.c): headers, each with a command; OPEN2 begins a page map, ADD_F adds a
run of pages to it, which follow unless they are in the parent; FORCE_CLOSE ends it. What comes is
checked: only what a page map can hold gets into one, and names are made of numbers alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import struct
from array import array
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from phaul_runtime.criu.page_format import PageFormat
from phaul_runtime.errors import DestinationError
from phaul_runtime.memory.fill_plan import PAGE
from phaul_runtime.memory.pagemap import (
    IN_PARENT,
    LAZY,
    MOST_PAGES,
    PRESENT,
    Entry,
    Pagemap,
    write_pagemap,
)
from phaul_runtime.memory.preallocate import Preallocation

_OPEN, _PARENT, _ADD, _CLOSE, _FORCE_CLOSE = 4, 5, 6, 0x1023, 0x1024
_COMMAND_BITS = 16
_KINDS = {1: "pagemap", 2: "pagemap-shmem"}
_KIND_BITS = 8
_ANSWER = struct.Struct("<i")
_END = 1 << 64
_BUFFER = 256 << 10
_PIPE = 1 << 20
# IOV_MAX
_PARTS = 1024
# From so many bytes on pages go into their file without the way through the buffer.
_DIRECT = 64 << 10
# A page map that has as many at once is worth the room that was made ahead.
_BIG = 512 << 10


class Aborted(Exception):
    """The session was ended by `stop`."""


class Listed:
    """The pages that a page map lists, as ranges that do not touch; grows by rising addresses."""

    def __init__(self) -> None:
        self._begins = array("Q")
        self._ends = array("Q")

    def add(self, begin: int, end: int) -> None:
        """Another range, behind all others; an empty one is none."""
        if begin < end:
            self._begins.append(begin)
            self._ends.append(end)

    def has(self, begin: int, end: int) -> bool:
        """Whether all pages from `begin` to `end` are listed."""
        at = bisect_right(self._begins, begin) - 1
        return at >= 0 and end <= self._ends[at]


@dataclass
class _Map:
    """A page map that is being received."""

    target: int
    name: str
    number: int
    pages: int  # descriptor of its pages file
    parent: Listed | None
    offset: int = 0  # of what comes next in it
    begin: int = 0  # of the last run of entries without a gap
    end: int = 0
    entries: list[Entry] = field(default_factory=list)
    listed: Listed = field(default_factory=Listed)


class PageReceiver:
    """One session: an iteration's pages from `channel` into `directory`.

    `run` once, in any thread; `stop` and `received` from any other.

    Args:
        channel: descriptor of a stream socket; it is duplicated, and open when the session is over.
        directory: empty, private.
        wire: in which the source's CRIU sends.
        images: in which the CRIU here reads page maps.
        parent: what the page maps of the parent list, by name; of no parent nothing.
        ahead: room for the pages; what is not used of it is given back.
    """

    def __init__(
        self,
        channel: int,
        directory: Path,
        *,
        wire: PageFormat,
        images: PageFormat,
        parent: Mapping[str, Listed],
        ahead: Preallocation | None = None,
    ) -> None:
        self._header = wire.header
        self._images = images
        self._directory = directory
        self._parent = parent
        self._ahead = ahead
        self._channel = socket.socket(fileno=os.dup(channel))
        # Answers are waited for; no stream of another kind knows it.
        with contextlib.suppress(OSError):
            self._channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(self._channel, select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)
        self._buffer = memoryview(bytearray(_BUFFER))
        self._begin = self._end = 0  # of what was received and not looked at
        self._unwritten: list[memoryview] = []  # lies in the buffer before it
        self._just_header = False
        self._pipe: tuple[int, int] | None = None
        self._map: _Map | None = None
        self._lists: dict[str, Listed] = {}
        self._closed = False
        self.received = 0
        """Bytes that came so far."""

    def stop(self) -> None:
        """End `run` with `Aborted`, whatever it waits for; not after `close`."""
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Once `run` is over: give back what it needed; idempotent."""
        if self._closed:
            return
        self._closed = True
        self._channel.close()
        os.close(self._wake)
        for fd in self._pipe or ():
            os.close(fd)
        if self._map is not None:
            os.close(self._map.pages)
        self._drop_ahead()

    def run(self) -> dict[str, Listed]:
        """Receive until the client closes the session, and answer it once everything is written.

        Returns:
            What the page maps list: `parent` of the next.

        Raises:
            DestinationError: the stream ended before that or is malformed, or it cannot be written.
            Aborted: `stop` was called.
        """
        if self._ahead is not None and not self._ahead.claim():
            self._ahead = None
        try:
            while self._command():
                pass
        except OSError as error:
            raise DestinationError(f"{self._where()}{error.strerror}") from error
        return self._lists

    def _where(self) -> str:
        return f"{self._map.name}: " if self._map else ""

    # -- commands --------------------------------------------------------------------------

    def _command(self) -> bool:
        """Take the next; False if it was the last."""
        header = self._header
        while self._end - self._begin < header.size:
            self._receive(header.size)
        command, pages, vaddr, target = header.unpack_from(self._buffer, self._begin)
        self._begin += header.size
        flags, command = command >> _COMMAND_BITS, command & ((1 << _COMMAND_BITS) - 1)
        if command == _ADD:
            self._add(flags, pages, vaddr, target)
        elif command == _OPEN:
            self._answer(b"\0" if self._open(target).parent is None else b"\1")
        elif command == _PARENT:
            self._answer(_ANSWER.pack(_name(target) in self._parent))
        elif command in (_CLOSE, _FORCE_CLOSE):
            self._finish()
            self._drop_ahead()
            if self._begin < self._end:
                raise DestinationError("more came behind the end of the round")
            self._answer(_ANSWER.pack(0))
            return False
        else:
            raise DestinationError(f"the source's CRIU sent the unknown command {command}")
        return True

    def _open(self, target: int) -> _Map:
        self._finish()
        name, number = _name(target), len(self._lists) + 1
        if name in self._lists:
            raise DestinationError(f"{name} came twice")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        pages = os.open(self._pages_path(number), flags, 0o600)
        self._map = _Map(target, name, number, pages, self._parent.get(name))
        self._lists[name] = self._map.listed
        return self._map

    def _pages_path(self, number: int) -> Path:
        return self._directory / f"pages-{number}.img"

    def _finish(self) -> None:
        """The page map is complete, if there is one."""
        if self._map is None:
            return
        self._write()
        if self._ahead is not None and self._ahead.taken:
            self._drop_ahead()
        done = self._map
        done.listed.add(done.begin, done.end)
        os.ftruncate(done.pages, done.offset)
        pagemap = Pagemap(done.number, done.entries, self._images)
        write_pagemap(self._directory / f"{done.name}.img", pagemap)
        self._map = None
        os.close(done.pages)

    def _add(self, flags: int, pages: int, vaddr: int, target: int) -> None:
        to = self._map
        if to is None or to.target != target:
            raise DestinationError(f"pages for {_name(target)}, which is not open")
        size = pages * PAGE
        end = vaddr + size
        there = flags & ~LAZY
        if (
            not 0 < pages <= MOST_PAGES
            or vaddr % PAGE
            or vaddr < to.end
            or end >= _END
            or there not in (PRESENT, IN_PARENT)
        ):
            raise DestinationError(f"{to.name}: {pages} pages at {vaddr:#x}, flags {flags}")
        if there == IN_PARENT and (to.parent is None or not to.parent.has(vaddr, end)):
            raise DestinationError(f"{to.name}: {vaddr:#x} to {end:#x} is not in the parent")
        if vaddr != to.end:
            to.listed.add(to.begin, to.end)
            to.begin = vaddr
        to.end = end
        to.entries.append((vaddr, pages, flags))
        if there == PRESENT:
            if size >= _BIG and self._ahead is not None and not self._ahead.taken:
                self._use_ahead(to, self._ahead)
            self._pages(to, size)

    # -- pages -----------------------------------------------------------------------------

    def _use_ahead(self, to: _Map, ahead: Preallocation) -> None:
        """The first page map with a big run gets the room that was made; little is there yet."""
        self._write()
        if to.offset > _BUFFER:
            return
        old = to.pages
        data = os.pread(old, to.offset, 0)
        to.pages = ahead.take(self._pages_path(to.number))
        os.close(old)
        to.offset = _write_all(to.pages, [memoryview(data)], 0)

    def _drop_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead.drop()
            self._ahead = None

    def _pages(self, to: _Map, size: int) -> None:
        while size:
            here = min(size, self._end - self._begin)
            if here:
                self._unwritten.append(self._buffer[self._begin : self._begin + here])
                self._begin += here
                size -= here
            elif size >= _DIRECT:
                self._write()
                self._direct(to, size)
                self._just_header = True
                return
            else:
                self._receive(size)

    def _direct(self, to: _Map, size: int) -> None:
        if self._pipe is None:
            self._pipe = os.pipe()
            # More than it may be where this is not root.
            with contextlib.suppress(OSError):
                fcntl.fcntl(self._pipe[1], fcntl.F_SETPIPE_SZ, _PIPE)
        out, into = self._pipe
        how = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
        while size:
            self._wait()
            there = os.splice(self._channel.fileno(), into, size, flags=how)
            if not there:
                raise DestinationError(self._cut())
            self.received += there
            size -= there
            while there:
                written = os.splice(out, to.pages, there, offset_dst=to.offset)
                to.offset += written
                there -= written

    def _write(self) -> None:
        """Write what lies in the buffer."""
        if self._unwritten and self._map is not None:
            self._map.offset = _write_all(self._map.pages, self._unwritten, self._map.offset)
        self._unwritten.clear()

    # -- the stream ------------------------------------------------------------------------

    def _receive(self, wanted: int) -> None:
        """More into the buffer; what was looked at is written before it is overwritten.

        `wanted` bytes are needed. After pages that did not go through the buffer no more are taken:
        others like them may follow.
        """
        if self._begin:
            self._write()
            rest = self._end - self._begin
            self._buffer[:rest] = bytes(self._buffer[self._begin : self._end])
            self._begin, self._end = 0, rest
        behind = min(wanted, _BUFFER) if self._just_header else _BUFFER
        self._just_header = False
        while True:
            try:
                size = self._channel.recv_into(
                    self._buffer[self._end : behind], flags=socket.MSG_DONTWAIT
                )
                break
            except BlockingIOError:
                self._wait()
        if not size:
            raise DestinationError(self._cut())
        self._end += size
        self.received += size

    def _wait(self) -> None:
        """Until something comes; until then room is made for it."""
        while True:
            ready = self._poll.poll(None if self._ahead is None else 0)
            if not ready and not self._make_room():
                ready = self._poll.poll()
            if any(fd == self._wake for fd, _ in ready):
                raise Aborted
            if ready:
                return

    def _make_room(self) -> bool:
        ahead, to = self._ahead, self._map
        return ahead is not None and ahead.step(to.offset if to and ahead.taken else 0)

    def _cut(self) -> str:
        return f"{self._where()}the memory channel was closed before the round was over"

    def _answer(self, data: bytes) -> None:
        self._channel.sendall(data)


def _name(target: int) -> str:
    """Of the page map that a header is about, without the suffix."""
    kind, number = target & ((1 << _KIND_BITS) - 1), target >> _KIND_BITS
    if kind not in _KINDS:
        raise DestinationError(f"the source's CRIU sent pages of the unknown kind {kind}")
    return f"{_KINDS[kind]}-{number}"


def _write_all(fd: int, parts: list[memoryview], offset: int) -> int:
    """Write them one after the other; returns the offset behind them."""
    end = offset + sum(map(len, parts))
    while offset < end:
        written = os.pwritev(fd, parts[:_PARTS], offset)
        offset += written
        while parts and written >= len(parts[0]):
            written -= len(parts.pop(0))
        if written:
            parts[0] = parts[0][written:]
    return offset
