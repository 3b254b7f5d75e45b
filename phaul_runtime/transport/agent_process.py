"""An agent started as a child for one channel: directly, or through ssh.

The agent announces itself with one line on stdout and ends with its stdin, so that it outlives
neither the client nor the connection.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from phaul_runtime.cutover.journal import lock_directory
from phaul_runtime.errors import ChannelError, DestinationUnreachable, Refused
from phaul_runtime.memory.image_dirs import remove_tree
from phaul_runtime.system import proc
from phaul_runtime.system.cancel import Cancellation
from phaul_runtime.system.poll import readable
from phaul_runtime.transport.base import Channel
from phaul_runtime.transport.preamble import CONTROL, MEMORY

READY = b"phaul-runtime agent ready"
_LOADER = "error while loading shared libraries"
_POLL_S = 0.2
_STDERR_LIMIT = 8 << 10
_CLOSE_S = 10.0


class AgentProcess(Channel):
    """A channel whose agent is this process's child (or ssh's).

    Args:
        name: of the host, for messages.
        argv: starts the agent, or ssh with the agent's command.
        sockets: directory with the two sockets on this host.
        owned: make `sockets`; otherwise the agent does. Removed on close in either case.
        by_hand: a command that a user may try to find out more.
    """

    def __init__(
        self, name: str, argv: Sequence[str], sockets: Path, *, owned: bool, by_hand: str
    ) -> None:
        self.name = name
        self._by_hand = by_hand
        self._argv = list(argv)
        self._sockets = sockets
        self._owned = owned
        self._removes = False
        self._lock = -1
        self._process: proc.Process | None = None
        self._stderr = bytearray()
        self._reader: threading.Thread | None = None

    def start(self, timeout_s: float, cancellation: Cancellation) -> None:
        """Start the agent and wait for its announcement; a failure leaves nothing behind.

        Raises:
            DestinationUnreachable: it did not come; the message has what was printed instead.
            Refused: the program or the directory for the sockets is what fails, on this host.
        """
        try:
            if self._owned:
                self._make_directory()
            with os.fdopen(self._spawn(), "rb") as announcement:
                self._await_ready(announcement.fileno(), timeout_s, cancellation)
        except BaseException:
            self.close()
            raise

    def _make_directory(self) -> None:
        try:
            self._sockets.mkdir(mode=0o700, parents=True)
            self._removes = True
            self._lock = lock_directory(self._sockets)
        except OSError as error:
            raise Refused(f"cannot create {self._sockets}: {error.strerror}") from error

    def _spawn(self) -> int:
        """Start it; returns the descriptor that has its stdout."""
        read_fd, write_fd = os.pipe()
        stderr_read, stderr_write = os.pipe()
        stdin_read, self._stdin = os.pipe()
        self._reader = threading.Thread(
            target=self._collect, args=(stderr_read,), name="agent-stderr", daemon=True
        )
        self._reader.start()
        try:
            with (
                os.fdopen(stdin_read, "rb") as stdin,
                os.fdopen(write_fd, "wb") as out,
                os.fdopen(stderr_write, "wb") as err,
            ):
                self._process = proc.spawn(self._argv, stdin=stdin, stdout=out, stderr=err)
        except BaseException:
            os.close(read_fd)
            raise
        # An agent on this host makes the directory, and leaves it if it is killed.
        self._removes = True
        return read_fd

    def _await_ready(self, fd: int, timeout_s: float, cancellation: Cancellation) -> None:
        deadline = time.monotonic() + timeout_s
        said = b""
        while True:
            cancellation.check()
            if time.monotonic() > deadline:
                raise DestinationUnreachable(
                    f"no agent answered within {timeout_s:g} s",
                    host=self.name,
                    log=self._said_lines(),
                    hint=f"try by hand: {self._by_hand}",
                )
            if not readable(fd, within_s=_POLL_S):
                continue
            data = os.read(fd, 4096)
            said += data
            if any(line.startswith(READY) for line in said.splitlines()):
                return
            if not data:
                raise self._did_not_start()

    def _did_not_start(self) -> DestinationUnreachable:
        code = self._process.wait(_CLOSE_S) if self._process else -1
        if self._reader is not None:
            self._reader.join(_CLOSE_S)
        lines = self._said_lines()
        # A shell's, or a loader's that misses a library.
        if code == 127 and not any(_LOADER in line for line in lines):
            return DestinationUnreachable(
                "phaul-runtime is not installed there, or not on the PATH of a plain ssh command",
                host=self.name,
                log=lines,
                hint="install it, or set transport.agent_command in the configuration",
            )
        return DestinationUnreachable(
            lines[-1] if lines else f"the agent ended with code {code}",
            host=self.name,
            log=lines[:-1],
            hint=f"try by hand: {self._by_hand}",
        )

    def _said_lines(self) -> list[str]:
        text = bytes(self._stderr).decode(errors="replace")
        return [line.strip() for line in text.splitlines() if line.strip()][-8:]

    def _collect(self, fd: int) -> None:
        with os.fdopen(fd, "rb", buffering=0) as pipe:
            while data := pipe.read(4096):
                self._stderr += data
                del self._stderr[:-_STDERR_LIMIT]

    def control_target(self) -> str:
        return f"unix:{self._sockets / CONTROL}"

    def connect(self) -> socket.socket:
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            channel.connect(str(self._sockets / MEMORY))
        except OSError as error:
            channel.close()
            raise ChannelError(
                f"cannot open the memory channel: {error.strerror}",
                host=self.name,
                log=self._said_lines(),
            ) from error
        return channel

    def trouble(self) -> str:
        lines = self._said_lines()
        if self._process is not None and self._process.poll() is not None:
            lines.append(f"{self._argv[0]} ended with code {self._process.returncode}")
        return "; ".join(lines)

    def close(self) -> None:
        if self._stdin >= 0:
            os.close(self._stdin)
            self._stdin = -1
        if self._process is not None:
            process, self._process = self._process, None
            with contextlib.suppress(Exception):
                process.wait(_CLOSE_S)
            proc.end(process)
        if self._removes:
            remove_tree(self._sockets)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    _stdin = -1
