"""Memory for the first round's pages, allocated before they come.

At the destination the kernel spends about as much on finding memory for the pages as on copying
them there. From the opening of a migration until its first pages, and whenever the source is the
slower one, it has nothing to do.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from phaul_runtime.memory.fill_plan import PAGE
from phaul_runtime.system.host import filesystem_of, memory_available

# What is allocated at a time: pages that come meanwhile wait so long.
_PIECE = 1 << 20
# Once in so much it is asked whether there is room.
_ASK = 16 << 20
# Of what is expected, the part that has to be free beyond it: it is an estimate.
_SPARE = 4


class Preallocation:
    """A file of a memory file system that grows while nothing else is to be done.

    It never fails: where it cannot allocate, or not without need elsewhere, it has got less.

    Args:
        path: of the file, in a private directory of the file system that the pages go to.
        expected: bytes that will come, about.
    """

    def __init__(self, path: Path, expected: int) -> None:
        self.path = path
        self.allocated = 0
        self.taken = False
        self._asked = 0
        self._expected = expected - expected % PAGE
        self._fd = -1
        self._over = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Allocate in a thread, until all is there or `claim`."""
        if filesystem_of(self.path.parent) == "tmpfs":
            self._thread = threading.Thread(target=self._run, name="allocate", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fd = os.open(self.path, flags, 0o600)
        except OSError:
            return
        while not self._stop.is_set() and self.step():
            pass

    def claim(self) -> bool:
        """End the thread: from now on the caller may `step`; whether there is anything."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        return self._fd >= 0

    def step(self, behind: int = 0) -> bool:
        """Allocate another piece, not before `behind`; False if there is none, or it cannot be."""
        self.allocated = max(self.allocated, behind - behind % _PIECE)
        size = min(_PIECE, self._expected - self.allocated)
        if self._over or size <= 0 or not self._room():
            self._over = True
            return False
        try:
            # Without the lock of the interpreter; what is there already stays as it is.
            os.posix_fallocate(self._fd, self.allocated, size)
        except OSError:
            self._over = True
            return False
        self.allocated += size
        return True

    def _room(self) -> bool:
        """Whether what is to come fits, and the process that is made of it beside it."""
        if self.allocated < self._asked:
            return True
        self._asked = self.allocated + _ASK
        to_come = self._expected - self.allocated
        spare = self._expected // _SPARE
        there = os.fstatvfs(self._fd)
        return (
            there.f_bavail * there.f_frsize >= to_come + spare
            and memory_available() >= to_come + spare + self._expected
        )

    def take(self, path: Path) -> int:
        """The file, under another name, as a descriptor for the caller; `step` still adds to it.

        Raises:
            OSError: it cannot be.
        """
        self.path.replace(path)
        self.taken = True
        return os.dup(self._fd)

    def drop(self) -> None:
        """Nothing more is needed: what was not taken is given back; idempotent."""
        self.claim()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            if not self.taken:
                self.path.unlink(missing_ok=True)
