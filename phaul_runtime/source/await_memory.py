"""After a lazy restore: wait until the last page is in, and say so in the report."""

from __future__ import annotations

import time

from phaul_runtime.destination.lazy_restore import FATES
from phaul_runtime.errors import DestinationError, PhaulError
from phaul_runtime.events import Filled, Filling, Listener
from phaul_runtime.report import MigrationReport
from phaul_runtime.rpc.client import RemoteAgent

_POLL_S = 0.3
# Longer than the destination itself waits, which knows the reason.
_STALLED_S = 180.0


def await_filled(
    agent: RemoteAgent, report: MigrationReport, full_because: str, listener: Listener
) -> None:
    """Wait for the pager of the copy that runs; its outcome is in the report.

    Args:
        agent: of the destination.
        report: `restore` and what is lazy about it are filled in, or a warning is added.
        full_because: why the restore was in full; empty if it was lazy.
        listener: told how far it is.
    """
    report.restore = f"full: {full_because}" if full_because else "lazy"
    if full_because:
        return
    missing, since = -1, time.monotonic()
    try:
        while not (now := agent.filled()).over:
            listener(Filling(now.pages, now.missing))
            if now.missing != missing:
                missing, since = now.missing, time.monotonic()
            elif time.monotonic() - since > _STALLED_S:
                raise DestinationError("no page has come for long")
            time.sleep(_POLL_S)
    except PhaulError as error:
        report.warnings.append(
            f"it is not known whether the last page has arrived: {error.message}; "
            "if the pager there was killed, the copy reads zeros"
        )
        return
    if now.full_because:
        report.restore = f"full: {now.full_because}"
        return
    report.lazy_complete_ms = now.ms
    report.lazy = {
        "pages": now.pages,
        "faults": now.faults,
        "worst_fault_ms": now.worst_fault_ms,
        **{name: getattr(now, name) for name in FATES},
    }
    report.warnings += [f"lazy restore: {note}" for note in now.notes]
    listener(Filled(now.pages, now.faults, now.ms))
