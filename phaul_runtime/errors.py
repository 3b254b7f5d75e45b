"""Every error that phaul-runtime raises on purpose, with the exit code it ends the CLI with.

::

    PhaulError                      1  internal error
    ├── UsageError                  2  wrong arguments
    │   └── ConfigError             2  wrong configuration: file, line, key, accepted values
    ├── Refused                     3  nothing was frozen, nothing was changed
    │   ├── NoSuchTarget            3  no such process or container
    │   │   └── TargetGone          3  it ended by itself while it was being moved
    │   ├── DestinationUnreachable  3  no channel to the destination
    │   ├── CheckFailed             3  a preflight check says no
    │   ├── NoSuchMigration         3  no journal of a migration with that id
    │   └── StillUnderWay           3  somebody else works on that migration
    ├── MigrationFailed             4  the move failed, the source still runs
    │   ├── CriuError               4  CRIU said no: its own first error lines
    │   ├── ChannelError            4  the control or the memory channel broke
    │   ├── DestinationError        4  the destination could not do its part
    │   └── NotConverging           4  the budget cannot be met and the policy says abort
    ├── OutcomeUnknown              5  the source is dead or held, the rest not known
    │   └── JournalDamaged          5  a journal cannot be relied on: file, offset, what is wrong
    └── Cancelled                   6  by the user, before the cut-over

An error's message is one line (CRIU's lines follow it, indented); `hint` says what to do about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from phaul_runtime.printable import one_line


class ExitCode(IntEnum):
    """What the CLI ends with."""

    MOVED = 0
    INTERNAL = 1
    USAGE = 2
    REFUSED = 3
    FAILED = 4
    UNKNOWN = 5
    CANCELLED = 6
    PARTLY = 7


MEANINGS = {
    ExitCode.MOVED: "done: of a move, the destination's copy runs",
    ExitCode.INTERNAL: "internal error: please report it",
    ExitCode.USAGE: "the command line or the configuration is wrong; nothing was done",
    ExitCode.REFUSED: "refused before anything was frozen, or there is no such thing",
    ExitCode.FAILED: "failed; the source's copy runs on",
    ExitCode.UNKNOWN: "outcome unknown: the source's copy is dead or held, the destination did not "
    "confirm: `phaul-runtime recover`; or a journal is damaged: `phaul-runtime show`",
    ExitCode.CANCELLED: "cancelled before the cut-over; the source's copy runs on",
    ExitCode.PARTLY: "of a batch, not all moves succeeded",
}
"""What each exit code says, for people."""


class PhaulError(Exception):
    """Base of all errors of phaul-runtime.

    Args:
        message: what went wrong, one line.
        hint: what to do about it, one line; empty when there is nothing to add.
        host: the host on which it happened; empty for this one.
        log: the lines of a log that name the cause, most telling first.
    """

    exit_code = ExitCode.INTERNAL

    def __init__(
        self, message: str, *, hint: str = "", host: str = "", log: Sequence[str] = ()
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.host = host
        self.log = tuple(log)

    def __str__(self) -> str:
        """For people: what has a line of its own begins with spaces; names are made harmless."""
        text = one_line(f"{self.host}: {self.message}" if self.host else self.message)
        text += "".join(f"\n    {one_line(line)}" for line in self.log)
        return f"{text}\n    hint: {one_line(self.hint)}" if self.hint else text


class UsageError(PhaulError):
    """The command line or a call's arguments make no sense."""

    exit_code = ExitCode.USAGE


class ConfigError(UsageError):
    """The configuration is wrong; the message names the file, the line and the key."""


class Refused(PhaulError):
    """Said no before anything was frozen."""

    exit_code = ExitCode.REFUSED


class NoSuchTarget(Refused):
    """The process or container does not exist."""


class TargetGone(NoSuchTarget):
    """The process ended by itself while it was being moved: there is nothing left to move."""


class DestinationUnreachable(Refused):
    """No channel to the destination could be opened."""


class CheckFailed(Refused):
    """A preflight check refuses the move."""


class NoSuchMigration(Refused):
    """No journal of a migration with that id."""


class StillUnderWay(Refused):
    """Somebody else works on that end of the migration."""


class MigrationFailed(PhaulError):
    """The move failed; the source still runs, the destination was cleaned."""

    exit_code = ExitCode.FAILED


class CriuError(MigrationFailed):
    """A CRIU request failed; `log` has the first error lines of CRIU's own log.

    Args:
        request: the RPC request, as `DUMP` or `RESTORE`.
        log_text: the end of CRIU's log, to be kept beside the report.
    """

    def __init__(
        self,
        message: str,
        *,
        request: str = "",
        log_text: str = "",
        hint: str = "",
        host: str = "",
        log: Sequence[str] = (),
    ) -> None:
        super().__init__(message, hint=hint, host=host, log=log)
        self.request = request
        self.log_text = log_text


class ChannelError(MigrationFailed):
    """The control channel or the memory channel broke, or a deadline passed on it."""


class DestinationError(MigrationFailed):
    """The destination's agent could not do what it was asked to."""


class NotConverging(MigrationFailed):
    """Memory is dirtied faster than it can be carried, and the policy says abort."""


class OutcomeUnknown(PhaulError):
    """The source's copy is dead, or held by a post-copy move, and the destination did not confirm
    that its own runs, or does not take the pages that it misses.
    """

    exit_code = ExitCode.UNKNOWN


class JournalDamaged(OutcomeUnknown):
    """A journal cannot be relied on: where its end of the migration stands is not known."""


class Cancelled(PhaulError):
    """The user cancelled before the cut-over: the source runs on."""

    exit_code = ExitCode.CANCELLED
