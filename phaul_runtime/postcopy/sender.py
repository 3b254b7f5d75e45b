"""The source's end: reads the memory of the frozen tree and sends what the destination lacks."""

from __future__ import annotations

import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping

from phaul_runtime.errors import ChannelError, MigrationFailed
from phaul_runtime.memory.fill_plan import PAGE
from phaul_runtime.postcopy import protocol
from phaul_runtime.postcopy.pages import RemotePages
from phaul_runtime.postcopy.protocol import Kind, Link

_LOOK_S = 0.1
_MOST_WANTS = 1 << 20


class PageSender:
    """The memory of a frozen tree, for as long as it is not closed.

    Args:
        pages: which pages.
        pids: of each process, as the images name it, its pid on this host. Looked up once: a pid
            that is used again later is never read.

    Raises:
        MigrationFailed: a process is missing, or its memory cannot be opened.
    """

    def __init__(self, pages: RemotePages, pids: Mapping[int, int]) -> None:
        self.pages = pages
        self.bytes_sent = 0
        """On all channels, with everything."""
        self._files: dict[int, int] = {}
        try:
            for pid in dict.fromkeys(run[0] for run in pages.runs):
                if pid not in pids:
                    raise MigrationFailed(f"process {pid} of the images is not known on this host")
                name = f"/proc/{pids[pid]}/mem"
                try:
                    self._files[pid] = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise MigrationFailed(f"cannot open {name}: {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    def serve(
        self,
        channel: socket.socket,
        tell: Callable[[int], object],
        *,
        silent_s: float,
        stream: Callable[[], bool] = lambda: True,
    ) -> None:
        """Send what the destination lacks, until it says that it has all.

        May be called again with a new channel after a ChannelError.

        Args:
            channel: to an `Receiver`; a plain one (of TLS: `transport.carry.expose`).
            tell: told how many pages are missing, 10 times a second at most.
            silent_s: how long nothing may move.
            stream: whether to send what nobody has asked for, too; until it says so silence is
                no trouble.

        Raises:
            ChannelError: the channel broke, nothing moved for that long, or what came is not
                what a destination says.
            MigrationFailed: memory cannot be read: a process was killed.
        """
        with protocol.unblocked(channel) as link:
            try:
                _Serving(self, link, tell, silent_s, stream).run()
            finally:
                self.bytes_sent += link.sent

    def read(self, first: int, count: int) -> memoryview:
        """The data of pages with adjacent numbers.

        Raises:
            MigrationFailed: it cannot be read.
        """
        view = memoryview(bytearray(count * PAGE))
        at = 0
        for pid, vaddr, pages in self.pages.pieces(first, count):
            begin, size = at, pages * PAGE
            while at < begin + size:
                place = vaddr + at - begin
                try:
                    done = os.preadv(self._files[pid], [view[at : begin + size]], place)
                except (OSError, KeyError) as error:
                    why = getattr(error, "strerror", None) or "it is closed"
                    raise MigrationFailed(
                        f"cannot read the memory of process {pid} at {place:#x}: {why}"
                    ) from error
                if not done:
                    # What the kernel says of a memory that nobody has any more.
                    raise MigrationFailed(f"cannot read the memory of process {pid}: it was killed")
                at += done
        return view

    def close(self) -> None:
        """Let go of the processes' memory; idempotent."""
        files, self._files = self._files, {}
        for file in files.values():
            os.close(file)


