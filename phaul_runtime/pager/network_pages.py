"""Pages that are not on this host yet: which are here, and the faults that wait for the others.

The plan names one file into which pages come over the network (`postcopy`) and a map of it, a byte
for each page, that is set once the page is written. Both are mapped and only read: who writes them
may die and another go on. A copy never goes beyond what the map has. A fault on a page that has not
come stays, in the journal as every fault that is put off, and the agent is asked for its page by a
datagram; again and again, since an agent, or the other end, may have come anew. A datagram of the
agent's says that something came; what it was stands in the map.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import time
from collections.abc import Iterable, Sequence

from phaul_runtime.pager import ARRIVED_SOCKET, WANTED, WANTS_SOCKET
from phaul_runtime.pager.missing_ranges import MissingRanges
from phaul_runtime.pager.task import Task
from phaul_runtime.pager.uffd import PAGE, libc

WINDOW = 32
"""Pages that a fault asks for."""
ASK_MS = 100
SWEEP = 256
"""Runs that are looked at in one turn of the loop."""
_REST_S, _LONGEST_REST_S = 0.05, 1.0
_SHARE = 3
_WANTS_AT_ONCE = 1024

_memchr = libc.memchr
_memchr.restype = ctypes.c_void_p
_memchr.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)


class NetworkPages:
    """What of a mapped file is here.

    Args:
        base: address of the file's pages.
        flags: address of the map's bytes.
        pages: in both.
        nowhere: address of a page that cannot be read.
    """

    def __init__(self, base: int, flags: int, pages: int, nowhere: int) -> None:
        self.nowhere = nowhere
        self.base = base
        self.end = base + pages * PAGE
        self.flags = flags
        self.pages = pages

    def holds(self, source: int) -> bool:
        """Whether the page with its bytes at an address is of this file."""
        return self.base <= source < self.end

    def page(self, source: int) -> int:
        """Its number."""
        return (source - self.base) // PAGE

    def here(self, source: int, size: int) -> int:
        """How many bytes are here, from an address on."""
        return self._until(0, source, size)

    def lacking(self, source: int, size: int) -> int:
        """How many bytes are not, from an address on."""
        return self._until(1, source, size)

    def _until(self, flag: int, source: int, size: int) -> int:
        at = self.flags + self.page(source)
        found = _memchr(at, flag, size // PAGE)
        return size if found is None else (found - at) * PAGE

    @property
    def missing(self) -> int:
        """Pages that have not come."""
        return ctypes.string_at(self.flags, self.pages).count(0)


def found_missing(
    remote: NetworkPages | None, space: MissingRanges, address: int
) -> tuple[int, int] | None:
    """The number of the page that is missing at an address, and how many to ask for.

    None if the page is here, or nothing is missing there.
    """
    if remote is None:
        return None
    found = space.find(address)
    if found is None or not remote.holds(found[1]) or remote.here(found[1], PAGE):
        return None
    size = min(found[0] - address, WINDOW * PAGE)
    return remote.page(found[1]), remote.lacking(found[1], size) // PAGE


class Waiting:
    """The faults that wait for the network, and the socket to and from the receiver of pages."""

    def __init__(self) -> None:
        self.fd = _bound(ARRIVED_SOCKET)
        self._faults: dict[tuple[int, int], int] = {}
        self._new = False
        self._ask_at = 0.0
        self.due = False
        """Something came, or a process did something to its memory: look again."""

    def __bool__(self) -> bool:
        return bool(self._faults)

    def add(self, index: int, address: int, since: int) -> bool:
        """A fault waits from now on; whether it did not before."""
        if (index, address) in self._faults:
            return False
        self._faults[index, address] = since
        self._new = True
        return True

    def clear(self) -> None:
        """Nothing runs."""
        self._faults.clear()

    def heard(self, fd: int) -> None:
        """Something came: take all datagrams."""
        self.due = True
        with contextlib.suppress(OSError):
            while True:
                os.read(fd, 64)

    def ended(
        self, tasks: Sequence[Task], remote: NetworkPages | None
    ) -> list[tuple[int, int, int]]:
        """Those that wait no more, to be answered (task, address, since)."""
        self.due = False
        ended = []
        for (index, address), since in list(self._faults.items()):
            if found_missing(remote, tasks[index].space, address) is None:
                del self._faults[index, address]
                ended.append((index, address, since))
        return ended

    def ask(self, tasks: Sequence[Task], remote: NetworkPages | None) -> None:
        """Ask for what faults wait for, what is new at once and all of it now and then."""
        now = time.monotonic()
        if not self._new and now < self._ask_at:
            return
        # All of it each time: what is asked for twice is sent once.
        self._new, self._ask_at = False, now + ASK_MS / 1000
        wants = {
            want
            for index, address in self._faults
            if (want := found_missing(remote, tasks[index].space, address)) is not None
        }
        self.want(wants)

    def want(self, wants: Iterable[tuple[int, int]]) -> None:
        """Ask for pages, once: number of the first, and how many."""
        words = [WANTED.pack(*want) for want in sorted(wants)]
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM, 0, fileno=self.fd)
        try:
            for at in range(0, len(words), _WANTS_AT_ONCE):
                # Nobody there, or too busy: the next time.
                with contextlib.suppress(OSError):
                    sock.sendto(b"".join(words[at : at + _WANTS_AT_ONCE]), WANTS_SOCKET)
        finally:
            sock.detach()


class Sweep:
    """Where the filling is, as some runs have to be passed over until they come.

    It goes through the tasks, and each from its last run to its first. Runs that are filled or
    that events change while it is on its way may be missed; the next pass finds them.
    """

    def __init__(self) -> None:
        self._task = 0
        self._at = -1
        self._found = False
        self._rest_s = _REST_S
        # When the pass under way began; the earliest and the set end of the rest after the last.
        self._began = self._least = self._rested_at = 0.0

    def rest(self, now: float) -> float:
        """How long nothing needs to be looked for, seconds."""
        return max(0.0, self._rested_at - now)

    def wake(self) -> None:
        """Something came, or went: rest no longer than at first."""
        self._rest_s = _REST_S
        self._rested_at = min(self._rested_at, self._least)

    def next(
        self, tasks: Sequence[Task], remote: NetworkPages | None, now: float
    ) -> tuple[int, int, int, int] | None:
        """What can be filled now: task, start, end, source.

        All of them 0 but the task if nothing is missing in it. None: rest, then call it again.
        """
        if not self._task and self._at < 0:
            self._began = now
        for _ in range(SWEEP):
            index = self._task
            if index >= len(tasks):
                self._over(now)
                return None
            task = tasks[index]
            count = len(task.space)
            if task.fd < 0 or not count or self._at == 0:
                self._task, self._at = index + 1, -1
                if task.fd >= 0 and not count:
                    return index, 0, 0, 0
                continue
            if self._at < 0 or self._at > count:
                self._at = count
            start, end, source = task.space.run(self._at - 1)
            if remote is not None and remote.holds(source):
                skipped = remote.lacking(source, end - start)
                start, source = start + skipped, source + skipped
                if start == end:
                    self._at -= 1
                    continue
                end = start + remote.here(source, end - start)
            self._found = True
            return index, start, end, source
        return None

    def _over(self, now: float) -> None:
        self._task, self._at = 0, -1
        if not self._found:
            # Where there are very many runs a pass takes its time; a rest is longer then, too.
            took = now - self._began
            self._least = now + max(_REST_S, _SHARE * took)
            self._rested_at = max(self._least, now + self._rest_s)
            self._rest_s = min(2 * self._rest_s, _LONGEST_REST_S)
        self._found = False


def _bound(name: str) -> int:
    """A socket for datagrams in the current directory, for its owner only."""
    if os.path.lexists(name):
        os.unlink(name)  # noqa: PTH108 - relative to the current directory on purpose
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    before = os.umask(0o177)
    try:
        sock.bind(name)
    finally:
        os.umask(before)
    return sock.detach()
