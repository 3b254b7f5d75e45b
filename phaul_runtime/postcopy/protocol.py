"""What is said on a channel of pages, and a channel that never blocks.

::

    destination                             source
    head: magic, pages in all, a bit for each that is here
    WANT first, count                       PAGES first, count, and their data
    ACK  pages received on this channel
    DONE

All numbers are in network order; the bitmap's first page is the lowest bit of its first byte. The
source begins once it has the head, and sends no page that is here, nor any twice on one channel.
Pages that are wanted go first, `AHEAD` of them for a want; what is missing follows upwards in
pieces of `PIECE`, with `FLIGHT` pages at most on their way, so that a wanted one never queues
behind more than that; for `CALM_S` after a want it is `BUSY_PIECE` and `BUSY_FLIGHT`.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

MAGIC = b"phaulpg1"
HEAD = struct.Struct("!8sQ")
MESSAGE = struct.Struct("!IIQ")
"""Kind, count, first; of an ACK `first` is the number of pages."""
PIECE = 64
AHEAD = 32
FLIGHT = 512
BUSY_PIECE = 16
BUSY_FLIGHT = 48
CALM_S = 0.1
_RECEIVE = 256 << 10
_SEND = 1 << 20
# Bytes 0 and 1 to digits and back: conversions by digits of base 2 are linear, and in C.
_TO_DIGITS = bytes.maketrans(b"\0\1", b"01")
_FROM_DIGITS = bytes.maketrans(b"01", b"\0\1")


class Kind(IntEnum):
    """What a message is."""

    WANT = 1
    ACK = 2
    DONE = 3
    PAGES = 4


def message(kind: Kind, first: int = 0, count: int = 0) -> bytes:
    """A message, of PAGES without its data."""
    return MESSAGE.pack(kind, count, first)


def to_bitmap(flags: bytes) -> bytes:
    """A bit for each byte, which is 0 or 1."""
    if not flags:
        return b""
    bits = int(flags[::-1].translate(_TO_DIGITS), 2)
    return bits.to_bytes(bitmap_size(len(flags)), "little")


def from_bitmap(bitmap: bytes, total: int) -> bytearray:
    """A byte, 0 or 1, for each of the first bits.

    Raises:
        ValueError: a bit behind them is set, or it has another size.
    """
    bits = int.from_bytes(bitmap, "little")
    if len(bitmap) != bitmap_size(total) or bits.bit_length() > total:
        raise ValueError("the bitmap has another size")
    digits = f"{bits:0{total}b}" if total else ""
    return bytearray(digits.encode()[::-1].translate(_FROM_DIGITS))


def bitmap_size(total: int) -> int:
    """Bytes of a bitmap."""
    return (total + 7) // 8


@contextmanager
def unblocked(channel: socket.socket) -> Iterator[Link]:
    """A channel as one that never blocks, for a while."""
    before = channel.gettimeout()
    channel.setblocking(False)
    try:
        yield Link(channel)
    finally:
        if channel.fileno() >= 0:
            channel.settimeout(before)


class Link:
    """A channel: what is to be sent waits here, and what came and is not whole yet.

    Args:
        channel: a plain one (of TLS: `transport.carry.expose`), not blocking.
    """

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._out: list[memoryview] = []
        self._in = bytearray()
        self.sent = 0
        """Bytes that were sent."""
        self.received = 0
        """Bytes that came."""

    def fileno(self) -> int:
        """The channel's descriptor."""
        return self._channel.fileno()

    @property
    def closed(self) -> bool:
        """Whether somebody closed it here; `shutdown` is the way to end it from elsewhere."""
        return self._channel.fileno() < 0

    @property
    def pending(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self._out)

    @property
    def events(self) -> int:
        """What to wait for."""
        return select.POLLIN | (select.POLLOUT if self._out else 0)

    def queue(self, data: bytes | memoryview) -> None:
        """Send this behind what waits; it must not be changed until nothing is pending."""
        if data:
            self._out.append(memoryview(data))

    def flush(self) -> None:
        """Send what the channel takes now.

        Raises:
            OSError: it is broken.
        """
        out = self._out
        while out:
            try:
                done = self._channel.send(out[0][:_SEND])
            except (BlockingIOError, InterruptedError):
                return
            self.sent += done
            if done == len(out[0]):
                del out[0]
            else:
                out[0] = out[0][done:]

    def receive(self) -> bool:
        """Take what has come, a bounded part of it; False at the end of the channel.

        Raises:
            OSError: it is broken.
        """
        try:
            data = self._channel.recv(_RECEIVE)
        except (BlockingIOError, InterruptedError):
            return True
        self._in += data
        self.received += len(data)
        return bool(data)

    def peek(self, size: int) -> bytes | None:
        """The next bytes of what came, which stay; None if there are not so many yet."""
        return bytes(memoryview(self._in)[:size]) if len(self._in) >= size else None

    def take(self, size: int) -> bytes | None:
        """The next bytes of what came; None if there are not so many yet."""
        data = self.peek(size)
        if data is not None:
            del self._in[:size]
        return data


__all__ = [
    "AHEAD",
    "BUSY_FLIGHT",
    "BUSY_PIECE",
    "CALM_S",
    "FLIGHT",
    "HEAD",
    "MAGIC",
    "MESSAGE",
    "PIECE",
    "Kind",
    "Link",
    "bitmap_size",
    "from_bitmap",
    "message",
    "to_bitmap",
    "unblocked",
]
