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
from phaul_runtime.journal import is_locked, unsettled

_PRIVATE = re.compile(r"(?:(?:out|agent|ssh)-)?[0-9a-f]{8,64}")
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


def find(workdir: Path, state_dir: Path) -> list[str]:
    """A line for each leftover; changes nothing."""
    found = [
        f"migration {migration_id} stands at {state.value} at its {role.value}: "
        f"phaul-runtime recover {migration_id}"
        for migration_id, role, state in unsettled(state_dir)
    ]
    for path in private_directories(workdir):
        if time.time() - path.stat().st_mtime > _SETTLED_S:
            found.append(f"{path} belongs to nobody: phaul-runtime recover")
    return found


def sweep(workdir: Path, state_dir: Path) -> list[Path]:
    """Remove the directories that belong to nobody and to no unsettled migration."""
    waiting = {migration_id for migration_id, _, _ in unsettled(state_dir)}
    removed = []
    for path in private_directories(workdir):
        migration_id = path.name.rpartition("-")[2]
        if migration_id not in waiting and time.time() - path.stat().st_mtime > _SETTLED_S:
            remove_tree(path)
            removed.append(path)
    return removed
