"""From an agreed connection to what CRIU, rsync and gRPC can have: a plain stream socket.

In the clear that is the connection itself. With TLS somebody has to encrypt: `_Pump` does, in one
thread for both directions, since OpenSSL allows no two in one connection. Inside TLS each piece is
preceded by its length, and an end is a piece of length 0: TLS knows no half-closed connection that
Python's ssl would offer, and a connection that was cut off is not taken for one that has ended.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import ssl
import threading
from collections import deque

from phaul_runtime.transport.handshake import cut, splice

log = logging.getLogger(__name__)

_CHUNK = 256 << 10
_HEADER = 4


def join(outer: socket.socket, inner: socket.socket) -> None:
    """Join a connection between two hosts with one of this host until both have ended; closes them.

    The end of one direction is passed on, and a failure of either ends both.
    """
    if isinstance(outer, ssl.SSLSocket):
        _Pump(outer, inner).run()
    else:
        splice(outer, inner)


def expose(outer: socket.socket) -> socket.socket:
    """A socket that CRIU and rsync can be given: in the clear the connection itself."""
    if not isinstance(outer, ssl.SSLSocket):
        return outer
    ours, theirs = socket.socketpair()
    threading.Thread(target=join, args=(outer, ours), name="tls", daemon=True).start()
    return theirs


class _Broken(Exception):
    """The other side left within a piece, or before its end."""


class _Pump:
    """Carries between a TLS connection and a plain one, both ways, until both have ended."""

    def __init__(self, secured: ssl.SSLSocket, plain: socket.socket) -> None:
        self._secured = secured
        self._plain = plain
        # Outward: one piece with its header, as far as it is not sent.
        self._out = memoryview(bytearray(_HEADER + _CHUNK))
        self._unsent = self._out[:0]
        self._plain_ended = self._out_done = False
        # Inward: what was decrypted and is not delivered, and how much of a piece is to come.
        self._in = memoryview(bytearray(_CHUNK))
        self._undelivered: deque[memoryview] = deque()
        self._header = bytearray()
        self._left = 0
        self._secured_ended = self._in_done = False
        self._wanted: dict[socket.socket, int] = {}

    def run(self) -> None:
        """Until both directions have ended, or one has failed."""
        try:
            self._secured.setblocking(False)
            self._plain.setblocking(False)
            while not (self._out_done and self._in_done):
                self._wanted.clear()
                moved = self._outward()
                moved = self._inward() or moved
                if not moved:
                    self._wait()
        except (OSError, _Broken) as error:
            log.debug("a TLS connection broke: %s", error)
            cut(self._plain, self._secured)
        finally:
            self._plain.close()
            self._secured.close()

    def _wait(self) -> None:
        poll = select.poll()
        # Only what is waited for: the end of the other one would be told all the time.
        for channel, events in self._wanted.items():
            poll.register(channel, events)
        poll.poll()

    def _want(self, channel: socket.socket, event: int) -> None:
        self._wanted[channel] = self._wanted.get(channel, 0) | event

    def _outward(self) -> bool:
        """From the plain connection to the other host; whether anything moved."""
        if self._out_done:
            return False
        if not self._unsent and not self._plain_ended:
            try:
                size = self._plain.recv_into(self._out[_HEADER:])
            except BlockingIOError:
                self._want(self._plain, select.POLLIN)
                return False
            self._plain_ended = not size
            self._out[:_HEADER] = size.to_bytes(_HEADER, "big")
            self._unsent = self._out[: _HEADER + size]
        try:
            sent = self._secured.send(self._unsent)
        except ssl.SSLWantWriteError:
            self._want(self._secured, select.POLLOUT)
            return False
        except ssl.SSLWantReadError:
            self._want(self._secured, select.POLLIN)
            return False
        self._unsent = self._unsent[sent:]
        self._out_done = self._plain_ended and not self._unsent
        return True

    def _inward(self) -> bool:
        """From the other host to the plain connection; whether anything moved."""
        if self._in_done:
            return False
        if not self._undelivered and not self._secured_ended:
            try:
                size = self._secured.recv_into(self._in)
            except ssl.SSLWantReadError:
                self._want(self._secured, select.POLLIN)
                return False
            except ssl.SSLWantWriteError:
                self._want(self._secured, select.POLLOUT)
                return False
            if not size:
                raise _Broken("it was cut off")
            self._take_apart(self._in[:size])
        while self._undelivered:
            piece = self._undelivered[0]
            try:
                sent = self._plain.send(piece)
            except BlockingIOError:
                self._want(self._plain, select.POLLOUT)
                return False
            if sent < len(piece):
                self._undelivered[0] = piece[sent:]
            else:
                self._undelivered.popleft()
        if self._secured_ended:
            with contextlib.suppress(OSError):
                self._plain.shutdown(socket.SHUT_WR)
            self._in_done = True
        return True

    def _take_apart(self, data: memoryview) -> None:
        """Headers from contents."""
        while data:
            if self._secured_ended:
                raise _Broken("there was more after its end")
            if self._left:
                piece = data[: self._left]
                self._left -= len(piece)
                self._undelivered.append(piece)
                data = data[len(piece) :]
                continue
            rest = _HEADER - len(self._header)
            self._header += data[:rest]
            data = data[rest:]
            if len(self._header) == _HEADER:
                self._left = int.from_bytes(self._header, "big")
                self._header.clear()
                self._secured_ended = not self._left
