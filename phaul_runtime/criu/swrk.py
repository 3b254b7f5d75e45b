"""One `criu swrk`: its process, the socket to it, and how it ended."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from phaul_runtime.errors import Refused
from phaul_runtime.system import proc

MAX_MESSAGE = 1 << 20
_GIVE_UP_S = 5.0
_STDERR_TAIL = 8 << 10


@dataclass(frozen=True)
class End:
    """How a swrk ended.

    Attributes:
        code: its exit code; None if it was ended from here.
        said: the last lines that it wrote to stderr.
    """

    code: int | None = None
    said: tuple[str, ...] = ()

    def __str__(self) -> str:
        how = "" if self.code is None else f" (code {self.code})"
        if self.code is not None and self.code < 0:
            how = f" (signal {-self.code})"
        return how + (f": {self.said[-1]}" if self.said else "")


class Swrk:
    """A running one; messages are bytes, a message a packet.

    Args:
        binary: name or path of CRIU.
        fds: descriptors that it shall own, under the same numbers.
        deadline_s: longest time to wait for any one message, seconds.

    Raises:
        Refused: CRIU cannot be started.
    """

    def __init__(self, binary: str, fds: Iterable[int], deadline_s: float) -> None:
        self.end = End()
        """Known once it was closed."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._stderr = os.memfd_create("criu-stderr")
        try:
            self._process: proc.Process | None = proc.spawn(
                [binary, "swrk", str(theirs.fileno())],
                stderr=self._stderr,
                pass_fds=sorted({theirs.fileno(), *fds}),
            )
        except Refused:
            ours.close()
            os.close(self._stderr)
            raise
        finally:
            theirs.close()
        ours.settimeout(deadline_s)
        self._socket: socket.socket | None = ours

    @property
    def pid(self) -> int | None:
        """Of its process; None once it was closed."""
        return None if self._process is None else self._process.pid

    def send(self, message: bytes) -> None:
        """Send one message.

        Raises:
            OSError, EOFError: it has ended.
        """
        if self._socket is None:
            raise EOFError("no session with CRIU")
        self._socket.send(message)

    def receive(self) -> tuple[bytes, list[int]]:
        """The next message, and the descriptors that came with it, which are the caller's.

        Raises:
            TimeoutError: it did not come in time.
            OSError, EOFError: it has ended.
        """
        if self._socket is None:
            raise EOFError("no session with CRIU")
        data, fds, _flags, _addr = socket.recv_fds(self._socket, MAX_MESSAGE, 1)
        if not data:
            raise EOFError("CRIU closed the session")
        return data, fds

    def close(self) -> None:
        """End it; idempotent.

        Closing the socket answers "no" to a notification that is under way.
        """
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is None:
            return
        process, self._process = self._process, None
        with contextlib.suppress(Exception):
            # A swrk in the middle of a dump unfreezes the tree by itself: give it the time.
            process.wait(_GIVE_UP_S)
        ended = process.poll() is not None
        try:
            code = proc.end(process)
        finally:
            said = _tail(self._stderr)
            os.close(self._stderr)
        self.end = End(code if ended else None, tuple(said))


def _tail(fd: int) -> list[str]:
    """The last lines of what a process wrote to a file; its offset, which is shared, stays."""
    size = os.fstat(fd).st_size
    data = os.pread(fd, _STDERR_TAIL, max(0, size - _STDERR_TAIL))
    return proc.last_lines(data.decode(errors="replace"))
