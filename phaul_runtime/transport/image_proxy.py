"""The image proxy: memory on its way from CRIU to the other host is buffered, compressed, slowed.

The ancestor p.haul planned an *image-proxy* between CRIU's page server and the network and never
had it. This is it: it takes pages from CRIU as fast as memory allows, so that a slow link does not
hold the tree in a pre-dump, and sends them on as fast as the link does, or as `bandwidth_limit`
says, with `compression: zstd` in fewer bytes. What comes back (CRIU's acknowledgements) passes
unchanged.

It works with every transport: it stands between CRIU and whatever `Channel.connect` returns, and
says in the connection's preamble what it does, so that the agent does the reverse (`restored`). No
round ends early by it: CRIU waits for the page server's acknowledgement of everything.

Compressed, the stream is a row of pieces, each with its length and whether it is compressed before
it, the last of length 0. Each stands for itself and tells its size, so that the receiver
knows beforehand how much memory that takes.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from phaul_runtime.errors import ChannelError, Refused
from phaul_runtime.transport.base import Channel
from phaul_runtime.transport.handshake import cut, pour
from phaul_runtime.transport.preamble import ZSTD

if TYPE_CHECKING:
    from phaul_runtime.config.model import TransportConfig

log = logging.getLogger(__name__)

DEFAULT_BUFFER = 64 << 20
# Of a tree's stream: rsync waits for the other side anyway.
_TREE_BUFFER = 1 << 20
_PIECE = 256 << 10
_HEADER = 4
_COMPRESSED = 1 << 31
# The fastest: what is compressed in the freeze is waited for.
_LEVEL = 1
# Of a buffered chunk, beside its contents.
_OVERHEAD = 64


def require_zstandard() -> Any:
    """The package for `compression: zstd`.

    Raises:
        Refused: it is not installed.
    """
    try:
        import zstandard  # noqa: PLC0415 - loaded where it is used only
    except ImportError as error:
        raise Refused(
            f"compression: zstd needs the Python package zstandard: {error}",
            hint="install it on both hosts, or set transport.compression: none",
        ) from error
    return zstandard


class Bucket:
    """A limit of bytes per second for all who share it: a token bucket with a tenth of a second.

    Args:
        rate: bytes per second.
        clock: seconds, monotonic.
    """

    def __init__(self, rate: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate = rate
        self.piece = max(1, min(_PIECE, rate // 10))
        """The most that is worth asking for at once, bytes."""
        self._clock = clock
        self._lock = threading.Lock()
        self._tokens = float(self.piece)
        self._at = clock()

    def take(self, size: int) -> float:
        """Take so many bytes out; returns the seconds to wait before they may be sent."""
        with self._lock:
            now = self._clock()
            self._tokens = min(self.piece, self._tokens + (now - self._at) * self.rate) - size
            self._at = now
            return max(0.0, -self._tokens / self.rate)


class _Buffer:
    """Bytes between a fast writer and a slow reader."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._chunks: deque[bytes] = deque()
        self._size = 0
        self._ended = self._broken = False
        self._changed = threading.Condition()

    def put(self, chunk: bytes) -> None:
        """Append, once there is room for it.

        Raises:
            BrokenPipeError: nobody will read it.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._size < self._limit or self._broken)
            if self._broken:
                raise BrokenPipeError
            self._chunks.append(chunk)
            self._size += len(chunk) + _OVERHEAD
            self._changed.notify_all()

    def end(self) -> None:
        """Nothing follows."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def fail(self) -> None:
        """Nobody waits any longer, and what is in it is lost."""
        with self._changed:
            self._broken = True
            self._chunks.clear()
            self._changed.notify_all()

    def get(self, size: int) -> bytes:
        """The next bytes, `size` at the most unless one chunk has more; none at the end.

        Raises:
            BrokenPipeError: see `fail`.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._chunks or self._ended or self._broken)
            if self._broken:
                raise BrokenPipeError
            found: list[bytes] = []
            total = 0
            while self._chunks and (not found or total + len(self._chunks[0]) <= size):
                found.append(self._chunks.popleft())
                total += len(found[-1])
            self._size -= total + _OVERHEAD * len(found)
            self._changed.notify_all()
        return found[0] if len(found) == 1 else b"".join(found)


@dataclass
class Counts:
    """Bytes that came from CRIU and rsync, and what became of them on the link."""

    taken: int = 0
    sent: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, *, taken: int = 0, sent: int = 0) -> None:
        """Several streams count at once."""
        with self._lock:
            self.taken += taken
            self.sent += sent


class ImageProxy:
    """What a configuration asks to be done with memory and trees on their way.

    Args:
        compress: with zstd.
        limit: bytes per second of all streams together; None for as many as go.
        buffer: bytes of memory for pages on their way.

    Raises:
        Refused: zstandard is missing.
    """

    def __init__(self, *, compress: bool, limit: int | None, buffer: int) -> None:
        if compress:
            require_zstandard()
        self.compress = compress
        self.counts = Counts()
        self._bucket = None if limit is None else Bucket(limit)
        self._buffer = buffer

    @classmethod
    def of(cls, config: TransportConfig) -> ImageProxy | None:
        """The proxy of a configuration; None if it asks for none: CRIU writes to the link itself.

        Raises:
            Refused: as above.
        """
        compress = config.compression == "zstd"
        if not compress and config.bandwidth_limit is None and config.proxy_buffer is None:
            return None
        buffer = config.proxy_buffer or DEFAULT_BUFFER
        return cls(compress=compress, limit=config.bandwidth_limit, buffer=buffer)

    def before(self, link: socket.socket, *, tree: bool) -> tuple[socket.socket, _Stream]:
        """A socket for CRIU or rsync that leads through here to `link`, and what stops it."""
        ours, theirs = socket.socketpair()
        buffer = min(self._buffer, _TREE_BUFFER) if tree else self._buffer
        stream = _Stream(
            ours,
            link,
            buffer=buffer,
            pieces=_compressed if self.compress else _plain,
            bucket=self._bucket,
            counts=self.counts,
        )
        stream.start()
        return theirs, stream


class _Stream:
    """One connection through the proxy, at the side that sends."""

    def __init__(
        self,
        inner: socket.socket,
        link: socket.socket,
        *,
        buffer: int,
        pieces: Callable[[_Buffer], Iterator[bytes]],
        bucket: Bucket | None,
        counts: Counts,
    ) -> None:
        self._inner = inner
        self._link = link
        self._buffer = _Buffer(buffer)
        self._pieces = pieces(self._buffer)
        self._bucket = bucket
        self._counts = counts
        self._stopped = threading.Event()
        self._left = threading.Semaphore(0)

    def start(self) -> None:
        """Begin to carry."""
        for work in (self._take, self._send, self._return):
            threading.Thread(target=self._until_done, args=(work,), daemon=True).start()
        threading.Thread(target=self._close, name="image proxy", daemon=True).start()

    def stop(self) -> None:
        """Cut it off; idempotent."""
        self._stopped.set()
        self._buffer.fail()
        cut(self._inner, self._link)

    def _until_done(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            log.debug("image proxy: %s", error)
            self.stop()
        except Exception:
            log.exception("the image proxy failed")
            self.stop()
        finally:
            self._left.release()

    def _close(self) -> None:
        for _ in range(3):
            self._left.acquire()
        self._inner.close()
        self._link.close()

    def _take(self) -> None:
        """From CRIU, as fast as memory allows."""
        while chunk := self._inner.recv(_PIECE):
            self._counts.add(taken=len(chunk))
            self._buffer.put(chunk)
        self._buffer.end()

    def _send(self) -> None:
        """To the other host, as fast as the link does, or as it is allowed to."""
        for data in self._pieces:
            if self._bucket is None:
                self._link.sendall(data)
            else:
                self._send_slowly(self._bucket, memoryview(data))
            self._counts.add(sent=len(data))
        self._link.shutdown(socket.SHUT_WR)

    def _send_slowly(self, bucket: Bucket, data: memoryview) -> None:
        while data:
            piece = data[: bucket.piece]
            if self._stopped.wait(bucket.take(len(piece))):
                raise BrokenPipeError
            self._link.sendall(piece)
            data = data[len(piece) :]

    def _return(self) -> None:
        """What the other host answers."""
        pour(self._link, self._inner)


def _plain(buffer: _Buffer) -> Iterator[bytes]:
    while data := buffer.get(_PIECE):
        yield data


def _compressed(buffer: _Buffer) -> Iterator[bytes]:
    compressor = require_zstandard().ZstdCompressor(level=_LEVEL)
    while data := buffer.get(_PIECE):
        packed = compressor.compress(data)
        if len(packed) < len(data):
            yield (_COMPRESSED | len(packed)).to_bytes(_HEADER, "big") + packed
        else:
            yield len(data).to_bytes(_HEADER, "big") + data
    yield bytes(_HEADER)


def restored(link: socket.socket) -> socket.socket:
    """The receiving side: a socket for the page server, with what the proxy made of it undone.

    Raises:
        Refused: zstandard is missing.
    """
    require_zstandard()
    ours, theirs = socket.socketpair()
    threading.Thread(target=_receive, args=(link, ours), name="image proxy", daemon=True).start()
    return theirs


def _receive(link: socket.socket, inner: socket.socket) -> None:
    back = threading.Thread(target=_answer, args=(inner, link), daemon=True)
    back.start()
    try:
        for piece in _unpacked(link):
            inner.sendall(piece)
        inner.shutdown(socket.SHUT_WR)
    except (OSError, ChannelError) as error:
        log.debug("image proxy: %s", error)
        cut(inner, link)
    back.join()
    inner.close()
    link.close()


def _answer(inner: socket.socket, link: socket.socket) -> None:
    with contextlib.suppress(OSError):
        pour(inner, link)


def _unpacked(link: socket.socket) -> Iterator[bytes]:
    zstandard = require_zstandard()
    unpacker = zstandard.ZstdDecompressor()
    while True:
        header = int.from_bytes(_exactly(link, _HEADER), "big")
        size = header & ~_COMPRESSED
        if not header:
            return
        if size > _PIECE:
            raise ChannelError("a piece of the memory channel is too large")
        data = _exactly(link, size)
        if not header & _COMPRESSED:
            yield data
            continue
        try:
            if not 0 < zstandard.frame_content_size(data) <= _PIECE:
                raise ChannelError("a piece of the memory channel is too large")
            yield unpacker.decompress(data)
        except zstandard.ZstdError as error:
            raise ChannelError(f"the memory channel is garbled: {error}") from error


def _exactly(link: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = link.recv(size - len(data))
        if not part:
            raise ChannelError("the memory channel was cut off")
        data += part
    return bytes(data)


class ProxiedChannel(Channel):
    """A channel whose streams go through an image proxy.

    Args:
        channel: of any transport; closed with this one.
        proxy: shared by all streams.
    """

    def __init__(self, channel: Channel, proxy: ImageProxy) -> None:
        self.name = channel.name
        self.certificate = channel.certificate
        self._channel = channel
        self._proxy = proxy
        self._streams: list[_Stream] = []

    def control_target(self) -> str:
        return self._channel.control_target()

    def connect(self) -> socket.socket:
        """See `Channel`; it does not go through the proxy yet."""
        return self._channel.connect()

    def _claim(self, preamble: str) -> socket.socket:
        link = super()._claim(f"{preamble} {ZSTD}" if self._proxy.compress else preamble)
        theirs, stream = self._proxy.before(link, tree=" " in preamble)
        self._streams.append(stream)
        return theirs

    def trouble(self) -> str:
        return self._channel.trouble()

    def close(self) -> None:
        for stream in self._streams:
            stream.stop()
        self._channel.close()
