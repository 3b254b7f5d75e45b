"""A journal's file, open for writing: every record whole, at the end, with room for the next ones.

The order of what is done to it makes `journalformat.decode` right about whatever a crash leaves:

- It gets a multiple of `STEP` bytes before a record is written that needs them.
- Before the first record after a closing mark, or after a part of one, the file has such a size
  again, what is replaced is overwritten with NULs, and that is on the disk.
- Its end is cut off only when the closing mark is on the disk.
"""

from __future__ import annotations

import contextlib
import errno
import os

from phaul_runtime.cutover.journal_format import STEP, Contents, Record, closing_mark, encode
from phaul_runtime.cutover.states import State

# What the steps after any record are sure to find room for, on a disk that is full by then.
_LAST_STEPS = 16 << 10


class JournalFile:
    """One file and where its next record goes.

    Args:
        fd: locked; from now on this object's.
        contents: what the file says, without damage.

    Attributes:
        fd: -1 once it is closed.
        end: of its last record.
    """

    def __init__(self, fd: int, contents: Contents) -> None:
        self.fd = fd
        self.end = contents.end
        self._version = contents.version
        self._checksum = contents.checksum
        self._lead = contents.lead
        # Bytes from the end on that the next record has to replace.
        self._spare = contents.spare
        self._closed = contents.closed
        self._touched = False
        self._synced = 0
        size = os.fstat(fd).st_size
        self._size = 0 if size % STEP else size
        # Where there is no room now, there may be some when a record is written.
        with contextlib.suppress(OSError):
            self._reserve(self.end + _LAST_STEPS)

    def append(self, record: Record, *, sync: bool) -> None:
        """Write a record; where that fails, the file is as if it was never tried.

        Args:
            record: JSON values.
            sync: wait until it is on the disk.

        Raises:
            OSError: the disk refuses.
        """
        line, checksum = encode(record, self._version, self._checksum, self._synced)
        line = self._lead + line
        if not self._touched:
            self._clear()
        self._put(line)
        if sync:
            try:
                os.fdatasync(self.fd)
            except OSError:
                self._spare = len(line)
                self._wipe()
                raise
        self.end += len(line)
        self._lead, self._checksum = b"", checksum
        if sync:
            self._synced = self.end

    def sync(self) -> None:
        """Wait until everything is on the disk.

        Raises:
            OSError: the disk refuses.
        """
        os.fdatasync(self.fd)
        self._synced = self.end

    def close(self, state: State | None) -> None:
        """Mark the end and give the reserve back; idempotent, and raises nothing.

        Where that cannot be done, the file is left as by a process that was killed.
        """
        if self.fd < 0:
            return
        try:
            with contextlib.suppress(OSError):
                if self._touched and self._version > 1:
                    mark = closing_mark(state, self._checksum, self._synced)
                    self._put(mark)
                    os.fdatasync(self.fd)
                    self._closed, self._spare = True, len(mark)
                if self._version == 1:
                    os.ftruncate(self.fd, self.end)
                elif self._closed or not self.end + self._spare:
                    os.ftruncate(self.fd, self.end + self._spare)
        finally:
            os.close(self.fd)
            self.fd = -1

    def _clear(self) -> None:
        self._closed = False
        if self._spare:
            self._put(b"")
            os.fdatasync(self.fd)
            self._synced = self.end
        self._touched = True

    def _put(self, data: bytes) -> None:
        """Write at the end, all of it, and NULs over what else is to be replaced there."""
        data = data.ljust(self._spare, b"\0")
        # First, and by itself: where it fails, the file ends as it did.
        self._reserve(self.end + len(data) + _LAST_STEPS)
        done = 0
        try:
            while done < len(data):
                count = os.pwrite(self.fd, data[done:], self.end + done)
                if count <= 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                done += count
        except OSError:
            self._spare = max(self._spare, done)
            self._wipe()
            raise
        self._spare = 0

    def _wipe(self) -> None:
        """Take back what follows the end; where the disk refuses, the next record replaces it."""
        with contextlib.suppress(OSError):
            if os.pwrite(self.fd, bytes(self._spare), self.end) == self._spare:
                self._spare = 0

    def _reserve(self, size: int) -> None:
        """Have at least that size, in whole steps, and room for it if the disk has any."""
        if size <= self._size:
            return
        size = -(-size // STEP) * STEP
        # A size alone takes no room: that works on a full disk, too.
        os.ftruncate(self.fd, size)
        self._size = size
        with contextlib.suppress(OSError):
            os.posix_fallocate(self.fd, self.end, size - self.end)


def reserve(fd: int, size: int) -> None:
    """Give an empty file a size and the room for it.

    Raises:
        OSError: the disk has none.
    """
    # First, since not every file system allocates in one step.
    os.ftruncate(fd, size)
    os.posix_fallocate(fd, 0, size)


def read_whole(fd: int) -> bytes:
    """All bytes of a file, wherever its descriptor stands."""
    parts, done = [], 0
    while part := os.pread(fd, 1 << 20, done):
        parts.append(part)
        done += len(part)
    return b"".join(parts)
