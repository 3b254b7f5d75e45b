"""The journal of a migration: a directory an id under the state directory, a file a role.

A file holds one record a line (`journalformat`), only ever appended to. A record that names a state
is on the disk (fsync) before `enter` returns; the others lose nothing but tidiness when the host
crashes. A process that works on an end of a migration holds a lock on that end's file, which its
death releases.

Space is reserved when a journal is created, so that a disk that fills up in the middle of a
move does not keep its last steps from being written.

A file that is damaged is never taken for what can still be read of it: that is `JournalDamaged`.
What surveys all migrations of a host names it and goes on.
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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phaul_runtime.cutover.journal_file import JournalFile, read_whole, reserve
from phaul_runtime.cutover.journal_format import (
    MARK_BYTES,
    STEP,
    Contents,
    Damage,
    closed_state,
    decode,
    json_object,
)
from phaul_runtime.cutover.states import Role, State, guard
from phaul_runtime.errors import (
    JournalDamaged,
    MigrationFailed,
    NoSuchMigration,
    StillUnderWay,
    UsageError,
)

log = logging.getLogger(__name__)

_ID = re.compile(r"[0-9a-f]{8,64}")
# Of a file that is read while somebody writes to it.
_READINGS = 5
REPORT = "report.json"
RUNS = "runs"
"""A fact of both ends: the destination's copy runs, and this end knows."""
KEPT = 200
"""How many settled migrations a host remembers, unless it is told another number."""


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
        contents = decode(read_whole(fd))
        if contents.damage is not None:
            raise damaged(path, contents.damage)
        self.records = contents.records
        self.state, self.facts = replay(self.records)
        self._file = JournalFile(fd, contents)

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
            reserve(fd, STEP)
            for place in (directory, state_dir):
                sync_directory(place)
        except OSError as error:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise MigrationFailed(f"cannot write to {state_dir}: {error.strerror}") from error
        return cls._owning(path, role, fd)

    @classmethod
    def open(
        cls, state_dir: Path, migration_id: str, role: Role, *, wait_s: float = 1.0
    ) -> Journal:
        """Open an existing one; waits up to `wait_s` seconds for another process that has it.

        Raises:
            NoSuchMigration: there is none.
            StillUnderWay: somebody still works on it.
            JournalDamaged: it cannot be relied on.
        """
        path = journal_path(state_dir, migration_id, role)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise NoSuchMigration(f"no migration {migration_id} with this {role.value}") from error
        except OSError as error:
            raise _unreadable(path, error) from error
        deadline = time.monotonic() + wait_s
        while not _try_lock(fd):
            if time.monotonic() >= deadline:
                os.close(fd)
                raise StillUnderWay(
                    f"migration {migration_id} is still under way at its {role.value}"
                )
            time.sleep(0.2)
        return cls._owning(path, role, fd)

    @classmethod
    def _owning(cls, path: Path, role: Role, fd: int) -> Journal:
        """Made of a locked descriptor, which is closed where that fails."""
        try:
            return cls(path, role, fd)
        except OSError as error:
            os.close(fd)
            raise _unreadable(path, error) from error
        except BaseException:
            os.close(fd)
            raise

    def enter(self, state: State, **facts: Any) -> None:
        """Go to `state`; the record is flushed to the disk before this returns.

        Raises:
            MigrationFailed: the table has no such transition, or the disk refuses.
        """
        guard(self.role, self.state, state)
        self._append({"state": state.value, **facts}, sync=True)
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
        with self._writing():
            self._file.sync()

    def keep_report(self, report: dict[str, Any]) -> None:
        """Lay a migration's report beside its journal."""
        with contextlib.suppress(OSError):
            (self.path.parent / REPORT).write_text(json.dumps(report), encoding="utf-8")

    def close(self) -> None:
        """Give it free; idempotent, and raises nothing.

        Where the end cannot be marked, it is left as by a process that was killed.
        """
        self._file.close(self.state)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, record: dict[str, Any], *, sync: bool = False) -> None:
        """Write a record; of one that cannot be written, or synced, nothing is kept."""
        record = {"time": round(time.time(), 3), **record}
        with self._writing():
            self._file.append(record, sync=sync)
        self.records.append(record)
        replay([record], self.facts)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise MigrationFailed(f"cannot write {self.path}: {error.strerror}") from error

    @property
    def _fd(self) -> int:
        return self._file.fd

    @property
    def _end(self) -> int:
        return self._file.end


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


# -- reading without a lock --------------------------------------------------------------------


def damaged(path: Path, damage: Damage) -> JournalDamaged:
    """The error for what is wrong with a journal."""
    where = "" if damage.offset is None else f" at byte {damage.offset}"
    return JournalDamaged(
        f"{path} is damaged{where}: {damage.reason}",
        hint=f"phaul-runtime show {path.parent.name}, on both hosts, has what can be read; "
        "what to do then is in docs/recovery.md",
    )


def _unreadable(path: Path, error: OSError) -> JournalDamaged:
    return damaged(path, Damage(None, f"it cannot be read: {error.strerror}"))


