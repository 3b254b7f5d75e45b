"""Connections that are not agreed on yet: one thread for those that say nothing, few for the rest.

Who has connected costs a descriptor until the first byte comes; then it gets a thread in which it
is greeted. Both are limited, and where a limit is reached the oldest makes place: an honest client
is through in the time of a few round trips, so the oldest is not one. Where it is, it
tries again.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import resource
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from phaul_runtime.system.threads import Seldom, keep_doing
from phaul_runtime.transport.handshake import Deadline, cut

log = logging.getLogger(__name__)

GREETING_S = 10.0
# That have said nothing yet, and that are being greeted.
_SILENT, _SPEAKING = 1024, 256
# Of the descriptors that this process may have, the part that the silent may take.
_SHARE = 4
_AT_ONCE = 64
_TICK_S = 0.5
_BACKLOG = 1024
_OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


@dataclass(eq=False)
class Guest:
    """A connection that is not agreed on yet.

    Attributes:
        channel: the connection, until `greet` gets it.
        address: where it comes from.
        deadline: by which it has to be agreed on.
        dismissed: it had to make place.
    """

    channel: socket.socket
    address: str
    deadline: Deadline
    dismissed: bool = False


class Lobby:
    """Takes connections from a listener and has those greeted that say something.

    Args:
        listener: listening; from now on this object's.
        greet: called in a thread with each guest that has begun to speak; owns its channel.
    """

    def __init__(self, listener: socket.socket, greet: Callable[[Guest], object]) -> None:
        self._listener = listener
        self._greet = greet
        self._lock = threading.Lock()
        # In the order in which they came; the second with another hand on the connection.
        self._silent: dict[Guest, None] = {}
        self._speaking: dict[Guest, socket.socket] = {}
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most_silent = max(1, min(_SILENT, soft // _SHARE))
        self._seldom = Seldom(log)
        self._selector = selectors.DefaultSelector()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        """Begin to listen."""
        self._listener.listen(_BACKLOG)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._thread = keep_doing("front", self._step, self._stopping)

    def close(self) -> None:
        """Take no more, and end all that are here; idempotent."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        os.eventfd_write(self._bell, 1)
        if self._thread is not None:
            self._thread.join()
        self._listener.close()
        for guest in self._silent:
            guest.channel.close()
        self._silent.clear()
        with self._lock:
            cut(*self._speaking.values())
        self._selector.close()
        os.close(self._bell)

    @property
    def waiting(self) -> int:
        """How many are not agreed on."""
        return len(self._silent) + len(self._speaking)

    # -- in the one thread -----------------------------------------------------------------

    def _step(self) -> None:
        ready = {key.fileobj for key, _ in self._selector.select(_TICK_S)}
        for guest in [guest for guest in self._silent if guest.channel in ready]:
            self._forget(guest)
            self._begin(guest)
        if self._listener in ready:
            self._take()
        self._expire()

    def _take(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                channel, address = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno in _OUT_OF_DESCRIPTORS and self._silent:
                    self._make_place()
                    continue
                # It passes.
                self._seldom.warn("accept", f"cannot accept: {error.strerror}")
                self._stopping.wait(_TICK_S)
                return
            while len(self._silent) >= self._most_silent:
                self._make_place()
            guest = Guest(channel, str(address[0]), Deadline.within(GREETING_S))
            self._silent[guest] = None
            self._selector.register(channel, selectors.EVENT_READ)

    def _make_place(self) -> None:
        oldest = next(iter(self._silent))
        self._say_full(oldest)
        self._forget(oldest)
        oldest.channel.close()

    def _say_full(self, guest: Guest) -> None:
        self._seldom.warn(
            "full",
            f"{self.waiting} connections are not agreed on; the oldest, from {guest.address}, "
            "was closed",
        )

    def _expire(self) -> None:
        """All have the same time, so the oldest are the first."""
        now = time.monotonic()
        for guest in list(itertools.takewhile(lambda g: g.deadline.at <= now, self._silent)):
            self._forget(guest)
            guest.channel.close()
            self._seldom.warn(
                "silent", f"{guest.address} refused: it said nothing within {GREETING_S:g} s"
            )

    def _forget(self, guest: Guest) -> None:
        del self._silent[guest]
        self._selector.unregister(guest.channel)

    def _begin(self, guest: Guest) -> None:
        with self._lock:
            dismissed = None
            if len(self._speaking) >= _SPEAKING:
                dismissed = next(iter(self._speaking))
                dismissed.dismissed = True
                with contextlib.closing(self._speaking.pop(dismissed)) as handle:
                    # Its thread notices, and closes it.
                    cut(handle)
            try:
                self._speaking[guest] = guest.channel.dup()
            except OSError:
                guest.channel.close()
                raise
        if dismissed is not None:
            self._say_full(dismissed)
        threading.Thread(target=self._speak, args=(guest,), name="greet", daemon=True).start()

    # -- in a thread for each that speaks --------------------------------------------------

    def _speak(self, guest: Guest) -> None:
        try:
            self._greet(guest)
        except Exception:
            log.exception("greeting %s failed", guest.address)
        finally:
            self._leave(guest)

    def agreed(self, guest: Guest) -> None:
        """It needs no place any more, before it is told that it is served; idempotent.

        Raises:
            ConnectionAbortedError: it had to make place.
        """
        self._leave(guest)
        if guest.dismissed:
            raise ConnectionAbortedError("it had to make place")

    def _leave(self, guest: Guest) -> None:
        with self._lock:
            handle = self._speaking.pop(guest, None)
        if handle is not None:
            handle.close()
