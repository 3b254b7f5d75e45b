"""How far an end of a migration is, for people: a small file beside its journal.

Nothing depends on it and nothing is decided by it: it is replaced in one step, never synced, and
what keeps it from being written is no error. It is forgotten with its journal at the latest.
"""

from __future__ import annotations

import contextlib
import json
import threading
from pathlib import Path
from typing import Any

from phaul_runtime.cutover.journal import journal_path
from phaul_runtime.cutover.journal_format import json_object
from phaul_runtime.cutover.states import Role


def progress_path(state_dir: Path, migration_id: str, role: Role) -> Path:
    """Where one end's progress is kept."""
    return journal_path(state_dir, migration_id, role).with_suffix(".progress")


def write_progress(state_dir: Path, migration_id: str, role: Role, **facts: Any) -> None:
    """Say how far this end is, instead of what was said before.

    Of post-copy: `pages` that have to come once the copy runs, and `missing`, those not there yet.
    Only beside a journal: where there is no directory of this migration none is made.
    """
    path = progress_path(state_dir, migration_id, role)
    # A thread's own: two of them never write into one.
    new = path.with_suffix(f".{threading.get_native_id()}.new")
    try:
        new.write_text(json.dumps(facts), encoding="utf-8")
        new.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink()


def read_progress(state_dir: Path, migration_id: str, role: Role) -> dict[str, Any]:
    """What was said last; empty if nothing was."""
    try:
        told = json_object(progress_path(state_dir, migration_id, role).read_bytes())
    except OSError:
        return {}
    return told or {}


def forget_progress(state_dir: Path, migration_id: str, role: Role) -> None:
    """This end is over; idempotent."""
    with contextlib.suppress(OSError):
        progress_path(state_dir, migration_id, role).unlink()
