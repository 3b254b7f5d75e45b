"""What the working process leaves to its twin: memory that both share.

The twin was born with a copy of all that the working one knew then. What came since stands here,
in order: what was read from the kernel and from CRIU, and what was done about it. The twin reads it
only once the other is dead.

Why nothing is lost between a reading and its record: there is no between. The system call itself
writes into the shared memory, and SIGKILL takes effect only when the call returns to the program:
an event is either still with the kernel or here. The memory is locked, since a page fault inside
the call could fail under a fatal signal and take the event along.

A record is filled in first and counted afterwards. One that a system call fills is valid from the
call on: the twin looks at the first uncounted record too. A page fault is not counted, the next
reading goes over it: so the last one read is always still here, answered or not, and answering it
again does no harm (a page that is there is left alone).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

from phaul_runtime.pager.uffd import MESSAGE_SIZE, libc

RECORDS = 16384
_SIZE = 64
_BODY = 16
_HEAD = struct.Struct("=IIQ")
_RANGE = struct.Struct("=QQ")
_NOTE = struct.Struct("=QQQ")
_FATE = struct.Struct("=16xQ")
_SINCE = struct.Struct("=32xQ")
_BODY_SIZE = _SIZE - _BODY
_FRONT = _MOST_PATH = mmap.PAGESIZE
_MOST_RESULT = 4 * mmap.PAGESIZE

# Words of the board.
STAGE, HEIR, WORKER, KEEPER, CLEAN = range(5)
FINISHED_NS, LAST_NS, FAULTS, WORST_NS, PLANS, TAKEN_OVER = range(5, 11)
WAITING, LISTENING, RUNNING, DONE, STOPPED = range(5)

_mlock = libc.mlock
_mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class Kind(IntEnum):
    """What a record tells."""

    NOTHING = 0
    EVENT = 1
    """The kernel's message of a task."""
    SAID = 2
    """Four bytes of CRIU's: a pid, or that it is finished."""
    HANDED = 3
    """A control message of CRIU's with a userfaultfd."""
    RESET = 4
    """The attempt failed, nothing of it runs."""
    SETTLED = 5
    """Nothing of a range is missing any more, and why (`account.Fate`)."""
    ENDED = 6
    """Nothing more to do for a task."""
    KNOWN = 7
    """A task's pid on this host, in the place of a range's start."""
    LATE = 8
    """An area is about to be registered that nobody served while its process ran."""


class Record(NamedTuple):
    """One record."""

    kind: int
    task: int
    body: bytes

    @property
    def range(self) -> tuple[int, int]:
        """Start and end, of SETTLED and LATE."""
        start, end = _RANGE.unpack_from(self.body)
        return start, end

    @property
    def fate(self) -> int:
        """The outcome, of SETTLED."""
        (fate,) = _FATE.unpack_from(self.body)
        return int(fate)

    @property
    def since(self) -> int:
        """Since when the one whose fault an EVENT tells has waited, monotonic ns; 0: not known."""
        (since,) = _SINCE.unpack_from(self.body)
        return int(since)


class Board:
    """Numbers, the path of the plan and the result: what both see for as long as either lives."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _FRONT + _MOST_PATH + _MOST_RESULT)
        self._words = memoryview(self._memory)[:_FRONT].cast("q")

    @property
    def path(self) -> str:
        """Of the plan that was taken last."""
        return os.fsdecode(self._memory[_FRONT : _FRONT + _MOST_PATH].rstrip(b"\0"))

    @path.setter
    def path(self, path: str) -> None:
        data = os.fsencode(path)
        if len(data) > _MOST_PATH:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        self._memory[_FRONT : _FRONT + _MOST_PATH] = data.ljust(_MOST_PATH, b"\0")

    @property
    def result(self) -> str:
        """What is left behind once the last page is in, as JSON; empty before."""
        return self._memory[_FRONT + _MOST_PATH :].rstrip(b"\0").decode()

    @result.setter
    def result(self, result: str) -> None:
        data = result.encode()
        if len(data) > _MOST_RESULT:
            raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
        self._memory[_FRONT + _MOST_PATH :] = data.ljust(_MOST_RESULT, b"\0")

    def __getitem__(self, at: int) -> int:
        return self._words[at]

    def __setitem__(self, at: int, value: int) -> None:
        self._words[at] = value


class SharedLog:
    """The records since a twin was born; a new twin gets a new one."""

    def __init__(self) -> None:
        size = _FRONT + RECORDS * _SIZE
        # Shared and anonymous: no file, and nobody else can open it.
        self._memory = mmap.mmap(-1, size)
        self._view = memoryview(self._memory)
        self._count = self._view[:8].cast("q")
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        if _mlock(self._address, size):
            self._view[:] = bytes(size)
        self._at = 0
        self._mark = (-1, -1)
        self._settled = (-1, 0, 0)
        self._slot()

    def _slot(self) -> None:
        base = _FRONT + self._at * _SIZE
        self._base = base
        self.message = self._view[base + _BODY : base + _BODY + MESSAGE_SIZE]

    @property
    def full(self) -> bool:
        """Time for a new twin."""
        return self._at >= RECORDS - 4096

    @property
    def body_address(self) -> int:
        """Where a system call writes to."""
        return self._address + self._base + _BODY

    @property
    def body(self) -> bytes:
        """What the system call wrote."""
        return bytes(self._view[self._base + _BODY : self._base + _SIZE])

    def expect(self, kind: Kind, task: int) -> None:
        """Get the record ready that the next system call fills."""
        if self._mark != (kind, task):
            base = self._base
            self._view[base + _BODY : base + _SIZE] = bytes(_BODY_SIZE)
            _HEAD.pack_into(self._view, base, kind, task, 0)
            self._mark = (kind, task)

    def keep(self, since: int = 0) -> None:
        """Count the record; `message` is the next one's.

        Args:
            since: of a fault that is put off: `Record.since`.
        """
        if since:
            struct.pack_into("=Q", self._view, self._base + _BODY + MESSAGE_SIZE, since)
        self._at += 1
        self._count[0] = self._at
        self._mark = (-1, -1)
        self._settled = (-1, 0, 0)
        self._slot()

    def note(self, kind: Kind, task: int, start: int = 0, end: int = 0, fate: int = 0) -> None:
        """Add a record that no system call fills."""
        # First no kind at all: a half-written one must not look like the kernel's.
        _HEAD.pack_into(self._view, self._base, Kind.NOTHING, task, 0)
        _NOTE.pack_into(self._view, self._base + _BODY, start, end, fate)
        _HEAD.pack_into(self._view, self._base, kind, task, 0)
        self.keep()

    def settled(self, task: int, start: int, end: int, fate: int) -> None:
        """Note what became of a range; one that continues the last becomes one with it."""
        if self._settled == (task, start, fate):
            struct.pack_into("=Q", self._view, self._base - _SIZE + _BODY + 8, end)
        else:
            self.note(Kind.SETTLED, task, start, end, fate)
        self._settled = (task, end, fate)

    def __iter__(self) -> Iterator[Record]:
        """All records, the uncounted one last if a system call has filled it."""
        count = self._count[0]
        for at in range(min(count + 1, RECORDS)):
            base = _FRONT + at * _SIZE
            kind, task, _ = _HEAD.unpack_from(self._view, base)
            body = bytes(self._view[base + _BODY : base + _SIZE])
            if at == count and (kind not in (Kind.EVENT, Kind.SAID, Kind.HANDED) or not any(body)):
                return
            yield Record(kind, task, body)
