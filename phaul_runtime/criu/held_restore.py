"""A restore that is rebuilt and held until somebody says run or discard."""

from __future__ import annotations

import logging
import queue
import threading
import time
from typing import Any

from phaul_runtime.criu.session import Criu, CriuNotify
from phaul_runtime.errors import CriuError, DestinationError, PhaulError

log = logging.getLogger(__name__)


class _Discarded(Exception):
    pass


class HeldRestore(CriuNotify):
    """Runs CRIU's RESTORE in a thread and blocks it in post-restore.

    Nothing of the tree has run until `resume`. The hold ends by itself with a discard after
    `hold_s`, and CRIU takes the end of this process for a "no": a held tree outlives nobody.

    Args:
        criu: a prepared session; it is used up.
        opts: of the RESTORE request.
        hold_s: how long to wait for the verdict, seconds.
    """

    def __init__(self, criu: Criu, opts: Any, *, hold_s: float) -> None:
        self._criu = criu
        self._opts = opts
        self._hold_s = hold_s
        self._held: queue.Queue[int | Exception] = queue.Queue()
        self._verdict: queue.Queue[bool] = queue.Queue()
        self._ended: queue.Queue[int | Exception] = queue.Queue()
        self._resumed_at = 0.0
        self._thread = threading.Thread(target=self._run, name="held-restore", daemon=True)

    def start(self, timeout_s: float) -> int:
        """Restore up to post-restore; returns the root's pid.

        Raises:
            CriuError: CRIU could not rebuild the tree; nothing of it is left.
        """
        self._thread.start()
        try:
            held = self._held.get(timeout=timeout_s)
        except queue.Empty:
            self.discard()
            raise CriuError(
                f"the restore did not come to its end within {timeout_s:g} s", request="RESTORE"
            ) from None
        if isinstance(held, Exception):
            self._thread.join(timeout_s)
            raise held
        return held

    def resume(self, timeout_s: float) -> float:
        """Let it run; returns the `time.monotonic()` at which it did.

        Once CRIU has said that all of it runs, what becomes of CRIU changes nothing.

        Raises:
            PhaulError: it does not run; nothing of it is left.
        """
        self._verdict.put(True)
        ended: int | Exception
        try:
            ended = self._ended.get(timeout=timeout_s)
        except queue.Empty:
            ended = DestinationError(f"CRIU did not resume the tree within {timeout_s:g} s")
        if isinstance(ended, Exception):
            if not self._resumed_at:
                raise ended
            log.warning("it runs, but %s", ended)
        return self._resumed_at

    def discard(self) -> None:
        """End the held tree; returns when CRIU has ended. Idempotent."""
        self._verdict.put(False)
        if self._thread.is_alive():
            self._thread.join(self._hold_s)

    # -- in the thread ---------------------------------------------------------------------

    def post_restore(self, pid: int) -> None:
        """Everything is rebuilt: hold it."""
        self._held.put(pid)
        try:
            run = self._verdict.get(timeout=self._hold_s)
        except queue.Empty:
            raise _Discarded("no verdict in time") from None
        if not run:
            raise _Discarded("discarded")

    def post_resume(self) -> None:
        """It runs."""
        self._resumed_at = time.monotonic()

    def _run(self) -> None:
        try:
            pid = self._criu.restore(self._opts, self)
        except PhaulError as error:
            self._held.put(error)
            self._ended.put(error)
        else:
            self._resumed_at = self._resumed_at or time.monotonic()
            self._ended.put(pid)
        finally:
            self._criu.cleanup()
