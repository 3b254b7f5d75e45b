"""A migration whose id is the caller's: done once, however often it is asked for.

A caller that lost the command (a broken connection, a crash of its own) asks again with the same
id. It then gets the outcome that the source's journal has, settled first if need be; only an id
under which nothing was begun is moved. While another process works on the id, it is waited for.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phaul_runtime.cutover.journal import (
    checked_id,
    is_locked,
    journal_path,
    read_records,
    read_report,
    replay,
    trusted,
)
from phaul_runtime.cutover.orphans import private_directories
from phaul_runtime.cutover.states import Role, State
from phaul_runtime.errors import (
    ExitCode,
    JournalDamaged,
    MigrationFailed,
    OutcomeUnknown,
    StillUnderWay,
    UsageError,
)
from phaul_runtime.events import Listener, OutcomeRecorded, Recovering, nobody
from phaul_runtime.library.client import PRE_COPY
from phaul_runtime.memory.image_dirs import remove_tree
from phaul_runtime.recovery.recover import Recovered, Recovery
from phaul_runtime.report import MigrationReport

if TYPE_CHECKING:
    from phaul_runtime.config.model import Config
    from phaul_runtime.source.migration import Migration
    from phaul_runtime.system.cancel import Cancellation

_POLL_S = 0.2
_SETTLED_RESULTS = {State.DONE: ("moved",), State.ABORTED: ("failed", "refused", "cancelled")}


@contextmanager
def claimed(
    state_dir: Path,
    migration_id: str,
    *,
    wait_s: float,
    cancellation: Cancellation | None = None,
) -> Iterator[None]:
    """Be the only process that asks for `migration_id`; another one is waited for.

    The claim ends with the block or with the process.

    Raises:
        StillUnderWay: another process had it for all of `wait_s` seconds.
        MigrationFailed: the state directory cannot be written to.
        UsageError: it is no id.
        Cancelled: on request, while waiting.
    """
    directory = state_dir / checked_id(migration_id)
    deadline = time.monotonic() + wait_s
    while (fd := _try_claim(directory)) is None:
        if cancellation is not None:
            cancellation.check()
        if time.monotonic() > deadline:
            raise StillUnderWay(
                f"another command still works on {migration_id} after {wait_s:g} s",
                hint="ask again later, with the same id",
            )
        time.sleep(_POLL_S)
    try:
        yield
    finally:
        # One under which nothing was begun leaves nothing.
        with contextlib.suppress(OSError):
            directory.rmdir()
        os.close(fd)


def _try_claim(directory: Path) -> int | None:
    """A descriptor that holds the claim; None while somebody else does."""
    try:
        directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Its last owner may be removing it: then `exist_ok` would fail.
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None  # removed by its last owner just now
    except OSError as error:
        raise MigrationFailed(f"cannot write to {directory.parent}: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if directory.stat().st_ino == os.fstat(fd).st_ino:
            return fd
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.ENOENT):
            os.close(fd)
            raise
    os.close(fd)
    return None


def settled_before(
    config: Config,
    migration_id: str,
    asked: Mapping[str, Any],
    listener: Listener = nobody,
    recover: Callable[[str], Recovered] | None = None,
) -> MigrationReport | None:
    """The outcome of an earlier command with this id; None if nothing was begun under it.

    To be called within `claimed`. One that was begun and whose command died is settled by the code
    of `recover` first.

    Args:
        config: as loaded.
        migration_id: claimed.
        asked: engine, target and to, as they are asked for now.
        listener: told of a recovery and of the outcome.
        recover: settles it; `Recovery` by default.

    Raises:
        UsageError: the id belongs to the migration of something else.
        OutcomeUnknown: it cannot be settled now.
        JournalDamaged: its outcome is not known.
        StillUnderWay: a command without a claim works on it.
    """
    state_dir = Path(config.state_dir)
    state, facts = replay(read_records(state_dir, migration_id, Role.SOURCE))
    path = journal_path(state_dir, migration_id, Role.SOURCE)
    if state is None:
        if path.exists() and is_locked(path):
            raise StillUnderWay(f"migration {migration_id} is still under way at its source")
        _guard_empty(state_dir, migration_id)
        # A command that died before its first step; what it made would stand in the way.
        path.unlink(missing_ok=True)
        for left in private_directories(Path(config.workdir)):
            if left.name.endswith(migration_id):
                remove_tree(left)
        return None
    for name, value in asked.items():
        if facts.get(name) != value:
            raise UsageError(
                f"{migration_id} is the migration of {facts.get('engine')} {facts.get('target')} "
                f"to {facts.get('to')}: its {name} is not {value}",
                hint="another migration needs another id",
            )
    if state.settled:
        report = _recorded(config, migration_id, state, facts)
    else:
        listener(Recovering(f"an earlier command left {migration_id} at {state.value}"))
        recovered = (recover or Recovery(config, listener=listener).recover)(migration_id)
        state, facts = replay(read_records(state_dir, migration_id, Role.SOURCE))
        if state is None or not state.settled:
            raise OutcomeUnknown(f"migration {migration_id} was not settled")
        report = _recorded(config, migration_id, state, facts)
        report.restored_pid = report.restored_pid or recovered.pid or None
        report.warnings += [f"settled by a recovery: {recovered.reason}", *recovered.warnings]
    listener(OutcomeRecorded(migration_id, report.result))
    return report


def _guard_empty(state_dir: Path, migration_id: str) -> None:
    """A journal that says nothing is no reason to move again what has moved."""
    kept = read_report(state_dir, migration_id)
    if kept is not None and kept.get("result") in ("moved", "unknown"):
        path = journal_path(state_dir, migration_id, Role.SOURCE)
        raise JournalDamaged(
            f"{path} is empty or gone, yet the report beside it says {kept['result']}",
            hint=f"phaul-runtime show {migration_id} has the report",
        )


def _recorded(
    config: Config, migration_id: str, state: State, facts: Mapping[str, Any]
) -> MigrationReport:
    kept = read_report(Path(config.state_dir), migration_id)
    # One of an unknown outcome was written before a recovery found out.
    if kept is not None and kept.get("result") in _SETTLED_RESULTS[state]:
        with contextlib.suppress(TypeError, AttributeError):  # not as it was written
            return MigrationReport.from_json(kept)
    with trusted(journal_path(Path(config.state_dir), migration_id, Role.SOURCE)):
        return _from_facts(migration_id, state, facts)


def _from_facts(migration_id: str, state: State, facts: Mapping[str, Any]) -> MigrationReport:
    moved = state is State.DONE
    report = MigrationReport("moved" if moved else "failed", mode=str(facts.get("mode", PRE_COPY)))
    report.id = migration_id
    report.engine, report.target = facts.get("engine", ""), facts.get("target", "")
    report.source, report.destination = os.uname().nodename, facts.get("to", "")
    if moved:
        report.restored_pid = int(facts["pid"]) if facts.get("pid") else None
        report.downtime_ms = facts.get("downtime_ms")
    else:
        report.error = "the command ended early; the source's copy is the one"
        report.exit_code = int(ExitCode.FAILED)
        report.error_kind = MigrationFailed.__name__
    return report


def migrate_once(migration: Migration) -> MigrationReport:
    """Run `migration` unless something was begun under its id; then report how that ended.

    Another command with the same id is waited for, up to `timeouts.same_id_s`.

    Returns:
        the report; `exit_code` is not 0 if the earlier command failed.

    Raises:
        PhaulError: as `claimed`, `settled_before` and `Migration.run`.
    """
    config = migration.config
    asked = {
        "engine": config.engine,
        "target": migration.target,
        "to": config.transport.to,
    }
    with claimed(
        Path(config.state_dir),
        migration.id,
        wait_s=config.timeouts.same_id_s,
        cancellation=migration.cancellation,
    ):
        before = settled_before(
            config, migration.id, asked, migration.listener, recover=migration.recovery().recover
        )
        if before is not None:
            return before
        # Directories of an earlier command's channel may still be there, on either host. Names
        # that end with the id are put away with it.
        migration.channel = f"{secrets.token_hex(4)}{migration.id}"
        return migration.run()
