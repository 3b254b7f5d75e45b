"""Learning, while CRIU dumps, that the whole tree stands still already."""

from __future__ import annotations

import threading
from collections.abc import Callable

from phaul_engines.common.proctree import is_stopped_by_tracer, tasks_below

_POLL_S = 0.005
_LOOK_WITHIN_S = 60.0


class Standstill:
    """Calls `then` once CRIU has stopped every thread of a tree; never, if that is not seen.

    From its ptrace stop on, a thread executes nothing of its own until the dump ends: CRIU's
    parasite at most. So each needs to be seen stopped only once, and when a fresh list of threads
    has none that was not, there is nobody left who could make another, or write to a file.

    Args:
        root: pid of the tree's root.
        then: called from a thread of this object's.
    """

    def __init__(self, root: int, then: Callable[[], object]) -> None:
        self._root = root
        self._then = then
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="standstill", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """No longer: `then` has been called, or will not be. Idempotent."""
        self._over.set()
        self._thread.join(_LOOK_WITHIN_S)

    def _watch(self) -> None:
        stopped: set[int] = set()
        while not self._over.wait(_POLL_S):
            if self._all_stopped(stopped):
                self._then()
                return

    def _all_stopped(self, stopped: set[int]) -> bool:
        """Whether all threads have been seen stopped; adds to those that were."""
        while True:
            tasks = tasks_below(self._root)
            new = {task: process for task, process in tasks.items() if task not in stopped}
            if not new:
                return bool(tasks)
            # A big tree is not gone through while its root runs.
            for task, process in new.items():
                if is_stopped_by_tracer(process, task):
                    stopped.add(task)
                elif task == self._root:
                    return False
            if new.keys() - stopped:
                return False


__all__ = ["Standstill"]
