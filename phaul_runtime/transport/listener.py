"""The port of an agent that is a service: who may in, and where each connection leads.

A connection is authenticated before anything is read from it (`tls://`), says what it is for, and
then leads to the agent's own control socket or to its memory channels, with the name of the
certificate that it has shown. Until it is that far it is in the `lobby`, with `GREETING_S` seconds:
who waits and says nothing keeps nobody else out.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path

from phaul_runtime.config.peers import Callers, Peer, certificate_name
from phaul_runtime.errors import PhaulError, Refused
from phaul_runtime.system.threads import Seldom
from phaul_runtime.transport import lobby
from phaul_runtime.transport.handshake import (
    CONTROL,
    Deadline,
    agree,
    cut,
    deny,
    dismiss,
    receive,
    tune,
)
from phaul_runtime.transport.lobby import Guest, Lobby
from phaul_runtime.transport.mutual_tls import explain
from phaul_runtime.transport.tls_relay import expose, join

log = logging.getLogger(__name__)

Secure = Callable[[socket.socket, Deadline], ssl.SSLSocket]


class PortListener:
    """A listening port before an agent.

    Args:
        control: the agent's control socket.
        callers: told who is behind each connection to that socket.
        take_stream: gets each connection for memory or a tree, which it owns, and whose it is.
        enter: refuses a peer that may not in.
        secure: authenticates a new connection; None in the clear.
    """

    def __init__(
        self,
        control: Path,
        callers: Callers,
        take_stream: Callable[[socket.socket, Peer], object],
        enter: Callable[[Peer], object],
        secure: Secure | None = None,
    ) -> None:
        self._control = control
        self._callers = callers
        self._take_stream = take_stream
        self._enter = enter
        self._secure = secure
        self._lobby: Lobby | None = None
        self._lock = threading.Lock()
        self._joined: set[socket.socket] = set()
        self._seldom = Seldom(log)

    def start(self, host: str, port: int) -> int:
        """Listen; returns the port, which the kernel chose if it was 0.

        Raises:
            Refused: that address cannot be listened on.
        """
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = socket.socket(family, kind, protocol)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                # [::] takes IPv4 too, whatever the system's default is.
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            listener.bind(address)
            self._lobby = Lobby(listener, self._receive)
            self._lobby.open()
        except OSError as error:
            raise Refused(f"cannot listen on {host} port {port}: {error.strerror}") from error
        found: int = listener.getsockname()[1]
        return found

    def stop(self) -> None:
        """Take no more connections, and end those for control; idempotent."""
        if self._lobby is not None:
            self._lobby.close()
        with self._lock:
            joined = tuple(self._joined)
        cut(*joined)

    def _receive(self, guest: Guest) -> None:
        channel, deadline = guest.channel, guest.deadline
        peer = Peer(address=guest.address)
        inner: socket.socket | None = None
        try:
            tune(channel)
            if self._secure is not None:
                secured = self._secure(channel, deadline)
                channel = secured
                peer = Peer(certificate_name(secured.getpeercert()), guest.address)
            purpose = receive(channel, deadline)
            self._let_in(channel, peer)
            if purpose == CONTROL:
                inner = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                with self._callers.known(inner, peer):
                    deadline.limit(inner)
                    inner.connect(str(self._control))
                    inner.settimeout(None)
                    self._agreed(guest)
                    agree(channel, deadline)
                    self._serve_control(channel, inner)
                return
            self._agreed(guest)
            agree(channel, deadline)
        except (OSError, PhaulError) as error:
            if not guest.dismissed:
                reason = _reason(error)
                self._seldom.warn(reason, f"{peer} refused: {reason}")
            if inner is not None:
                inner.close()
            dismiss(channel)
            return
        self._take_stream(expose(channel), peer)

    def _let_in(self, channel: socket.socket, peer: Peer) -> None:
        try:
            self._enter(peer)
        except Refused as error:
            deny(channel, error.message)
            raise

    def _agreed(self, guest: Guest) -> None:
        if self._lobby is not None:
            self._lobby.agreed(guest)

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
        return f"it said nothing within {lobby.GREETING_S:g} s"
    return str(error)
