"""The client's end of `tcp://` and `tls://`: one connection for control, one for each stream.

gRPC insists on opening its connections itself: it gets a unix socket in a directory of mode 0700,
and what arrives there goes on to the agent, as with ssh.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from phaul_runtime.config.peers import certificate_name
from phaul_runtime.cutover.journal import lock_directory
from phaul_runtime.errors import ChannelError, DestinationUnreachable, PhaulError, Refused
from phaul_runtime.memory.image_dirs import remove_tree
from phaul_runtime.transport.base import Channel, Destination
from phaul_runtime.transport.handshake import (
    CONTROL,
    PORT,
    STREAM,
    Deadline,
    NoAnswer,
    cut,
    dial,
    greet,
)
from phaul_runtime.transport.mutual_tls import explain
from phaul_runtime.transport.preamble import CONTROL as CONTROL_SOCKET
from phaul_runtime.transport.tcp_push import Uncorked
from phaul_runtime.transport.tls_relay import expose, join

if TYPE_CHECKING:
    from phaul_runtime.system.cancel import Cancellation

_AGAIN_AFTER_S = (0.05, 0.1, 0.2, 0.4, 0.8)

Secure = Callable[[socket.socket, Deadline], ssl.SSLSocket]
"""Authenticates both ends of a new connection; raises ChannelError or OSError."""


class ServiceChannel(Channel):
    """A channel to an agent that is a service.

    Args:
        destination: its address.
        directory: made for the control socket, removed by `close`.
        timeout_s: for opening one connection, all of it.
        secure: None leaves connections in the clear.
    """

    def __init__(
        self,
        destination: Destination,
        directory: Path,
        *,
        timeout_s: float,
        secure: Secure | None = None,
    ) -> None:
        self.name = destination.name
        self._host = destination.host
        self._port = PORT if destination.port is None else destination.port
        self._directory = directory
        self._timeout_s = timeout_s
        self._secure = secure
        self._made = False
        self._lock = -1
        self._first: socket.socket | None = None
        self._open: set[socket.socket] = set()
        self._changing = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._trouble = ""

    def start(self, cancellation: Cancellation) -> None:
        """Open the control connection, and listen for gRPC; a failure leaves nothing behind.

        Raises:
            DestinationUnreachable: no agent, or one that refuses this host.
            Refused: the directory cannot be made.
        """
        try:
            try:
                self._first = self._connection(CONTROL, cancellation)
            except ChannelError as error:
                raise DestinationUnreachable(
                    error.message, host=self.name, hint=error.hint
                ) from error
            self._listen()
        except BaseException:
            self.close()
            raise
        threading.Thread(target=self._accept, name="control", daemon=True).start()

    def _listen(self) -> None:
        try:
            self._directory.mkdir(mode=0o700, parents=True)
            self._made = True
            self._lock = lock_directory(self._directory)
            self._listener.bind(str(self._directory / CONTROL_SOCKET))
            self._listener.listen()
        except OSError as error:
            raise Refused(
                f"cannot listen in {self._directory}: {error.strerror or error}"
            ) from error

    def _connection(self, purpose: str, cancellation: Cancellation | None = None) -> socket.socket:
        """An agent that is crowded closes the oldest of those that wait: then it is tried again."""
        deadline = Deadline.within(self._timeout_s)
        for pause_s in _AGAIN_AFTER_S:
            try:
                return self._connected(purpose, deadline, cancellation)
            except NoAnswer:
                if cancellation is not None:
                    cancellation.check()
                if time.monotonic() + pause_s >= deadline.at:
                    raise
                # Not all at the same moment.
                time.sleep(pause_s * random.uniform(0.5, 1))  # noqa: S311 - nothing secret
        return self._connected(purpose, deadline, cancellation)

    def _connected(
        self, purpose: str, deadline: Deadline, cancellation: Cancellation | None
    ) -> socket.socket:
        channel: socket.socket | None = None
        try:
            channel = dial(self._host, self._port, deadline, cancellation)
            if self._secure is not None:
                secured = self._secure(channel, deadline)
                channel = secured
                self.certificate = certificate_name(secured.getpeercert())
            greet(channel, purpose, deadline)
        except PhaulError as error:
            _close(channel)
            if isinstance(error, ChannelError):
                raise type(error)(error.message, hint=error.hint, host=self.name) from error
            raise
        except ssl.SSLError as error:
            # The agent's verdict on this host's certificate.
            _close(channel)
            kind = NoAnswer if isinstance(error, ssl.SSLEOFError) else ChannelError
            raise kind(explain(error, f"the agent at {self.name}"), host=self.name) from error
        except OSError as error:
            # Refused before it was there, or reset once it was?
            kind = NoAnswer if channel is not None and _was_reset(error) else ChannelError
            _close(channel)
            raise kind(
                f"port {self._port}: {error.strerror or error}",
                host=self.name,
                hint="does phaul-runtime agent --listen run there?",
            ) from error
        return channel

    def _accept(self) -> None:
        while True:
            try:
                inner, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(inner,), daemon=True).start()

    def _serve(self, inner: socket.socket) -> None:
        outer, self._first = self._first, None
        try:
            if outer is None:
                outer = self._connection(CONTROL)
        except ChannelError as error:
            self._trouble = error.message
            inner.close()
            return
        self._trouble = ""
        ends = {inner, outer}
        with self._changing:
            self._open |= ends
        join(outer, inner)
        with self._changing:
            self._open -= ends

    def control_target(self) -> str:
        return f"unix:{self._directory / CONTROL_SOCKET}"

    def connect(self) -> socket.socket:
        return expose(self._connection(STREAM))

    def open_memory(self, migration_id: str) -> socket.socket:
        channel = super().open_memory(migration_id)
        return channel if self._secure is not None else Uncorked.of(channel)

    def trouble(self) -> str:
        return self._trouble

    def close(self) -> None:
        """See `Channel`; the agent stays."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        _close(self._first)
        self._first = None
        with self._changing:
            channels = tuple(self._open)
        cut(*channels)
        if self._made:
            remove_tree(self._directory)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _was_reset(error: OSError) -> bool:
    return isinstance(error, ConnectionResetError | BrokenPipeError)


def _close(channel: socket.socket | None) -> None:
    if channel is not None:
        with contextlib.suppress(OSError):
            channel.close()
