"""Cancelling a migration: asked for at any moment, honoured wherever it is safe.

A signal handler calls `request`. A wait for something long registers how to cut it
short (`interrupt_with`); between two steps `check` is called. Once the cut-over has
passed the point of no return, `seal` makes requests mean nothing: the move finishes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from phaul_runtime.errors import Cancelled


class Cancellation:
    """A request to stop; safe to use from signal handlers and other threads."""

    def __init__(self) -> None:
        self._requested = threading.Event()
        self._sealed = False
        # A signal handler may ask for it in the thread that holds it.
        self._lock = threading.RLock()
        self._interrupts: list[Callable[[], None]] = []

    @property
    def requested(self) -> bool:
        """Somebody asked, and it still counts."""
        return self._requested.is_set() and not self._sealed

    def request(self) -> bool:
        """Ask to stop; False if it is too late. Idempotent."""
        with self._lock:
            if self._sealed:
                return False
            self._requested.set()
        for interrupt in tuple(self._interrupts):
            interrupt()
        return True

    def check(self) -> None:
        """Raise `Cancelled` if somebody asked."""
        if self.requested:
            raise Cancelled("cancelled; the source's copy runs on")

    def seal(self) -> None:
        """From now on it is too late. Raises `Cancelled` if somebody asked just before."""
        with self._lock:
            # In this order: a signal handler may come between, in this thread, lock or no lock.
            self._sealed = True
            if self._requested.is_set():
                self._sealed = False
                self.check()

    @contextmanager
    def interrupt_with(self, action: Callable[[], None]) -> Iterator[None]:
        """While in here, a request calls `action` at once; it must be quick and must not raise."""
        self._interrupts.append(action)
        try:
            self.check()
            yield
        finally:
            self._interrupts.remove(action)
