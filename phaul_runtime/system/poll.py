"""Waiting for descriptors, whatever their numbers: `select` knows none above 1023."""

from __future__ import annotations

import math
import select
import time
from typing import Protocol


class _File(Protocol):
    def fileno(self) -> int: ...


def readable(*files: int | _File, within_s: float | None = None) -> set[int]:
    """Wait until at least one can be read, has ended or is broken.

    Args:
        files: descriptors, or what has one.
        within_s: at the most, seconds; None for as long as it takes.

    Returns:
        the numbers of those that can be; empty at the end of the time.
    """
    return _wait(files, select.POLLIN, within_s)


def writable(*files: int | _File, within_s: float | None = None) -> set[int]:
    """The same for those that can be written to."""
    return _wait(files, select.POLLOUT, within_s)


def _wait(files: tuple[int | _File, ...], event: int, within_s: float | None) -> set[int]:
    poll = select.poll()
    for file in files:
        poll.register(file, event)
    deadline = None if within_s is None else time.monotonic() + within_s
    while True:
        # More than a C int of milliseconds is an error to poll.
        left = None if deadline is None else min(max(0.0, deadline - time.monotonic()), 1e5)
        found = poll.poll(None if left is None else math.ceil(left * 1000))
        if found or (deadline is not None and time.monotonic() >= deadline):
            return {fd for fd, _ in found}
