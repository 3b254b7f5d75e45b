"""A TCP connection that CRIU writes memory to: what it holds back is pushed.

CRIU corks the connection of its page server (criu/page-xfer.c, `connect_to_page_server`) and does
not push the request that ends a round. The kernel holds such a rest back for up to 200 ms (tcp(7)),
once a round and once in the freeze. To set TCP_NODELAY sends it at once, corked or not.
"""

from __future__ import annotations

import socket
import threading
import time
import weakref

_EVERY_S = 0.01


class Uncorked(socket.socket):
    """The connection; pushed every 10 ms until it is closed or detached."""

    @classmethod
    def of(cls, channel: socket.socket) -> Uncorked:
        """Take over an open connection."""
        found = cls(fileno=channel.detach())
        found._lock = threading.Lock()
        threading.Thread(target=_push, args=(weakref.ref(found),), name="push", daemon=True).start()
        return found

    _lock: threading.Lock

    def push(self) -> bool:
        """Send what is held back; False once it is closed."""
        with self._lock:
            if self.fileno() < 0:
                return False
            self.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return True

    def close(self) -> None:
        """As any socket's; the number of its descriptor is another's afterwards."""
        with self._lock:
            super().close()

    def detach(self) -> int:
        """As any socket's."""
        with self._lock:
            return super().detach()


def _push(channel: weakref.ref[Uncorked]) -> None:
    while True:
        found = channel()
        try:
            if found is None or not found.push():
                return
        except OSError:
            return  # broken: its user is told
        del found
        time.sleep(_EVERY_S)
