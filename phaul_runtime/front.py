"""The port of an agent that is a service: who may in, and where each connection leads.

A connection is authenticated before anything is read from it (`tls://`), says what it is for, and
then leads to the agent's own control socket or to its memory channels. Until it is that far it has
`GREETING_S` seconds, a thread of its own, and a share of a limited number of places: who waits and
says nothing keeps nobody else out.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from phaul_runtime.errors import PhaulError, Refused
from phaul_runtime.transport.carry import expose, join
from phaul_runtime.transport.link import CONTROL, Deadline, agree, cut, dismiss, receive, tune
from phaul_runtime.transport.mutualtls import explain

log = logging.getLogger(__name__)

GREETING_S = 10.0
# Connections that are not agreed on yet: of all addresses, and of one.
_WAITING, _WAITING_OF_ONE = 128, 16
_RETRY_S = 0.2

Secure = Callable[[socket.socket, Deadline], socket.socket]


class Front:
    """A listening port before an agent.

    Args:
        control: the agent's control socket.
        take_stream: gets each connection for memory or a tree, and owns it.
        secure: authenticates a new connection; None in the clear.
    """

    def __init__(
        self,
        control: Path,
        take_stream: Callable[[socket.socket], object],
        secure: Secure | None = None,
    ) -> None:
        self._control = control
        self._take_stream = take_stream
        self._secure = secure
        self._listener: socket.socket | None = None
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._waiting: Counter[str] = Counter()
        self._joined: set[socket.socket] = set()

    def start(self, host: str, port: int) -> int:
        """Listen; returns the port, which the kernel chose if it was 0.

        Raises:
            Refused: that address cannot be listened on.
        """
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            self._listener = listener = socket.socket(family, kind, protocol)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                # [::] takes IPv4 too, whatever the system's default is.
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            listener.bind(address)
            listener.listen(_WAITING)
        except OSError as error:
            raise Refused(f"cannot listen on {host} port {port}: {error.strerror}") from error
        threading.Thread(target=self._accept, args=(listener,), name="front", daemon=True).start()
        found: int = listener.getsockname()[1]
        return found

    def stop(self) -> None:
        """Take no more connections, and end those for control; idempotent."""
        self._stopping.set()
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        with self._lock:
            joined = tuple(self._joined)
        cut(*joined)

    def _accept(self, listener: socket.socket) -> None:
        while not self._stopping.is_set():
            try:
                channel, address = listener.accept()
            except OSError as error:
                if self._stopping.is_set():
                    return
                # Out of descriptors, say: it passes.
                log.warning("cannot accept: %s", error)
                time.sleep(_RETRY_S)
                continue
            peer = str(address[0])
            if not self._admit(peer):
                log.warning("%s: too many connections that say nothing; closed", peer)
                channel.close()
                continue
            threading.Thread(target=self._receive, args=(channel, peer), daemon=True).start()

    def _admit(self, peer: str) -> bool:
        with self._lock:
            full = self._waiting.total() >= _WAITING or self._waiting[peer] >= _WAITING_OF_ONE
            if not full:
                self._waiting[peer] += 1
            return not full

    @contextlib.contextmanager
    def _place(self, peer: str) -> Iterator[None]:
        try:
            yield
        finally:
            with self._lock:
                self._waiting[peer] -= 1
                self._waiting += Counter()  # drops what is at 0

    def _receive(self, channel: socket.socket, peer: str) -> None:
        with self._place(peer):
            try:
                deadline = Deadline.within(GREETING_S)
                tune(channel)
                if self._secure is not None:
                    channel = self._secure(channel, deadline)
                purpose = receive(channel, deadline)
                inner = self._reach_control(deadline) if purpose == CONTROL else None
                agree(channel, deadline)
            except (OSError, PhaulError) as error:
                log.warning("%s refused: %s", peer, _reason(error))
                dismiss(channel)
                return
        if inner is None:
            self._take_stream(expose(channel))
        else:
            self._serve_control(channel, inner)

    def _reach_control(self, deadline: Deadline) -> socket.socket:
        inner = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            deadline.limit(inner)
            inner.connect(str(self._control))
            inner.settimeout(None)
        except OSError:
            inner.close()
            raise
        return inner

    def _serve_control(self, channel: socket.socket, inner: socket.socket) -> None:
        ends = {channel, inner}
        with self._lock:
            self._joined |= ends
        join(channel, inner)
        with self._lock:
            self._joined -= ends


def _reason(error: Exception) -> str:
    if isinstance(error, PhaulError):
        return error.message
    if isinstance(error, ssl.SSLError):
        return explain(error, "the client")
    if isinstance(error, TimeoutError):
        return f"it said nothing within {GREETING_S:g} s"
    return str(error)
