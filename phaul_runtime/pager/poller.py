"""The descriptors that the pager's loop waits for, and what is called for each."""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Sequence


class Poller:
    """Handlers by descriptor; by poll(2), which knows descriptors above 1023."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._handlers: dict[int, Callable[[int], None]] = {}

    def clear(self) -> None:
        """Watch nothing; closes nothing."""
        self._handlers.clear()
        self._poll = select.poll()

    def watch(self, fd: int, handler: Callable[[int], None]) -> None:
        """Call `handler` whenever there is something to read."""
        self._handlers[fd] = handler
        self._poll.register(fd, select.POLLIN)

    def unwatch(self, fd: int) -> None:
        """Call it no more; idempotent."""
        if self._handlers.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def close(self, fd: int) -> None:
        """Close a watched descriptor."""
        self.unwatch(fd)
        os.close(fd)

    def wait(self, timeout_ms: int) -> Sequence[int]:
        """The descriptors that have something to read, after so long at most."""
        return [fd for fd, _ in self._poll.poll(timeout_ms)]

    def call(self, ready: Sequence[int]) -> None:
        """Call the handlers; one may have ended another's."""
        for fd in ready:
            handler = self._handlers.get(fd)
            if handler is not None:
                handler(fd)