class _Serving:
    """One channel."""

    def __init__(
        self,
        source: PageSender,
        link: Link,
        tell: Callable[[int], object],
        silent_s: float,
        stream: Callable[[], bool],
    ) -> None:
        self._stream = stream
        self._source = source
        self._total = source.pages.total
        self._link = link
        self._tell = tell
        self._silent_s = silent_s
        # Which pages are there, or on their way; None until the destination has said so.
        self._gone: bytearray | None = None
        self._lacking = self._total
        self._wants: deque[tuple[int, int]] = deque()
        self._wanted_at = 0.0
        self._sent = self._acked = 0
        self._at = 0
        self._done = False
        self._told = -1
        self._told_at = 0.0

    def run(self) -> None:
        """Until the destination has all."""
        link = self._link
        poll = select.poll()
        poll.register(link, select.POLLIN)
        moved, moved_at = -1, time.monotonic()
        while not self._done:
            if not link.pending:
                self._queue_next()
            if link.closed:
                raise ChannelError("the channel of pages was closed")
            poll.modify(link, link.events)
            ready = dict(poll.poll(_LOOK_S * 1000))
            happened = ready.get(link.fileno(), 0)
            if happened & ~select.POLLOUT:
                self._hear()
            if happened & select.POLLOUT and not self._done:
                self._send()
            now = time.monotonic()
            if link.sent + link.received != moved or not self._stream():
                moved, moved_at = link.sent + link.received, now
            elif now - moved_at > self._silent_s:
                raise ChannelError(
                    f"nothing has moved on the channel of pages for {self._silent_s:g} s"
                )
            self._say(now)
        self._tell(0)

    def _send(self) -> None:
        try:
            self._link.flush()
        except OSError as error:
            # It may have said that it has all, and gone.
            self._hear()
            if not self._done:
                raise _broken(error) from error

    def _say(self, now: float) -> None:
        missing = self._lacking - self._acked
        if self._gone is not None and missing != self._told and now - self._told_at >= _LOOK_S:
            self._told, self._told_at = missing, now
            self._tell(missing)

    # -- what it says ----------------------------------------------------------------------

    def _hear(self) -> None:
        try:
            more = self._link.receive()
        except OSError as error:
            raise _broken(error) from error
        if self._gone is None:
            self._take_head()
        while self._gone is not None and not self._done:
            data = self._link.take(protocol.MESSAGE.size)
            if data is None:
                break
            self._take(*protocol.MESSAGE.unpack(data))
        if not more and not self._done:
            raise ChannelError("the destination ended the channel of pages")

    def _take_head(self) -> None:
        data = self._link.peek(protocol.HEAD.size)
        if data is None:
            return
        magic, total = protocol.HEAD.unpack(data)
        if magic != protocol.MAGIC:
            raise ChannelError("on the channel of pages the destination speaks something else")
        if total != self._total:
            raise ChannelError(f"the destination knows {total} pages, not {self._total}")
        size = protocol.bitmap_size(total)
        data = self._link.take(protocol.HEAD.size + size)
        if data is None:
            return
        try:
            self._gone = protocol.from_bitmap(data[protocol.HEAD.size :], total)
        except ValueError as error:
            raise ChannelError(f"the destination's list of pages is malformed: {error}") from error
        self._lacking = self._gone.count(0)

    def _take(self, kind: int, count: int, first: int) -> None:
        if kind == Kind.WANT and 0 < count <= protocol.AHEAD and first + count <= self._total:
            if self._gone is not None and self._gone.find(0, first, first + count) >= 0:
                self._wants.append((first, count))
                self._wanted_at = time.monotonic()
            if len(self._wants) > _MOST_WANTS:
                raise ChannelError("the destination asks for pages without end")
        elif kind == Kind.ACK and not count and self._acked <= first <= self._sent:
            self._acked = first
        elif kind == Kind.DONE and not count and not first and self._sent == self._lacking:
            self._done = True
        else:
            raise ChannelError(
                f"the destination said what makes no sense: {kind}, {count} pages, {first}"
            )

    # -- what is sent ----------------------------------------------------------------------

    def _queue_next(self) -> None:
        """The next message: what is wanted, or of the rest if not too much is on its way."""
        gone = self._gone
        if gone is None:
            return
        while self._wants:
            first, count = self._wants[0]
            # What lies beside it in the process's memory will be wanted next.
            _, _, beside = next(
                self._source.pages.pieces(first, min(protocol.AHEAD, self._total - first))
            )
            behind = first + max(count, beside)
            begin = gone.find(0, first, behind)
            if begin >= 0:
                self._queue(gone, begin, behind)
                return
            self._wants.popleft()
        # A page that somebody waits for queues behind what is on its way already: on a link of
        # 20 MiB/s a full flight is 100 ms for each of them.
        calm = time.monotonic() - self._wanted_at > protocol.CALM_S
        piece, most = (
            (protocol.PIECE, protocol.FLIGHT)
            if calm
            else (protocol.BUSY_PIECE, protocol.BUSY_FLIGHT)
        )
        if self._sent - self._acked + piece > most or not self._stream():
            return
        begin = gone.find(0, self._at)
        if begin >= 0:
            self._at = self._queue(gone, begin, min(begin + piece, self._total))
        else:
            self._at = self._total

    def _queue(self, gone: bytearray, begin: int, behind: int) -> int:
        """The pages from one on that are not there; returns the first behind them."""
        end = gone.find(1, begin, behind)
        end = behind if end < 0 else end
        # Read first: if that fails nothing is half said.
        data = self._source.read(begin, end - begin)
        gone[begin:end] = b"\1" * (end - begin)
        self._sent += end - begin
        self._link.queue(protocol.message(Kind.PAGES, begin, end - begin))
        self._link.queue(data)
        return end


def _broken(error: OSError) -> ChannelError:
    return ChannelError(f"the channel of pages broke: {error.strerror or error}")
