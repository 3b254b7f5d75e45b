"""How a memory channel is ended so that the other side notices, whatever it does."""

from __future__ import annotations

import contextlib
import socket

_CHUNK = 1 << 20
# More than any receive buffer.
_AT_MOST = 1 << 30


def hang_up(channel: socket.socket) -> None:
    """End a stream both ways for everybody who has it; it is still to be closed. Never blocks.

    The peer may be in the middle of a write. On a TCP connection it would wait there for ever, for
    room that nobody makes: so room is made, what it then sends is answered with a reset, and its
    write fails.
    """
    with contextlib.suppress(OSError):
        channel.shutdown(socket.SHUT_RDWR)
        read = 0
        while read < _AT_MOST and (size := len(channel.recv(_CHUNK, socket.MSG_DONTWAIT))):
            read += size
