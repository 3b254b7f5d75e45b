"""A configuration file of CRIU's at which CRIU waits.

The one that an annotation names is read twice. It is a FIFO here: CRIU begins when it is given,
which lets a daemon do all that comes before CRIU while there are no images yet; and the second
reading gets no action script, which would be called twice for every step (a tenth of a second each,
emulated).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

from phaul_runtime.errors import MigrationFailed

_POLL_S = 0.005


class HeldConfig:
    """The file at `path`; what it is to be is said by `give`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(f"{path.name}.part")

    def hold(self) -> None:
        """From now on a reader waits.

        Raises:
            MigrationFailed: it cannot be made.
        """
        self.release()
        try:
            self._part.unlink(missing_ok=True)
            os.mkfifo(self._part, 0o600)
            self._part.replace(self._path)  # a reader finds one or the other, at any moment
        except OSError as error:
            raise MigrationFailed(f"cannot make {self._path}: {error.strerror}") from error

    def give(self, text: str, again: str, *, over: Callable[[], bool], within_s: float) -> bool:
        """Give the first reader `text`, and all later ones `again`; waits for the first.

        Args:
            text: less than a pipe holds (4096 bytes).
            again: likewise.
            over: whether there will be no reader any more.
            within_s: the longest wait.

        Returns:
            Whether there was a reader.

        Raises:
            MigrationFailed: the file system refuses.
        """
        deadline = time.monotonic() + within_s
        try:
            while (fd := self._open(os.O_WRONLY)) < 0:
                if over() or time.monotonic() > deadline:
                    return False
                time.sleep(_POLL_S)
            try:
                os.write(fd, text.encode())
                # Before the first reading ends: the next must not find a FIFO that nobody feeds.
                self._become(again)
            finally:
                os.close(fd)
        except OSError as error:
            raise MigrationFailed(f"cannot write {self._path}: {error.strerror}") from error
        return True

    def release(self) -> None:
        """Readers that wait, and those that come, read an empty file; idempotent.

        For one that this process made, or one before it.
        """
        with contextlib.suppress(OSError):
            if stat.S_ISFIFO(self._path.lstat().st_mode):
                fd = self._open(os.O_RDWR)
                try:
                    self._become("")
                finally:
                    os.close(fd)

    def _open(self, how: int) -> int:
        """A descriptor; negative as long as nobody reads."""
        try:
            return os.open(self._path, how | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return -1

    def _become(self, text: str) -> None:
        self._part.write_text(text, encoding="utf-8")
        self._part.replace(self._path)
