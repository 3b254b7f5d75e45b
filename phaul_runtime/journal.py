"""The journal of a migration: a directory an id under the state directory, a file a role.

A file holds one JSON object a line, only ever appended to. A record that names a state is on the
disk (fsync) before `enter` returns; the others lose nothing but tidiness when the host crashes.
Whoever works on an end of a migration holds a lock on that end's file, which its death releases.

Space is reserved when a journal is created, so that a disk that fills up in the middle of a
move does not keep its last steps from being written.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phaul_runtime.errors import MigrationFailed, NoSuchMigration, StillUnderWay, UsageError
from phaul_runtime.states import Role, State, guard

log = logging.getLogger(__name__)

_ID = re.compile(r"[0-9a-f]{8,64}")
_RESERVED = 64 << 10
REPORT = "report.json"
RUNS = "runs"
"""A fact of both ends: the destination's copy runs, and this end knows."""


def checked_id(text: str) -> str:
    """A migration id that is safe as a directory's name.

    Raises:
        UsageError: it is not.
    """
    if not _ID.fullmatch(text):
        raise UsageError(f"malformed migration id {text[:80]!r}")
    return text


class Journal:
    """One end's journal, open and locked for writing.

    Attributes:
        state: the last that was entered; None in a new one.
        facts: all facts that were recorded, the latest of each name; `add` makes lists.
    """

    def __init__(self, path: Path, role: Role, fd: int) -> None:
        self.path = path
        self.role = role
        self._fd = fd
        self.records = list(_records(path))
        self.state, self.facts = replay(self.records)
        self._end = sum(len(_line(record)) for record in self.records)

    @property
    def id(self) -> str:
        """The migration's id."""
        return self.path.parent.name

    @classmethod
    def create(cls, state_dir: Path, migration_id: str, role: Role) -> Journal:
        """Begin the journal of one end.

        Raises:
            MigrationFailed: there is one already, or the disk refuses.
        """
        directory = state_dir / checked_id(migration_id)
        path = journal_path(state_dir, migration_id, role)
        try:
            state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.mkdir(mode=0o700, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError as error:
            raise MigrationFailed(f"migration {migration_id} exists already here") from error
        except OSError as error:
            raise MigrationFailed(f"cannot write to {state_dir}: {error.strerror}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)  # at most somebody looks whether it is locked
            os.posix_fallocate(fd, 0, _RESERVED)
            for place in (directory, state_dir):
                sync_directory(place)
        except OSError as error:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise MigrationFailed(f"cannot write to {state_dir}: {error.strerror}") from error
        return cls(path, role, fd)

    @classmethod
    def open(
        cls, state_dir: Path, migration_id: str, role: Role, *, wait_s: float = 1.0
    ) -> Journal:
        """Open an existing one; waits up to `wait_s` seconds for whoever works on it.

        Raises:
            NoSuchMigration: there is none.
            StillUnderWay: somebody still works on it.
        """
        path = journal_path(state_dir, migration_id, role)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise NoSuchMigration(f"no migration {migration_id} with this {role.value}") from error
        deadline = time.monotonic() + wait_s
        while True:
            if _try_lock(fd):
                return cls(path, role, fd)
            if time.monotonic() >= deadline:
                os.close(fd)
                raise StillUnderWay(
                    f"migration {migration_id} is still under way at its {role.value}"
                )
            time.sleep(0.2)

    def enter(self, state: State, **facts: Any) -> None:
        """Go to `state`; on the disk on return.

        Raises:
            MigrationFailed: the table has no such transition, or the disk refuses.
        """
        guard(self.role, self.state, state)
        self._append({"state": state.value, **facts})
        self.sync()
        self.state = state
        log.info("%s: %s", self.role.value, state.value, extra={"migration": self.id})

    def pass_through(self, state: State, **facts: Any) -> None:
        """Go to `state`; it survives the end of this process, that of the host with the next one.

        Raises:
            MigrationFailed: as `enter`.
        """
        guard(self.role, self.state, state)
        self._append({"state": state.value, **facts})
        self.state = state

    def note(self, **facts: Any) -> None:
        """Record facts; they survive the end of this process, not that of the host."""
        self._append(facts)

    def add(self, name: str, *values: Any) -> None:
        """Append to the list `name` in the facts."""
        self._append({"add": {name: list(values)}})

    def sync(self) -> None:
        """Wait until everything is on the disk."""
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise MigrationFailed(f"cannot write {self.path}: {error.strerror}") from error

    def keep_report(self, report: dict[str, Any]) -> None:
        """Lay a migration's report beside its journal."""
        with contextlib.suppress(OSError):
            (self.path.parent / REPORT).write_text(json.dumps(report), encoding="utf-8")

    def close(self) -> None:
        """Give it free; idempotent."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._end)
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, record: dict[str, Any]) -> None:
        record = {"time": round(time.time(), 3), **record}
        line = _line(record)
        try:
            os.pwrite(self._fd, line, self._end)
        except OSError as error:
            raise MigrationFailed(f"cannot write {self.path}: {error.strerror}") from error
        self._end += len(line)
        self.records.append(record)
        _, self.facts = replay([record], self.facts)


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def journal_path(state_dir: Path, migration_id: str, role: Role) -> Path:
    """The file of one end's journal."""
    return state_dir / checked_id(migration_id) / f"{role.value}.journal"


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The whole records; one that was cut short by a crash, and the reserve, end them."""
    for line in path.read_bytes().split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:
            return
        if not isinstance(record, dict):
            return
        yield record


def replay(
    records: list[dict[str, Any]], facts: dict[str, Any] | None = None
) -> tuple[State | None, dict[str, Any]]:
    """The last state and the facts that records add up to."""
    state: State | None = None
    facts = {} if facts is None else facts
    for record in records:
        for name, value in record.items():
            if name == "state":
                state = State(value)
            elif name == "add":
                for kind, values in value.items():
                    facts.setdefault(kind, []).extend(values)
            elif name != "time":
                facts[name] = value
    return state, facts


# -- what lies under a state directory ---------------------------------------------------------


def read_records(state_dir: Path, migration_id: str, role: Role) -> list[dict[str, Any]]:
    """The records of one end, without a lock; empty if there are none."""
    try:
        return list(_records(journal_path(state_dir, migration_id, role)))
    except OSError:
        return []


def read_report(state_dir: Path, migration_id: str) -> dict[str, Any] | None:
    """The report that was kept of a migration, if there is one."""
    try:
        text = (state_dir / checked_id(migration_id) / REPORT).read_text(encoding="utf-8")
        report = json.loads(text)
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) else None


def migration_ids(state_dir: Path) -> list[str]:
    """All ids with a journal, oldest first."""
    try:
        found = [entry for entry in os.scandir(state_dir) if _ID.fullmatch(entry.name)]
        return [entry.name for entry in sorted(found, key=lambda entry: entry.stat().st_ctime)]
    except OSError:
        return []


def is_locked(path: Path) -> bool:
    """Whether somebody holds a lock on a file or directory."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _try_lock(fd)
    finally:
        os.close(fd)


def lock_directory(path: Path) -> int:
    """Mark a private directory as in use until the descriptor is closed or its owner dies."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def unsettled(state_dir: Path) -> list[tuple[str, Role, State]]:
    """The ends of migrations that nobody works on and that are neither done nor aborted."""
    found = []
    for migration_id in migration_ids(state_dir):
        for role in Role:
            path = journal_path(state_dir, migration_id, role)
            state, _ = replay(read_records(state_dir, migration_id, role))
            if state is not None and not state.settled and not is_locked(path):
                found.append((migration_id, role, state))
    return found


def forget_old(state_dir: Path, keep: int) -> None:
    """Remove the journals of the oldest settled migrations beyond `keep`."""
    for migration_id in migration_ids(state_dir)[:-keep]:
        ends = [replay(read_records(state_dir, migration_id, role))[0] for role in Role]
        claimed = is_locked(state_dir / migration_id)
        if all(state is None or state.settled for state in ends) and not claimed:
            shutil.rmtree(state_dir / migration_id, ignore_errors=True)
