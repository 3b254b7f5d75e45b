"""The destination's end: asks for pages that the pager wants, and stores what comes."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from phaul_runtime.errors import DestinationError
from phaul_runtime.memory.fill_plan import PAGE
from phaul_runtime.pager import ARRIVED_SOCKET, WANTED, WANTS_SOCKET
from phaul_runtime.postcopy import protocol
from phaul_runtime.postcopy.protocol import Kind, Link
from phaul_runtime.postcopy.store import PageStore

SILENT_S = 60.0
_FLUSH_S = 10.0
_DATAGRAM = 64 << 10
_DATAGRAMS_AT_ONCE = 16


class Receiver:
    """Pages on their way into a store, one channel after the other.

    What the pager wants comes by datagrams, which it repeats: no channel needs to be open, and the
    next one is told. Nothing is kept but the store, so another agent may go on at any moment.

    Args:
        store: where to.
        place: the pager's directory.
        silent_s: a channel on which nothing has moved for that long has ended.
    """

    def __init__(self, store: PageStore, place: Path, *, silent_s: float = SILENT_S) -> None:
        self._store = store
        self._place = place
        self._silent_s = silent_s
        self._lock = threading.Lock()
        self._stopped = False
        self._bell = -1

    def stop(self) -> None:
        """End `serve`, which another thread is in, and every later one; idempotent."""
        with self._lock:
            self._stopped = True
            if self._bell >= 0:
                os.eventfd_write(self._bell, 1)

    def serve(self, channel: socket.socket) -> bool:
        """Let pages come until all are here, or the channel ends; one channel at a time.

        Args:
            channel: to a `PageSender`; a plain one (of TLS: `transport.carry.expose`).

        Returns:
            Whether all are here; the source has been told then, if it could be. If it could not,
            it will come again, and is told at once.

        Raises:
            DestinationError: a page cannot be stored, or what came is not what a source sends.
        """
        with self._rung() as bell, self._wants() as wants, protocol.unblocked(channel) as link:
            return _Arriving(self._store, link, wants, bell).run(self._silent_s)

    @contextlib.contextmanager
    def _rung(self) -> Iterator[int]:
        with self._lock:
            self._bell = os.eventfd(int(self._stopped), os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            yield self._bell
        finally:
            with self._lock:
                os.close(self._bell)
                self._bell = -1

    @contextlib.contextmanager
    def _wants(self) -> Iterator[_Wants]:
        wants = _Wants(self._place)
        try:
            yield wants
        finally:
            wants.close()


class _Wants:
    """The two sockets between a pager and an agent.

    Raises:
        DestinationError: the pager's directory is not there.
    """

    def __init__(self, place: Path) -> None:
        try:
            # By way of the directory: a socket's own path may have 107 bytes only.
            self._place = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise DestinationError(f"no pager in {place}: {error.strerror}") from error
        self._name = f"/proc/self/fd/{self._place}/{WANTS_SOCKET}"
        self._pager = f"/proc/self/fd/{self._place}/{ARRIVED_SOCKET}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._name)  # noqa: PTH108 - an earlier agent's
            self._socket.bind(self._name)
        except OSError as error:
            self.close()
            raise DestinationError(f"cannot hear the pager in {place}: {error.strerror}") from error

    def fileno(self) -> int:
        """To wait for."""
        return self._socket.fileno()

    def close(self) -> None:
        """Nobody is here any more; idempotent."""
        self._socket.close()
        if self._place >= 0:
            with contextlib.suppress(OSError):
                os.unlink(self._name)  # noqa: PTH108
            os.close(self._place)
            self._place = -1

    def take(self) -> Iterator[tuple[int, int]]:
        """What the pager wants: first page, pages."""
        for _ in range(_DATAGRAMS_AT_ONCE):
            try:
                data = self._socket.recv(_DATAGRAM)
            except OSError:
                return
            yield from WANTED.iter_unpack(data[: len(data) // WANTED.size * WANTED.size])

    def arrived(self) -> None:
        """Tell the pager to look; if it cannot be told it looks by itself, later."""
        with contextlib.suppress(OSError):
            self._socket.sendto(b"\1", self._pager)


class _Arriving:
    """One channel."""

    def __init__(self, store: PageStore, link: Link, wants: _Wants, bell: int) -> None:
        self._store = store
        self._link = link
        self._wants = wants
        self._bell = bell
        self._asked: set[int] = set()
        self._got = self._acked = 0

    def run(self, silent_s: float) -> bool:
        """Until all pages are here, or the channel ends."""
        store, link = self._store, self._link
        link.queue(protocol.HEAD.pack(protocol.MAGIC, store.total))
        link.queue(protocol.to_bitmap(store.flags()))
        poll = select.poll()
        poll.register(self._wants, select.POLLIN)
        poll.register(self._bell, select.POLLIN)
        poll.register(link, select.POLLIN)
        moved, moved_at = -1, time.monotonic()
        told = False
        while True:
            if store.complete and not told:
                told = True
                link.queue(protocol.message(Kind.DONE))
                silent_s = min(silent_s, _FLUSH_S)
            if told and not link.pending:
                return True
            if link.closed:
                return store.complete
            if self._got != self._acked and not link.pending:
                # One for all that came; the next once this one is away.
                self._acked = self._got
                link.queue(protocol.message(Kind.ACK, self._got))
            poll.modify(link, link.events)
            left = moved_at + silent_s - time.monotonic()
            ready = dict(poll.poll(max(0.0, left) * 1000))
            if self._bell in ready:
                return store.complete
            try:
                if ready.get(self._wants.fileno()):
                    self._ask()
                if ready.get(link.fileno(), 0) & ~select.POLLOUT and not self._hear():
                    return store.complete
                link.flush()
            except OSError:
                return store.complete
            now = time.monotonic()
            if link.sent + link.received != moved:
                moved, moved_at = link.sent + link.received, now
            elif now - moved_at > silent_s:
                return store.complete

    def _ask(self) -> None:
        for first, count in self._wants.take():
            if not 0 < count <= protocol.AHEAD or first + count > self._store.total:
                continue
            if first not in self._asked and not self._store.has(first):
                self._asked.add(first)
                self._link.queue(protocol.message(Kind.WANT, first, count))

    def _hear(self) -> bool:
        """Take what came; False at the end of the channel."""
        more = self._link.receive()
        while (data := self._link.peek(protocol.MESSAGE.size)) is not None:
            kind, count, first = protocol.MESSAGE.unpack(data)
            good = kind == Kind.PAGES and 0 < count <= protocol.PIECE
            if not good or first + count > self._store.total:
                raise DestinationError(
                    f"the source sent what makes no sense: {kind}, {count} pages, {first}"
                )
            whole = self._link.take(protocol.MESSAGE.size + count * PAGE)
            if whole is None:
                break
            self._store.put(first, memoryview(whole)[protocol.MESSAGE.size :])
            self._wants.arrived()
            self._asked.difference_update(range(first, first + count))
            self._got += count
        return more
