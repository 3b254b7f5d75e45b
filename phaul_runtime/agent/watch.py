"""Clients that are gone: their migrations are given up, whatever becomes of any one of them."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable

from phaul_runtime.agent.calls import AgentService
from phaul_runtime.destination.incoming import Incoming
from phaul_runtime.system import logs
from phaul_runtime.system.threads import attempt, keep_doing

log = logging.getLogger(__name__)

_WATCH_S = 1.0
# A migration that could not be given up is tried again after that.
_AGAIN_S = 30.0
# An agent that nobody has called for so long, and that holds nothing, has lost its client.
_IDLE_S = 900.0
# What is over can still be asked for that long after its client's last sign of life.
_REMEMBERED_S = 900.0


class Watch:
    """One thread that looks at all migrations, and does nothing that takes its time.

    Args:
        service: whose migrations they are.
        on_lost: called once a client was given up.
        stopping: ends it.
    """

    def __init__(
        self, service: AgentService, on_lost: Callable[[], object], stopping: threading.Event
    ) -> None:
        self._service = service
        self._on_lost = on_lost
        self._stopping = stopping
        # From when on each may be given up once more.
        self._again: dict[str, float] = {}

    def start(self) -> None:
        """Begin to watch."""
        keep_doing("watch", self._step, self._stopping)

    def _step(self) -> None:
        if self._stopping.wait(_WATCH_S):
            return
        now = time.monotonic()
        for migration in self._service.all():
            silent_s = now - migration.seen
            if silent_s > migration.lost_s and not migration.over:
                self._begin(migration, silent_s)
        self._service.streams.end_silent()
        self._service.forget(_REMEMBERED_S)
        if now - self._service.heard > _IDLE_S:
            self._on_lost()

    def _begin(self, migration: Incoming, silent_s: float) -> None:
        """In a thread of its own: nobody else waits for its hooks and its engine."""
        if time.monotonic() < self._again.get(migration.id, 0):
            return
        self._again[migration.id] = math.inf
        log.warning("no sign of its client for %.0f s", silent_s, extra={"migration": migration.id})

        def end() -> None:
            if give_up(migration):
                self._again.pop(migration.id, None)
            else:
                self._again[migration.id] = time.monotonic() + _AGAIN_S
            self._on_lost()

        threading.Thread(target=end, name="give up", daemon=True).start()


def give_up(migration: Incoming) -> bool:
    """Abort it, whose client is lost; whether that went well. A failure is logged."""
    with logs.about(migration.id):
        return attempt("giving it up", lambda: migration.abort(client_lost=True))
