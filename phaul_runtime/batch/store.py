"""Where batches are kept, and who works on them: a file of SQLite each, or a PostgreSQL database.

A controller holds a lock, its *presence*, while it works on a batch: nobody else takes its name,
and once it is dead, others see it. On SQLite there is one controller; its lock is on a file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phaul_runtime.errors import ConfigError, NoSuchMigration, Refused, StillUnderWay, UsageError

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

SCHEMA = "phaul_batch"
_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,59}")
_POSTGRES = ("postgresql://", "postgres://", "postgresql+psycopg://")
# A controller that lost its host is noticed after this, seconds.
_KEEPALIVE = {
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
}
_SERVER_KEEPALIVE = (
    "-c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3"
)


def checked_batch_id(text: str) -> str:
    """An id that is safe as a name.

    Raises:
        UsageError: it is not.
    """
    if not _ID.fullmatch(text):
        raise UsageError(
            f"malformed batch id {text[:80]!r}", hint="small letters, digits, - and _, up to 60"
        )
    return text


def new_batch_id() -> str:
    """An id that nobody has."""
    return secrets.token_hex(4)


class Store(ABC):
    """Where batches are kept."""

    # Several controllers may work on one batch.
    shared = False

    @abstractmethod
    def url(self, batch_id: str) -> str:
        """SQLAlchemy's URL of the database that has a batch, or will have it."""

    @abstractmethod
    def batches(self) -> list[str]:
        """The ids of all batches, the oldest first."""

    @abstractmethod
    def prepare(self, batch_id: str) -> None:
        """Make the place for a new batch.

        Raises:
            Refused: it cannot be made.
            UsageError: there is a batch with that id.
        """

    @abstractmethod
    def presence(self, batch_id: str, controller: str) -> contextlib.AbstractContextManager[None]:
        """Be `controller` of a batch for the length of the block, or until this process ends.

        Raises:
            StillUnderWay: another process is.
        """

    @abstractmethod
    def is_alive(self, batch_id: str, controller: str) -> bool:
        """Whether some process is that controller."""

    def require(self, batch_id: str) -> None:
        """Raise NoSuchMigration if there is no such batch."""
        if batch_id not in self.batches():
            raise NoSuchMigration(
                f"no batch {batch_id} in {self}", hint="phaul-runtime batch status lists them"
            )

    @staticmethod
    def parse(text: str, state_dir: Path) -> Store:
        """The store that `--store` names: a directory, or a PostgreSQL URL; empty: the default."""
        if text.startswith(_POSTGRES):
            return PostgresStore(text)
        if "://" in text:
            raise ConfigError(
                f"store {text!r}: neither a directory nor a URL of PostgreSQL",
                hint="for example postgresql://user@host/phaul",
            )
        return SqliteStore(Path(text) if text else state_dir / "batches")


class SqliteStore(Store):
    """A file a batch in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __str__(self) -> str:
        return str(self.directory)

    def _path(self, batch_id: str) -> Path:
        return self.directory / f"{checked_batch_id(batch_id)}.sqlite"

    def url(self, batch_id: str) -> str:
        return f"sqlite:///{self._path(batch_id).absolute()}"

    def batches(self) -> list[str]:
        try:
            found = [p for p in self.directory.iterdir() if p.suffix == ".sqlite"]
        except OSError:
            return []
        found.sort(key=lambda path: path.with_suffix(".lock").stat().st_ctime)
        return [path.stem for path in found if _ID.fullmatch(path.stem)]

    def prepare(self, batch_id: str) -> None:
        path = self._path(batch_id)
        if path.exists():
            raise UsageError(f"there is a batch {batch_id} already: {path}")
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.with_suffix(".lock").touch(mode=0o600)
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
            with contextlib.closing(sqlite3.connect(path)) as database:
                # Readers do not wait for writers then, and a commit waits for the disk once.
                database.execute("PRAGMA journal_mode=WAL")
        except (OSError, sqlite3.Error) as error:
            raise Refused(
                f"cannot write to {self.directory}: {error}",
                hint="--store names another directory",
            ) from error

    @contextmanager
    def presence(self, batch_id: str, controller: str) -> Iterator[None]:
        """See `Store`: there is only one controller here, whatever its name."""
        fd = os.open(self._path(batch_id).with_suffix(".lock"), os.O_RDWR | os.O_CLOEXEC)
        try:
            if not _locked(fd):
                raise StillUnderWay(
                    f"another process works on batch {batch_id}",
                    hint="several controllers need --store postgresql://...",
                )
            yield
        finally:
            os.close(fd)

    def is_alive(self, batch_id: str, controller: str) -> bool:
        try:
            fd = os.open(self._path(batch_id).with_suffix(".lock"), os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            return not _locked(fd)
        finally:
            os.close(fd)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class PostgresStore(Store):
    """All batches in one schema of one database; a controller's presence is an advisory lock."""

    shared = True

    def __init__(self, url: str) -> None:
        _, _, rest = url.partition("://")
        self._url = f"postgresql+psycopg://{rest}"
        self._engine: Engine | None = None

    def __str__(self) -> str:
        from sqlalchemy.engine import make_url  # noqa: PLC0415 - of the extra

        return make_url(self._url).render_as_string(hide_password=True)

    def url(self, batch_id: str) -> str:
        checked_batch_id(batch_id)
        return self._url

    def _connect(self) -> Any:
        import sqlalchemy as sa  # noqa: PLC0415 - of the extra

        if self._engine is None:
            self._engine = sa.create_engine(
                self._url,
                poolclass=sa.NullPool,
                isolation_level="AUTOCOMMIT",
                connect_args={
                    "connect_timeout": 10,
                    "options": _SERVER_KEEPALIVE,
                    **_KEEPALIVE,
                },
            )
        try:
            return self._engine.connect()
        except sa.exc.SQLAlchemyError as error:
            raise Refused(f"cannot reach {self}: {str(error).splitlines()[0]}") from error

    def batches(self) -> list[str]:
        import sqlalchemy as sa  # noqa: PLC0415 - of the extra

        query = sa.text(
            f"SELECT split_part(workflow_uuid, ':', 1) AS id FROM {SCHEMA}.workflow_status "  # noqa: S608 - a constant
            "WHERE name = 'phaul_batch' GROUP BY id ORDER BY min(created_at)"
        )
        with self._connect() as connection:
            if not connection.execute(
                sa.text("SELECT to_regclass(:name)"), {"name": f"{SCHEMA}.workflow_status"}
            ).scalar():
                return []
            return [row.id for row in connection.execute(query)]

    def prepare(self, batch_id: str) -> None:
        if batch_id in self.batches():
            raise UsageError(f"there is a batch {batch_id} already in {self}")

    @contextmanager
    def presence(self, batch_id: str, controller: str) -> Iterator[None]:
        with self._connect() as connection:
            if not self._lock(connection, batch_id, controller):
                raise StillUnderWay(
                    f"another process is controller {controller} of batch {batch_id}",
                    hint="--controller gives this one another name",
                )
            yield

    def is_alive(self, batch_id: str, controller: str) -> bool:
        with self._connect() as connection:
            return not self._lock(connection, batch_id, controller)

    @staticmethod
    def _lock(connection: Any, batch_id: str, controller: str) -> bool:
        import sqlalchemy as sa  # noqa: PLC0415 - of the extra

        query = sa.text("SELECT pg_try_advisory_lock(hashtextextended(:name, 0))")
        name = f"phaul-runtime batch {batch_id} {controller}"
        return bool(connection.execute(query, {"name": name}).scalar())
