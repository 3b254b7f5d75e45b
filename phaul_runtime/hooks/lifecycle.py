"""Lifecycle hooks: an operator's programs, run at steps of a move, each host its own.

======================  ===========  ============================================================
event                   host         when, and what a failure does
======================  ===========  ============================================================
``pre_check``           both         before the checks: it is a check that refuses
``pre_freeze``          source       everything is ready, the target runs: the move is called off
``frozen``              both         the target stands still: the move is called off
``post_restore``        destination  rebuilt and held, nothing runs yet: the move is called off
``committed``           both         the destination's copy runs: a warning
``on_rollback``         both         the source's copy runs on: a warning
``on_failure``          both         last of all, however the move failed: a warning
======================  ===========  ============================================================

At each event the commands of the configuration run, in their order, then what lies in
`<directory>/<event>.d`, by name (`hookdir`), with TARGET EVENT ROLE as arguments. At the events
that may refuse (`VETOING`) the first failure ends it; at the others each runs, whatever became of
those before it.

They may be run more than once for a move (a recovery repeats the step that a crash cut short), so
they have to be idempotent. The environment tells what it is about: PHAUL_EVENT, PHAUL_ROLE (source
or destination), PHAUL_ID, PHAUL_ENGINE, PHAUL_TARGET, PHAUL_PEER (the other host), PHAUL_PID where
the root's pid on this host is known, and at on_failure PHAUL_RESULT and PHAUL_ERROR. stdin has the
same as one JSON object.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from phaul_runtime.cutover.journal import Journal
from phaul_runtime.cutover.states import Role
from phaul_runtime.errors import MigrationFailed, PhaulError
from phaul_runtime.hooks.directory import Effect, HookDirectory, Program, configured
from phaul_runtime.printable import one_line
from phaul_runtime.system import proc

PRE_CHECK = "pre_check"
PRE_FREEZE = "pre_freeze"
FROZEN = "frozen"
POST_RESTORE = "post_restore"
COMMITTED = "committed"
ON_ROLLBACK = "on_rollback"
ON_FAILURE = "on_failure"
VETOING = (PRE_CHECK, PRE_FREEZE, FROZEN, POST_RESTORE)
# In a journal: the programs of `committed` were run.
ANNOUNCED = "announced"
EVENTS = (*VETOING, COMMITTED, ON_ROLLBACK, ON_FAILURE)

log = logging.getLogger(__name__)

# Of the JSON on a program's stdin; a key may be added without a new one.
_SCHEMA = 1


@dataclass(frozen=True)
class Failure:
    """What on_failure is told beside the move: the report's result, and why, in one line."""

    result: str
    error: str


def of_destination(client_lost: bool, keep: bool) -> Failure:
    """What on_failure's hooks of the destination are told: the reason is the source's to know."""
    reason = "its client is lost" if client_lost else "the source called it off"
    return Failure("unknown", f"{reason}; images are kept") if keep else Failure("failed", reason)


