"""The report of a migration: what happened, in numbers, with a versioned schema."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from phaul_runtime.errors import ExitCode, PhaulError

SCHEMA = "phaul-runtime/report/1"


@dataclass
class Iteration:
    """One pre-copy round.

    `frozen_ms` is how long the tree stood still for it; `expected_freeze_ms` what the policy then
    expected of a freeze, see `policy.estimate_freeze_ms`.
    """

    pages_written: int
    pages_skipped: int
    bytes: int
    duration_ms: float
    frozen_ms: float = 0.0
    expected_freeze_ms: float | None = None


@dataclass
class MigrationReport:
    """What `PhaulClient.migrate` returns and the CLI prints.

    Attributes:
        result: moved, failed, refused, cancelled, unknown, or checked (a dry run).
        downtime_ms: from the freeze to the moment when the destination's copy ran.
        total_ms: from the start of the command to its end; for library use, of `migrate`.
        bytes_transferred: memory, images and files.
        link_bytes: what memory and trees of it were on the link; None without compression, limit or
            proxy buffer, when nobody counts it.
        restored_pid: the root's pid at the destination.
        expected_freeze_ms: the source's part of the downtime (`dump_ms` in `freeze`) as it was
            expected after the last round, to be held against what it became; None if there was
            nothing to tell it by.
        throttled_to: CPUs left to the target when pre-copy ended; None if it was not slowed.
        converged: pre-copy ended within the budget.
        pre_copy: why it ended, or why there was none.
        freeze: the steps of the downtime, name to milliseconds: dump, files, prepare, kill and
            commit follow each other; images and restore are the destination's parts of prepare, and
            hooks, if there are any for `frozen`, a part of dump and files.
        restore: lazy, or `full:` and why.
        lazy_complete_ms: from the moment when the copy ran to its last page, after a lazy restore.
        lazy: `pages` that came after that moment, `faults` that waited for one, and the longest
            of those waits, `worst_fault_ms`. What became of those pages: `filled`, `present`
            already, `dropped` by their process, `ended` with it, `unshared` with a forked child,
            or `lost`, which a warning explains.
        mode: pre-copy, post-copy or hybrid.
        post_copy: of a post-copy or hybrid move whose last page came: `pages` that came once the
            copy ran, `faults` that waited for one, the longest of those waits, `worst_fault_ms`,
            and the `seconds` until the last was there.
        error_kind: the class in errors.py that `error` is of, as `DestinationUnreachable`.
    """

    result: str
    id: str = ""
    engine: str = ""
    target: str = ""
    source: str = ""
    destination: str = ""
    downtime_ms: float | None = None
    expected_freeze_ms: float | None = None
    throttled_to: float | None = None
    total_ms: float = 0.0
    bytes_transferred: int = 0
    link_bytes: int | None = None
    restored_pid: int | None = None
    iterations: list[Iteration] = field(default_factory=list)
    converged: bool = True
    pre_copy: str = ""
    final_pages_written: int = 0
    final_pages_skipped: int = 0
    files_copied: int = 0
    freeze: dict[str, float] = field(default_factory=dict)
    restore: str = ""
    lazy_complete_ms: float | None = None
    lazy: dict[str, float] = field(default_factory=dict)
    mode: str = "pre-copy"
    post_copy: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    error: str = ""
    error_kind: str = ""
    exit_code: int = 0
    logs: str = ""

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `schema` comes first, milliseconds have three decimals."""
        return {"schema": SCHEMA, **_rounded(asdict(self))}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> MigrationReport:
        """A report from what `to_json` made; keys of other versions are left out."""
        known = {field.name for field in fields(cls)}
        report = cls(**{name: value for name, value in told.items() if name in known})
        names = {field.name for field in fields(Iteration)}
        report.iterations = [
            Iteration(**{name: value for name, value in each.items() if name in names})
            for each in told.get("iterations", [])
        ]
        return report


def result_of(error: Exception) -> str:
    """A failure as a report's `result`."""
    code = error.exit_code if isinstance(error, PhaulError) else ExitCode.INTERNAL
    return {3: "refused", 4: "failed", 5: "unknown", 6: "cancelled"}.get(code, "error")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return value
