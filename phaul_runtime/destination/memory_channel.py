"""The connection over which a migration's memory comes: one, and no second."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

from phaul_runtime.errors import DestinationError, PhaulError

WITHIN_S = 30.0


class MemoryChannel:
    """Calls may come from several threads.

    Attributes:
        socket: once it is here.
    """

    def __init__(self) -> None:
        self.socket: socket.socket | None = None
        self._refused: PhaulError | None = None
        self._over = False
        self._changing = threading.Lock()
        self._here = threading.Event()

    def connect(self, channel: socket.socket) -> None:
        """It has arrived; it is this object's from now on.

        Raises:
            DestinationError: there is one already, or nothing more is to come; it is the caller's.
        """
        with self._changing:
            if self._refused is not None or self.socket is not None:
                raise DestinationError("it has its memory channel already")
            if self._over:
                raise DestinationError("no more memory is taken for it")
            self.socket = channel
        self._here.set()

    def refuse(self, error: PhaulError) -> None:
        """It has arrived and is of no use; `wait` says why.

        One that comes beside another changes nothing.
        """
        with self._changing:
            if self.socket is None:
                self._refused = error
        self._here.set()

    def wait(self) -> socket.socket:
        """Wait until it is here.

        Raises:
            PhaulError: it does not come, or was refused.
        """
        arrived = self._here.wait(WITHIN_S)
        if self._refused is not None:
            raise self._refused
        if not arrived or self.socket is None:
            raise DestinationError("the memory channel did not arrive")
        return self.socket

    def end(self, how: Callable[[socket.socket], object]) -> None:
        """No connection is taken any more, and the one that there is ends."""
        with self._changing:
            self._over = True
            if self.socket is not None:
                how(self.socket)
