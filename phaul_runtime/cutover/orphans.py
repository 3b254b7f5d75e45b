"""What earlier migrations left on this host: whose owner is dead, and who has to be told.

Every private directory below the working directory is locked by the process that works in it, as
is each journal: what is not locked belongs to nobody.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

from phaul_runtime.cutover.journal import (
    OpenEnd,
    is_locked,
    journal_path,
    open_ends,
    read_records,
    replay,
)
from phaul_runtime.cutover.states import Role
from phaul_runtime.errors import JournalDamaged
from phaul_runtime.memory.image_dirs import remove_tree

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
    """Those that no unsettled migration needs either, nor one whose state is not known."""
    for path in private_directories(workdir):
        migration_id = path.name.rpartition("-")[2]
        try:
            age = time.time() - path.stat().st_mtime
        except OSError:
            continue
        # Of one without a journal it is not known whether it has only just been made.
        known = (state_dir / migration_id).is_dir()
        if (known or abs(age) > _SETTLED_S) and not _waits(state_dir, migration_id):
            yield path


def _waits(state_dir: Path, migration_id: str) -> bool:
    """Whether something may still be done about a migration, by anybody."""
    for role in Role:
        path = journal_path(state_dir, migration_id, role)
        try:
            state, _ = replay(read_records(state_dir, migration_id, role))
        except JournalDamaged:
            return True
        if (state is not None and not state.settled) or is_locked(path):
            return True
    return False


def find(workdir: Path, state_dir: Path) -> list[str]:
    """A line for each leftover; changes nothing."""
    return [_line(end) for end in open_ends(state_dir, idle=True)] + [
        f"{path} belongs to nobody: phaul-runtime recover"
        for path in _ownerless(workdir, state_dir)
    ]


def _line(end: OpenEnd) -> str:
    if isinstance(end.stands, JournalDamaged):
        return f"migration {end.id}: {end.stands.message}: phaul-runtime show {end.id}"
    return (
        f"migration {end.id} stands at {end.stands.value} at its {end.role.value}: "
        f"phaul-runtime recover {end.id}"
    )


def sweep(workdir: Path, state_dir: Path) -> list[Path]:
    """Remove the directories that belong to nobody and to no unsettled migration."""
    removed = list(_ownerless(workdir, state_dir))
    for path in removed:
        remove_tree(path)
    return removed
