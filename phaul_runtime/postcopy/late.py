"""The destination's page channels: one after the other, into whatever store there is."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from phaul_runtime.errors import DestinationError
from phaul_runtime.postcopy.receiver import Receiver
from phaul_runtime.postcopy.store import PageStore

# The channel is opened a little before the images that say which pages there will be.
_STORE_WITHIN_S = 30.0
_POLL_S = 0.01


class LatePages:
    """What comes late for one migration. Calls may come from several threads."""

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._serving = threading.Lock()
        self._arrival: Receiver | None = None
        self._closed = False

    def serve(
        self, channel: socket.socket, find: Callable[[], tuple[PageStore | None, Path]]
    ) -> bool:
        """Take pages from a connection to the source until it ends, and close it.

        A later connection ends an earlier one: that broke, which is not always noticed here first.

        Args:
            channel: to a `PageSender`.
            find: asked for the store and the pager's directory until there is a store.

        Returns:
            Whether all pages are here.

        Raises:
            DestinationError: no store comes, or as `Receiver.serve`.
        """
        try:
            deadline = time.monotonic() + _STORE_WITHIN_S
            while (found := find())[0] is None:
                if self._closed or time.monotonic() > deadline:
                    raise DestinationError("no pages are missing in this migration")
                time.sleep(_POLL_S)
            store, place = found
            with self._changing:
                if self._closed or store is None:
                    raise DestinationError("nobody waits for pages any more")
                if self._arrival is not None:
                    self._arrival.stop()
                mine = self._arrival = Receiver(store, place)
            with self._serving:
                return mine.serve(channel)
        finally:
            channel.close()

    def stop(self) -> None:
        """End the connection that there is; another may come. Idempotent."""
        with self._changing:
            if self._arrival is not None:
                self._arrival.stop()

    def close(self) -> None:
        """Nothing more is taken, the store can be closed; idempotent."""
        with self._changing:
            self._closed = True
        self.stop()


__all__ = ["LatePages"]
