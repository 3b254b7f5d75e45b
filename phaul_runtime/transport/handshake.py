"""What both ends of `tcp://` and `tls://` agree on: port, greeting, how streams are joined.

An agent that is a service has one port. Each connection says with its first line what it is for,
and the agent answers with a line; with `tls://` both travel only once each side has proved who it
is.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from phaul_runtime.errors import ChannelError, UsageError
from phaul_runtime.system.cancel import Cancellation
from phaul_runtime.system.poll import writable
from phaul_runtime.transport.base import Destination

PORT = 7007
CONTROL, STREAM = "control", "stream"
_HELLO = b"phaul-runtime 1 "
_OK = b"ok"
_LINE = 256
# The first bytes of a TLS client's hello.
_TLS_HELLO = b"\x16\x03"
SPEAKS_TLS = b"no plain connections: that port speaks TLS, write tls://\n"
_SPEAKS_NO_TLS = b"no TLS is spoken on that port\n"
_POLL_S = 0.2
_DISMISS_S = 1.0
_DISMISS_BYTES = 64 << 10
_CHUNK = 256 << 10
# A peer that vanished is noticed within 20 s, as with ssh.
_KEEPALIVE = (
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
)


class NoAnswer(ChannelError):
    """The other side closed a new connection without a word: it may have had too many."""


@dataclass(frozen=True)
class Deadline:
    """A moment until which a whole exchange has to be over, however many steps it has."""

    at: float

    @classmethod
    def within(cls, seconds: float) -> Deadline:
        """So many seconds from now."""
        return cls(time.monotonic() + seconds)

    def limit(self, channel: socket.socket) -> None:
        """Let the next operation on a socket take no longer.

        Raises:
            TimeoutError: the moment has passed.
        """
        left = self.at - time.monotonic()
        if left <= 0:
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        channel.settimeout(left)


def tune(channel: socket.socket) -> None:
    """No waiting to fill packets, and signs of life while nothing is sent."""
    channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for level, option, value in _KEEPALIVE:
        channel.setsockopt(level, option, value)


def dial(
    host: str, port: int, deadline: Deadline, cancellation: Cancellation | None = None
) -> socket.socket:
    """A TCP connection, to the first of the host's addresses that takes it.

    Raises:
        OSError: there is none, or not in time.
        Cancelled: as asked.
    """
    failure: OSError = OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))
    for family, kind, protocol, _, address in socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM
    ):
        channel = socket.socket(family, kind, protocol)
        try:
            channel.setblocking(False)
            code = channel.connect_ex(address)
            if code == errno.EINPROGRESS:
                code = _await_connected(channel, deadline, cancellation)
            if code:
                raise OSError(code, os.strerror(code))
            tune(channel)
            channel.settimeout(None)
        except OSError as error:
            channel.close()
            failure = error
        except BaseException:
            channel.close()
            raise
        else:
            return channel
    raise failure


def _await_connected(
    channel: socket.socket, deadline: Deadline, cancellation: Cancellation | None
) -> int:
    while not writable(channel, within_s=_POLL_S):
        if cancellation is not None:
            cancellation.check()
        if time.monotonic() > deadline.at:
            return errno.ETIMEDOUT
    return channel.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def read_line(channel: socket.socket, deadline: Deadline) -> bytes:
    """A line without its end; nothing after it is read. What came, if the peer left within it.

    Raises:
        OSError: it did not come in time, or the connection broke.
    """
    line = bytearray()
    while len(line) < _LINE:
        deadline.limit(channel)
        byte = channel.recv(1)
        if not byte or byte == b"\n":
            break
        line += byte
        if line == _TLS_HELLO:
            break
    return bytes(line)


def greet(channel: socket.socket, purpose: str, deadline: Deadline) -> None:
    """Say what a new connection is for, and wait until the agent agrees.

    Raises:
        ChannelError: it does not; the message says why.
        OSError: the connection broke.
    """
    deadline.limit(channel)
    channel.sendall(_HELLO + purpose.encode() + b"\n")
    answer = read_line(channel, deadline)
    if answer == _OK:
        channel.settimeout(None)
        return
    if not answer:
        raise NoAnswer("the connection was closed without an answer")
    if answer.startswith(b"no "):
        raise ChannelError(f"the agent says: {answer.decode('ascii', 'replace')}")
    raise ChannelError("no phaul-runtime agent answers on that port")


def receive(channel: socket.socket, deadline: Deadline) -> str:
    """The agent's side of `greet`: what the connection is for; the answer is `agree`.

    Raises:
        ChannelError: nothing that is known here.
        OSError: it did not come in time, or the connection broke.
    """
    line = read_line(channel, deadline)
    if line.startswith(_TLS_HELLO):
        with contextlib.suppress(OSError):
            channel.sendall(_SPEAKS_NO_TLS)
        raise ChannelError("a TLS client came to a tcp:// port")
    if not line:
        raise ChannelError("it left without a word")
    purpose = line.removeprefix(_HELLO).decode("ascii", "replace")
    if not line.startswith(_HELLO) or purpose not in (CONTROL, STREAM):
        with contextlib.suppress(OSError):
            channel.sendall(b"no such purpose, or another version of phaul-runtime\n")
        raise ChannelError("its first line is none of phaul-runtime's")
    return purpose


def agree(channel: socket.socket, deadline: Deadline) -> None:
    """Tell the client that the connection serves what it asked for.

    Raises:
        OSError: the connection broke.
    """
    deadline.limit(channel)
    channel.sendall(_OK + b"\n")
    channel.settimeout(None)


def deny(channel: socket.socket, reason: str) -> None:
    """Tell the client instead why it is not served; `dismiss` follows."""
    with contextlib.suppress(OSError):
        text = f"no entry: {reason}".encode("ascii", "replace")
        channel.sendall(text[: _LINE - 1] + b"\n")


def dismiss(channel: socket.socket) -> None:
    """Close a connection that was refused, so that what was said last arrives.

    Closed with something unread, it would be reset, and the peer lose the reason.
    """
    deadline = Deadline.within(_DISMISS_S)
    with contextlib.suppress(OSError):
        # Of the connection below TLS, where there is any.
        socket.socket.shutdown(channel, socket.SHUT_WR)
        read = 0
        while read < _DISMISS_BYTES:
            deadline.limit(channel)
            size = len(socket.socket.recv(channel, _CHUNK))
            read += size
            if not size:
                break
    channel.close()


def cut(*channels: socket.socket) -> None:
    """End connections for their users, both ways; they are still to be closed.

    Never by a TLS connection's own `shutdown`: that takes the encryption away first, and somebody
    may be about to write.
    """
    for channel in channels:
        with contextlib.suppress(OSError):
            socket.socket.shutdown(channel, socket.SHUT_RDWR)


def splice(one: socket.socket, other: socket.socket) -> None:
    """Join two connections until both have ended, and close them; half an end is passed on."""
    back = threading.Thread(target=_pour_or_cut, args=(other, one), name="splice", daemon=True)
    back.start()
    _pour_or_cut(one, other)
    back.join()
    one.close()
    other.close()


def _pour_or_cut(source: socket.socket, sink: socket.socket) -> None:
    try:
        pour(source, sink)
    except OSError:
        # Broken, not ended: the other half is of no use to anybody either.
        cut(source, sink)


def pour(source: socket.socket, sink: socket.socket) -> None:
    """Carry one direction until its end, which is passed on.

    Raises:
        OSError: one of the two broke.
    """
    buffer = memoryview(bytearray(_CHUNK))
    while size := source.recv_into(buffer):
        sink.sendall(buffer[:size])
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def parse_listen(url: str) -> tuple[str, str, int]:
    """Take `tls://address[:port]` apart: scheme, address, port (0 lets the kernel choose).

    Raises:
        UsageError: it is malformed.
    """
    destination = Destination.parse(url)
    if destination.scheme not in ("tcp", "tls") or not destination.host or destination.user:
        raise UsageError(
            f"cannot listen on {url!r}", hint="for example tls://0.0.0.0:7007 or tls://[::]:7007"
        )
    port = PORT if destination.port is None else destination.port
    return destination.scheme, destination.host, port


Opener = Callable[[str], socket.socket]
"""Opens a connection to the agent for a purpose; raises ChannelError."""
