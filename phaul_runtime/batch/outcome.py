"""What follows from one attempt to move something: pure.

An attempt is one migration id. It may be asked for several times: as long as it is not known what
became of it, the same id is asked again, and nothing is moved twice. Only an attempt that is known
to have left the source's copy running is followed by another one, with an id of its own.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from typing import Any

from phaul_runtime.batch.plan import MoveState
from phaul_runtime.errors import ExitCode

# Of a report: what is kept of each attempt; thousands of them are read at once.
_KEPT = (
    "downtime_ms", "total_ms", "bytes_transferred", "restored_pid", "restore", "source",
    "destination", "throttled_to", "expected_freeze_ms", "logs",
)  # fmt: skip
_NUMBERS = frozenset({
    "downtime_ms", "total_ms", "bytes_transferred", "restored_pid", "throttled_to", "bytes",
    "expected_freeze_ms", "number", "pages", "missing",
})  # fmt: skip
_TEXTS = frozenset({"event", "result", "error", "error_kind"})
_WARNINGS = 5
_LINE = 500
# Refusals that may be gone a moment later: nothing was begun.
RETRIED_KINDS = frozenset({"DestinationUnreachable"})
ASKED_AGAIN_KINDS = frozenset({"StillUnderWay"})
# How often an outcome that is unknown is settled again, before that is left to the operator.
UNKNOWN_ASKS = 4
_SHELL_CANNOT = (126, 127)


def as_told(found: dict[str, Any]) -> dict[str, Any]:
    """An event or a report of a source, without what has not the type that it ought to have.

    A source is another host: what it prints is read as whatever anybody might have printed.
    """
    kept = {}
    for name, value in found.items():
        if name in _NUMBERS:
            good = isinstance(value, int | float) and not isinstance(value, bool)
            good = good and math.isfinite(value)
        elif name in _TEXTS:
            good = isinstance(value, str)
        else:
            good = name != "warnings" or isinstance(value, list)
        if good:
            kept[name] = value
    return kept


@dataclass(frozen=True)
class Answer:
    """What one asking for an attempt brought.

    Attributes:
        code: exit code of the command; None if it was lost: a broken connection, a signal.
        report: the report's JSON, if it came.
        said: the last lines of its stderr.
    """

    code: int | None
    report: dict[str, Any] | None = None
    said: str = ""


class Next(Enum):
    """What to do after an answer."""

    END = "end"
    ASK_AGAIN = "ask again"
    RETRY = "retry"


@dataclass
class Attempt:
    """One attempt, as it is kept.

    Attributes:
        id: the migration's.
        number: from 1.
        began, ended: seconds since the epoch, by the runner's clock.
        asks: how often it was asked for; `unsure` of these answers left its outcome open.
        controller: who asked.
        state: its outcome.
        kind: class of the error, as in the report.
        report: some of the report's numbers.
    """

    id: str
    number: int
    began: float
    ended: float = 0.0
    asks: int = 0
    unsure: int = 0
    controller: str = ""
    state: str = MoveState.RUNNING.value
    error: str = ""
    kind: str = ""
    report: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Attempt:
        """The attempt that `to_json` was called of."""
        names = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in told.items() if name in names})


_BY_CODE = {
    ExitCode.MOVED: MoveState.MOVED,
    ExitCode.REFUSED: MoveState.REFUSED,
    ExitCode.FAILED: MoveState.FAILED,
    ExitCode.UNKNOWN: MoveState.UNKNOWN,
    ExitCode.CANCELLED: MoveState.CANCELLED,
}


def state_of(answer: Answer) -> MoveState:
    """What an answer says has become of the attempt; RUNNING if it does not say."""
    if answer.code is None:
        return MoveState.RUNNING
    if answer.code == ExitCode.MOVED and (answer.report or {}).get("result") != "moved":
        return MoveState.RUNNING  # it ended well, but its report was lost on the way
    if answer.code in _SHELL_CANNOT:
        return MoveState.REFUSED
    if answer.code > ExitCode.PARTLY:
        return MoveState.RUNNING
    return _BY_CODE.get(ExitCode(answer.code), MoveState.ERROR)


def follow(
    answer: Answer, attempt: Attempt, *, may_retry: bool, lost_for_s: float, reconnect_s: float
) -> Next:
    """Write down in `attempt` what an answer says, and tell what to do next.

    Args:
        answer: to the last asking.
        attempt: is changed.
        may_retry: there are retries left.
        lost_for_s: since when there has been no answer, seconds.
        reconnect_s: for how long that is borne, seconds.
    """
    state = state_of(answer)
    report = answer.report or {}
    attempt.kind = report.get("error_kind", "")
    attempt.error = (report.get("error") or answer.said).strip()[:_LINE]
    attempt.warnings = [str(text)[:_LINE] for text in report.get("warnings", [])[:_WARNINGS]]
    attempt.report = {name: report[name] for name in _KEPT if report.get(name) not in (None, "")}
    attempt.state = state.value
    if state is MoveState.RUNNING:
        if lost_for_s < reconnect_s:
            return Next.ASK_AGAIN
        attempt.state = MoveState.UNKNOWN.value
        attempt.error = f"the source did not answer for {lost_for_s:.0f} s: {attempt.error}"[:_LINE]
        return Next.END
    if state is MoveState.UNKNOWN or attempt.kind in ASKED_AGAIN_KINDS:
        attempt.state = MoveState.UNKNOWN.value
        attempt.unsure += 1
        return Next.ASK_AGAIN if attempt.unsure < UNKNOWN_ASKS else Next.END
    if may_retry and (state is MoveState.FAILED or attempt.kind in RETRIED_KINDS):
        return Next.RETRY
    return Next.END


@dataclass
class MoveResult:
    """What became of a move: the output of its workflow."""

    name: str
    state: str
    attempts: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)
