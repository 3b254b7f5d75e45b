"""How inputs are made worse, and how they are fed to what reads them."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Iterator

Random = random.Random

EDGES = (
    0, 1, 2, 3, 127, 255, 4095, 4096, 1 << 12, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1,
    1 << 44, 1 << 52, 1 << 60, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1,
)  # fmt: skip
STRINGS = (
    "", " ", "x", "\0", "a\nb", "\x1b[2J", "..", "/", "../../x", "-rf", "%s%n", "é\u202e",
    "x" * 5000,
)  # fmt: skip
VALUES: tuple[object, ...] = (
    None, True, -1, 0, 1 << 70, 1e308, 0.5, "", "x", "\0", [], {}, [[]], {"a": {}}, "y" * 3000,
    [None], {"": 1},
)  # fmt: skip
# More than any case sends: it is all sent before anybody reads.
_BUFFER = 16 << 20
_SO_SNDBUFFORCE = 32


def mutated(rng: Random, data: bytes) -> bytes:
    """`data` with some bits, its end, a part or its length changed; as it was, now and then."""
    out = bytearray(data)
    if out and rng.random() < 0.7:
        near = rng.random() < 0.5
        for _ in range(rng.randrange(1, 5)):
            at = rng.randrange(min(len(out), 400) if near else len(out))
            if rng.random() < 0.7:
                out[at] ^= 1 << rng.randrange(8)
            else:
                out[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
    if out and rng.random() < 0.1:
        begin = rng.randrange(len(out))
        piece = out[begin : begin + rng.randrange(1, 64)]
        if rng.random() < 0.5:
            out[begin:begin] = piece
        else:
            del out[begin : begin + len(piece)]
    if rng.random() < 0.2:
        del out[rng.randrange(len(out) + 1) :]
    if rng.random() < 0.1:
        out += rng.randbytes(rng.randrange(40))
    return bytes(out)


def worse(rng: Random, value: object, most: int = 3) -> object:
    """A JSON value in which some parts are others, or missing."""
    if rng.random() < 0.15 * most / 3:
        return rng.choice(VALUES)
    if isinstance(value, dict):
        return {name: worse(rng, each, most) for name, each in value.items() if rng.random() > 0.03}
    if isinstance(value, list):
        return [worse(rng, each, most) for each in value]
    return value


@contextlib.contextmanager
def fed(data: bytes) -> Iterator[socket.socket]:
    """A connection from which `data` comes, and then its end."""
    ours, theirs = socket.socketpair()
    try:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        with contextlib.suppress(PermissionError):
            ours.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BUFFER)
        ours.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            # An ordinary user's buffer is smaller: what does not fit is cut off.
            ours.send(data)
        ours.shutdown(socket.SHUT_WR)
        yield theirs
    finally:
        ours.close()
        theirs.close()
