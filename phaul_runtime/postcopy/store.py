"""The destination's files for pages that come over the network: they outlive an agent.

Written by one agent at a time, read by the pager at the same time. A page counts only once its
byte in the map says so, which is written behind its data.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from phaul_runtime.errors import DestinationError
from phaul_runtime.memory.fill_plan import PAGE
from phaul_runtime.memory.mark_lazy import MAP
from phaul_runtime.memory.preallocate import Preallocation

PAGES = "remote.pages"
_MISSING, _HERE = b"\0", b"\1"


class PageStore:
    """Pages by number, and which of them are here. One writer; `create` or `open` make one."""

    def __init__(self, directory: Path, file: int, flags: mmap.mmap | None) -> None:
        # Without any pages there is nothing to map.
        self.directory = directory
        self._file = file
        self._flags = flags
        self._total = 0 if flags is None else len(flags)
        self._missing = self._total - (0 if flags is None else flags[:].count(_HERE))

    @classmethod
    def create(cls, directory: Path, pages: int, room: Preallocation | None = None) -> PageStore:
        """Make the files, with nothing in them. Earlier ones go; who has them open keeps them.

        There is room for every page from now on: nothing else can fill the file system after the
        commit, when the source's pages are the only ones.

        Args:
            directory: where to, for as long as the pager works.
            pages: how many there will be.
            room: what was allocated for them before the freeze, on the same file system.

        Raises:
            DestinationError: they cannot be made, or there is no room for them.
        """
        try:
            # Without a map there is no store: it goes first and comes last.
            for name in (MAP, PAGES):
                (directory / name).unlink(missing_ok=True)
            _make_room(directory / PAGES, pages * PAGE, room)
            new = directory / f"{MAP}.new"
            new.unlink(missing_ok=True)
            file = _new(new)
            try:
                # Not sparse: a full disk must not be found out by a signal.
                if pages:
                    os.posix_fallocate(file, 0, pages)
            finally:
                os.close(file)
            new.replace(directory / MAP)
        except OSError as error:
            raise DestinationError(
                f"cannot make the store of pages in {directory}: {error.strerror}"
            ) from error
        return cls.open(directory)

    @classmethod
    def open(cls, directory: Path) -> PageStore:
        """Take up the files that are there, of an earlier agent for instance.

        Raises:
            DestinationError: they are not there, or do not fit each other.
        """
        try:
            file = os.open(directory / MAP, os.O_RDWR | os.O_CLOEXEC)
            try:
                total = os.fstat(file).st_size
                flags = mmap.mmap(file, total) if total else None
            finally:
                os.close(file)
            file = os.open(directory / PAGES, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise DestinationError(
                f"cannot open the store of pages in {directory}: {error.strerror}"
            ) from error
        if os.fstat(file).st_size != total * PAGE:
            os.close(file)
            raise DestinationError(f"the store of pages in {directory} is cut short")
        return cls(directory, file, flags)

    @property
    def total(self) -> int:
        """How many pages there will be."""
        return self._total

    @property
    def missing_pages(self) -> int:
        """How many have not come."""
        return self._missing

    @property
    def complete(self) -> bool:
        """Whether all have come."""
        return self._missing == 0

    def has(self, page: int) -> bool:
        """Whether a page has come."""
        return self._flags is not None and self._flags[page] == _HERE[0]

    def flags(self) -> bytes:
        """The map: a byte for each page, 1 if it is here."""
        return b"" if self._flags is None else self._flags[:]

    def missing(self) -> list[tuple[int, int]]:
        """What has not come: (first page, pages), rising."""
        flags, found, at = self.flags(), [], 0
        while (first := flags.find(_MISSING, at)) >= 0:
            at = flags.find(_HERE, first)
            at = self._total if at < 0 else at
            found.append((first, at - first))
        return found

    def put(self, first: int, data: bytes | bytearray | memoryview) -> None:
        """Keep pages with adjacent numbers; what was there already may come again.

        Raises:
            DestinationError: there are no such pages, it is no whole number of them, they cannot
                be written, or the store is closed.
        """
        if self._file < 0:
            raise DestinationError(f"the store of pages in {self.directory} is closed")
        view = memoryview(data)
        count, rest = divmod(len(view), PAGE)
        if rest or first < 0 or first + count > self._total:
            raise DestinationError(
                f"no place for {len(view)} bytes at page {first}, in a store of {self._total}"
            )
        if self._flags is None or not count:
            return
        offset = first * PAGE
        try:
            # Not by a map of memory: a full disk is an error here, and a signal there.
            while view:
                done = os.pwrite(self._file, view, offset)
                view, offset = view[done:], offset + done
        except OSError as error:
            raise DestinationError(
                f"cannot write {self.directory / PAGES}: {error.strerror}"
            ) from error
        self._missing -= self._flags[first : first + count].count(_MISSING)
        self._flags[first : first + count] = _HERE * count

    def close(self) -> None:
        """Close the files, which stay; idempotent."""
        flags, self._flags = self._flags, None
        if flags is not None:
            flags.close()
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)


def _make_room(path: Path, size: int, room: Preallocation | None) -> None:
    """Make a file of `size` bytes, each of them allocated; `room` is used up."""
    there = 0
    if room is not None and room.claim():
        file, there = room.take(path), room.allocated
        room.drop()
    else:
        file = _new(path)
    try:
        os.truncate(file, size)
        if size > there:
            os.posix_fallocate(file, there, size - there)
    finally:
        os.close(file)


def _new(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
