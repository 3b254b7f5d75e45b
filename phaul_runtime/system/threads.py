"""Threads that a service cannot do without: what fails in one is reported, and it goes on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

# A step that fails again and again must not fill the log, nor a CPU.
_AFTER_FAILURE_S = 1.0


def keep_doing(
    name: str, step: Callable[[], object], stopping: threading.Event
) -> threading.Thread:
    """Repeat `step` in a thread until `stopping`; an exception is logged, and it goes on.

    Args:
        name: of the thread.
        step: waits by itself for what it is about.
        stopping: ends it after the step that is under way.
    """

    def run() -> None:
        while not stopping.is_set():
            try:
                step()
            except Exception:
                log.exception("%s: a step failed; it goes on", name)
                stopping.wait(_AFTER_FAILURE_S)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread


def report_deaths() -> None:
    """From now on a thread that dies of an exception is an error in the log; for a program."""

    def report(died: threading.ExceptHookArgs) -> None:
        if died.exc_type is SystemExit:
            return
        name = died.thread.name if died.thread else "a thread"
        error = died.exc_value or died.exc_type()
        log.error("%s died; the service goes on", name, exc_info=error)

    threading.excepthook = report


def attempt(what: str, do: Callable[[], object]) -> bool:
    """Do what must not keep from what follows it; whether it went well. A failure is logged."""
    try:
        do()
    except Exception as error:
        log.error("%s failed: %s: %s", what, type(error).__name__, error)
        log.debug("%s", what, exc_info=True)
        return False
    return True


class Seldom:
    """Warnings that come at most once a second for each kind, however often there is reason.

    Args:
        log: where they go.
    """

    def __init__(self, log: logging.Logger, every_s: float = 1.0) -> None:
        self._log = log
        self._every_s = every_s
        self._lock = threading.Lock()
        self._said: dict[str, float] = {}
        self._swallowed: dict[str, int] = {}

    def warn(self, kind: str, text: str) -> None:
        """Say it, with how many of its kind were not said since the last."""
        now = time.monotonic()
        with self._lock:
            if now - self._said.get(kind, -self._every_s) < self._every_s:
                self._swallowed[kind] = self._swallowed.get(kind, 0) + 1
                return
            more = self._swallowed.pop(kind, 0)
            # Kinds are few, but they may hold what a peer said.
            for old in [each for each, at in self._said.items() if now - at > self._every_s]:
                del self._said[old]
            self._said[kind] = now
        self._log.warning("%s%s", text, f" (and {more} like it)" if more else "")