@contextmanager
def trusted(path: Path) -> Iterator[None]:
    """In the block facts of the journal `path` are used as what they have to be.

    Raises:
        JournalDamaged: one is missing, or something else.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        log.debug("a fact of %s is of no use", path, exc_info=True)
        what = ascii(" ".join(str(error).split())[:200])
        raise damaged(
            path, Damage(None, f"a fact is missing or of no use: {type(error).__name__}: {what}")
        ) from error


def examine(path: Path) -> Contents:
    """What a journal's file says, and what is wrong with it; nothing if there is none.

    Somebody may be writing to it: what is wrong is believed when it is seen twice.
    """
    before = b""
    contents = Contents()
    for _ in range(_READINGS):
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return Contents()
        except OSError as error:
            return Contents(damage=Damage(None, f"it cannot be read: {error.strerror}"))
        contents = decode(data)
        if contents.damage is None or data == before:
            break
        before = data
    return contents


def _intact(path: Path) -> list[dict[str, Any]]:
    contents = examine(path)
    if contents.damage is not None:
        raise damaged(path, contents.damage)
    return contents.records


def read_records(state_dir: Path, migration_id: str, role: Role) -> list[dict[str, Any]]:
    """The records of one end, without a lock; empty if there are none.

    Raises:
        JournalDamaged: they cannot be relied on.
    """
    return _intact(journal_path(state_dir, migration_id, role))


def state_of(path: str | Path) -> State | None:
    """The state that a journal names; None if there is none, or nothing was begun.

    Of one that was settled and closed only the end is read.

    Raises:
        JournalDamaged: of another one: it cannot be relied on.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unreadable(Path(path), error) from error
    try:
        end = os.fstat(fd).st_size
        state = closed_state(os.pread(fd, MARK_BYTES, max(0, end - MARK_BYTES)))
    except OSError as error:
        raise _unreadable(Path(path), error) from error
    finally:
        os.close(fd)
    return state if state is not None and state.settled else replay(_intact(Path(path)))[0]


def read_report(state_dir: Path, migration_id: str) -> dict[str, Any] | None:
    """The report that was kept of a migration, if there is one."""
    try:
        return json_object((state_dir / checked_id(migration_id) / REPORT).read_bytes())
    except OSError:
        return None


# -- what lies under a state directory ---------------------------------------------------------


def _directories(state_dir: Path) -> list[os.DirEntry[str]]:
    """Those of migrations, in no order."""
    try:
        with os.scandir(state_dir) as entries:
            return [each for each in entries if _ID.fullmatch(each.name) and each.is_dir()]
    except OSError:
        return []


def migration_ids(state_dir: Path) -> list[str]:
    """All ids with a journal, oldest first."""
    found = []
    for entry in _directories(state_dir):
        with contextlib.suppress(OSError):  # forgotten just now
            found.append((entry.stat().st_ctime_ns, entry.name))
    return [name for _, name in sorted(found)]


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


@dataclass(frozen=True)
class OpenEnd:
    """An end of a migration that is not known to be settled.

    Attributes:
        id: of the migration.
        role: which end.
        stands: at which state, or what is wrong with its journal.
    """

    id: str
    role: Role
    stands: State | JournalDamaged


def open_ends(state_dir: Path, *, idle: bool = False) -> list[OpenEnd]:
    """All of them, the oldest migration first; `idle`: only those that nobody works on.

    Of settled ones little is read, and of those that somebody works on nothing if they are not
    asked for: there may be many.
    """
    found = []
    for entry in _directories(state_dir):
        for role in Role:
            path = f"{entry.path}/{role.value}.journal"
            if idle and is_locked(Path(path)):
                continue
            try:
                state = state_of(path)
            except JournalDamaged as error:
                found.append(OpenEnd(entry.name, role, error))
            else:
                if state is not None and not state.settled:
                    found.append(OpenEnd(entry.name, role, state))
    return sorted(found, key=lambda end: _changed(state_dir / end.id))


def _changed(directory: Path) -> int:
    try:
        return directory.stat().st_ctime_ns
    except OSError:
        return 0


def unsettled(state_dir: Path) -> list[tuple[str, Role, State]]:
    """The ends of migrations that nobody works on and that are neither done nor aborted.

    Those with a damaged journal are not among them: `open_ends` names them.
    """
    found = []
    for end in open_ends(state_dir, idle=True):
        if isinstance(end.stands, State):
            found.append((end.id, end.role, end.stands))
    return found


def forget_old(state_dir: Path, keep: int) -> None:
    """Remove the journals of the oldest settled migrations beyond `keep`; raises nothing.

    Of one with a damaged journal everything stays.
    """
    for migration_id in migration_ids(state_dir)[:-keep]:
        paths = [journal_path(state_dir, migration_id, role) for role in Role]
        # A service may work on hundreds: of those nothing is read.
        if any(map(is_locked, (state_dir / migration_id, *paths))):
            continue
        try:
            states = [replay(_intact(path))[0] for path in paths]
        except JournalDamaged:
            continue
        # Asked again: somebody may have taken one up while it was read.
        busy = any(map(is_locked, paths))
        if all(state is None or state.settled for state in states) and not busy:
            shutil.rmtree(state_dir / migration_id, ignore_errors=True)