@dataclass(frozen=True)
class Hooks:
    """The programs of this host, by event.

    Args:
        commands: event to the commands, each a list of arguments.
        timeout_s: longest time for one of them, seconds.
        directory: where an operator's executables lie; None for nowhere.
        timeouts: longest times for events that have their own, seconds.
        observe: told of each event in this process, before its programs run.
    """

    commands: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)
    timeout_s: float = 30.0
    directory: HookDirectory | None = None
    timeouts: Mapping[str, float] = field(default_factory=dict)
    observe: Callable[[str, Move, Failure | None], None] = lambda *_: None

    def programs(self, event: str) -> list[Program]:
        """Those of `event` in the order in which they run, and what is wrong with any."""
        programs = [configured(command) for command in self.commands.get(event, ())]
        return programs + (self.directory.programs(event) if self.directory else [])

    def run(self, event: str, move: Move, pid: int = 0) -> None:
        """Run those of `event`, in their order.

        Raises:
            MigrationFailed: one failed; those after it were not run. Or one cannot or must not be
                run: then none was.
        """
        self._show(event, move, None)
        programs = self.programs(event)
        for program in programs:
            _guard(program, event)
        for program in programs:
            self._run(program, move.facts(event, pid))

    def try_to(
        self, event: str, move: Move, pid: int = 0, failure: Failure | None = None
    ) -> list[str]:
        """Run each where a failure can change nothing any more; returns warnings."""
        self._show(event, move, failure)
        facts = move.facts(event, pid)
        if failure is not None:
            facts.update(result=failure.result, error=failure.error)
        warnings = []
        for program in self.programs(event):
            try:
                _guard(program, event)
                self._run(program, facts)
            except MigrationFailed as error:
                warnings.append("; ".join((error.message, *error.log)))
        return warnings

    def _show(self, event: str, move: Move, failure: Failure | None) -> None:
        try:
            self.observe(event, move, failure)
        except Exception:
            log.exception("what observes %s failed; the move goes on", event)

    def _run(self, program: Program, facts: Mapping[str, Any]) -> None:
        if program.effect is not Effect.RUNS:
            return
        event = facts["event"]
        told = (one_line(facts["target"]), event, facts["role"]) if program.listed else ()
        log.info("hook %s: running %s", event, program.argv[0])
        try:
            done = proc.run(
                [*program.argv, *told],
                timeout_s=self.timeouts.get(event, self.timeout_s),
                env=proc.environment(_environment(facts)),
                input=json.dumps(facts) + "\n",
            )
        except PhaulError as error:
            hint = "does its first line name its interpreter?" if program.listed else error.hint
            raise MigrationFailed(
                f"hook {event}: {error.message}", hint=error.hint and hint, log=error.log
            ) from error
        if done.returncode != 0:
            raise MigrationFailed(
                f"hook {event}: {program.argv[0]} {_ended(done.returncode)}",
                log=proc.last_lines(done.stderr.strip() or done.stdout),
            )


def _guard(program: Program, event: str) -> None:
    """Raise what keeps a program from being run."""
    if program.effect is Effect.FAILS:
        raise MigrationFailed(f"hook {event}: {program.wrong}", hint=program.hint)


def _environment(facts: Mapping[str, Any]) -> dict[str, str]:
    """The same facts as variables; a null is an empty one. stdin has them exactly."""
    return {
        f"PHAUL_{name.upper()}": "" if value is None else one_line(str(value))
        for name, value in facts.items()
        if name != "schema"
    }


def _ended(code: int) -> str:
    if code >= 0:
        return f"ended with {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


@dataclass(frozen=True)
class Move:
    """What a hook is told about the move."""

    id: str
    role: Role
    engine: str
    target: str
    peer: str

    def facts(self, event: str, pid: int) -> dict[str, Any]:
        """What is told on stdin; JSON values."""
        return {
            "schema": _SCHEMA,
            "event": event,
            "role": self.role.value,
            "id": self.id,
            "engine": self.engine,
            "target": self.target,
            "peer": self.peer,
            "pid": pid or None,
        }


def announce(hooks: Hooks, journal: Journal, pid: int = 0) -> list[str]:
    """Run those of `committed`, unless the journal says that they were run; returns warnings.

    To be called before the journal says done: a recovery then does it, if nobody lived to.
    """
    if journal.facts.get(ANNOUNCED):
        return []
    warnings = hooks.try_to(COMMITTED, move_of(journal), pid)
    with contextlib.suppress(MigrationFailed):  # they are run once more then
        journal.note(**{ANNOUNCED: True})
    return warnings


def move_of(journal: Journal) -> Move:
    """What hooks are told of the migration of a journal."""
    facts = journal.facts
    peer = facts.get("peer") or facts.get("to") or ""
    return Move(journal.id, journal.role, facts["engine"], facts["target"], peer)
