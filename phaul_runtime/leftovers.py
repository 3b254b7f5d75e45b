"""What earlier migrations left on this host: whose owner is dead, and who has to be told.

Every private directory below the working directory is locked by the process that works in it, as
is each journal: what is not locked belongs to nobody.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

from phaul_runtime.images import remove_tree
from phaul_runtime.journal import (
    is_locked,
    journal_path,
    migration_ids,
    read_records,
    replay,
    unsettled,
)
from phaul_runtime.states import Role

_PRIVATE = re.compile(r"(?:(?:out|agent|ssh|link)-)?[0-9a-f]{8,64}")
# Between the making of a directory and its lock there is a moment.
_SETTLED_S = 60.0


def private_directories(workdir: Path) -> Iterator[Path]:
    """The directories of migrations that nobody works in."""
    try:
        entries = sorted(workdir.iterdir())
    except OSError:
        return
    for path in entries:
        if _PRIVATE.fullmatch(path.name) and path.is_dir() and not is_locked(path):
            yield path


def _ownerless(workdir: Path, state_dir: Path) -> Iterator[Path]:
    """Those that no unsettled migration needs either."""
    known, waiting = set(migration_ids(state_dir)), set()
    for migration_id in known:
        for role in Role:
            path = journal_path(state_dir, migration_id, role)
            state, _ = replay(read_records(state_dir, migration_id, role))
            if (state is not None and not state.settled) or is_locked(path):
                waiting.add(migration_id)
    for path in private_directories(workdir):
        migration_id = path.name.rpartition("-")[2]
        try:
            age = time.time() - path.stat().st_mtime
        except OSError:
            continue
        # Of one without a journal it is not known whether it has only just been made.
        if migration_id not in waiting and (migration_id in known or abs(age) > _SETTLED_S):
            yield path


def find(workdir: Path, state_dir: Path) -> list[str]:
    """A line for each leftover; changes nothing."""
    return [
        f"migration {migration_id} stands at {state.value} at its {role.value}: "
        f"phaul-runtime recover {migration_id}"
        for migration_id, role, state in unsettled(state_dir)
    ] + [
        f"{path} belongs to nobody: phaul-runtime recover"
        for path in _ownerless(workdir, state_dir)
    ]


def sweep(workdir: Path, state_dir: Path) -> list[Path]:
    """Remove the directories that belong to nobody and to no unsettled migration."""
    removed = list(_ownerless(workdir, state_dir))
    for path in removed:
        remove_tree(path)
    return removed
