"""Nobody can take all the threads that answer calls."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator

from phaul_runtime.errors import Refused


class Turnstile:
    """Counts what is under way for each account, and refuses what is beyond its share.

    Args:
        share: how much one account may have under way.
    """

    def __init__(self, share: int) -> None:
        self._share = share
        self._inside: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def passing(self, account: str) -> Iterator[None]:
        """While in here one more is under way.

        Raises:
            Refused: the account has its share already.
        """
        with self._lock:
            if self._inside[account] >= self._share:
                raise Refused(
                    f"{self._share} calls of this client are under way already",
                    hint="try again once some have ended",
                )
            self._inside[account] += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside[account] -= 1
                if not self._inside[account]:
                    del self._inside[account]
