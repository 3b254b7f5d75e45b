"""Log records on stderr: as text, as JSON lines, or for the journal; each with its migration's id.

The library logs by the standard `logging`; only a program that runs it calls `set_up`. A record is
about the migration of its `extra={"migration": id}`, or of the context it was made in (`about`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Literal

from phaul_runtime import printable
from phaul_runtime.errors import PhaulError

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["auto", "text", "json", "journal"]
LEVELS: tuple[Level, ...] = ("debug", "info", "warning", "error")
FORMATS: tuple[Format, ...] = ("auto", "text", "json", "journal")

# Theirs is the level that was asked for; of anybody else only warnings count.
_OURS = ("phaul_runtime", "phaul_engines", "phaul_hooks")
# syslog's numbers, as journald reads them at the beginning of a line (sd-daemon(3)).
_PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (logging.NOTSET, 7))

_migration: ContextVar[str] = ContextVar("migration", default="")


def enter(migration_id: str) -> None:
    """From here on, what this context logs is about that migration.

    An id may come from the other side, unchecked as yet: what could not be one is left out.
    """
    _migration.set(migration_id if migration_id.isalnum() else "")


@contextlib.contextmanager
def about(migration_id: str) -> Iterator[None]:
    """While in here, what this context logs is about that migration."""
    token = _migration.set(migration_id)
    try:
        yield
    finally:
        _migration.reset(token)


def _add_migration(record: logging.LogRecord) -> bool:
    if not hasattr(record, "migration"):
        record.migration = _migration.get()
    return True


class _Harmless:
    """What is put into a message, on one line; an error's own lines stay."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __str__(self) -> str:
        text = str(self._value)
        return text if isinstance(self._value, PhaulError) else printable.one_line(text)

    def __repr__(self) -> str:
        return printable.one_line(repr(self._value))


def _said(record: logging.LogRecord) -> str:
    if not isinstance(record.args, tuple):
        return record.getMessage()
    said = tuple(
        value if isinstance(value, int | float) else _Harmless(value) for value in record.args
    )
    try:
        return str(record.msg) % said if said else str(record.msg)
    except (TypeError, ValueError):
        return record.getMessage()  # a conversion that takes no such object


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{_clock(record)} {self.words(record)}"

    def words(self, record: logging.LogRecord) -> str:
        """All but the time."""
        migration = getattr(record, "migration", "")
        about = f" [{migration}]" if migration else ""
        text = f"{record.levelname.lower()} {record.name}{about}: {_said(record)}"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        # Whatever has more than one line: only a record begins at a line's beginning.
        return printable.lines(text).replace("\n", "\n    ")


class _Journal(_Text):
    def format(self, record: logging.LogRecord) -> str:
        number = next(n for level, n in _PRIORITIES if record.levelno >= level)
        # The journal makes an entry of each line.
        return "\n".join(f"<{number}>{line}" for line in self.words(record).splitlines())


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, Any] = {
            "time": _clock(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "migration": getattr(record, "migration", "") or None,
            "message": record.getMessage(),
        }
        if (data := getattr(record, "data", None)) is not None:
            told["data"] = data
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, default=str)


_FORMATTERS = {"text": _Text, "json": _Json, "journal": _Journal}


def _clock(record: logging.LogRecord) -> str:
    """RFC 3339, in UTC, to the millisecond."""
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03}Z"


def stderr_is_the_journal() -> bool:
    """Whether systemd has connected stderr to the journal, and nobody has redirected it since."""
    try:
        info = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{info.st_dev}:{info.st_ino}"


class _Handler(logging.StreamHandler[Any]):
    """Ours, so that it can be found and replaced; a record that cannot be written is left out."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """No traceback on stderr, which is what cannot be written."""


def set_up(level: Level = "warning", style: Format = "auto") -> None:
    """Log to stderr from now on; what was set up before is replaced.

    Args:
        level: of this project's records; of anybody else's there are warnings at the least.
        style: auto is journal where stderr is the journal, text elsewhere.
    """
    if style == "auto":
        style = "journal" if stderr_is_the_journal() else "text"
    handler = _Handler(sys.stderr)
    handler.setFormatter(_FORMATTERS[style]())
    handler.addFilter(_add_migration)
    root = logging.getLogger()
    for old in [found for found in root.handlers if isinstance(found, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    for name in _OURS:
        logging.getLogger(name).setLevel(level.upper())
