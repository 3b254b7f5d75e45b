"""Lifecycle hooks: an operator's programs, run at steps of a move, each host its own.

======================  ===========  ============================================================
event                   host         when, and what a failure does
======================  ===========  ============================================================
``pre_freeze``          source       everything is ready, the target runs: the move is called off
``post_restore``        destination  rebuilt and held, nothing runs yet: the move is called off
``committed``           both         the destination's copy runs: a warning
``on_rollback``         both         the source's copy runs on: a warning
======================  ===========  ============================================================

They may be run more than once for a move (a recovery repeats the step that a crash cut short), so
they have to be idempotent. The environment tells what it is about: PHAUL_EVENT, PHAUL_ROLE (source
or destination), PHAUL_ID, PHAUL_ENGINE, PHAUL_TARGET, PHAUL_PEER (the other host), and PHAUL_PID
where the root's pid on this host is known.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from phaul_runtime import proc
from phaul_runtime.errors import MigrationFailed, PhaulError
from phaul_runtime.journal import Journal
from phaul_runtime.states import Role

PRE_FREEZE = "pre_freeze"
POST_RESTORE = "post_restore"
COMMITTED = "committed"
ON_ROLLBACK = "on_rollback"
EVENTS = (PRE_FREEZE, POST_RESTORE, COMMITTED, ON_ROLLBACK)


@dataclass(frozen=True)
class Hooks:
    """The programs of this host, by event.

    Args:
        commands: event to the commands, each a list of arguments.
        timeout_s: longest time for one of them, seconds.
    """

    commands: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)
    timeout_s: float = 30.0

    def run(self, event: str, move: Move, pid: int = 0) -> None:
        """Run those of `event`, in their order.

        Raises:
            MigrationFailed: one failed; those after it were not run.
        """
        for command in self.commands.get(event, ()):
            try:
                done = proc.run(command, timeout_s=self.timeout_s, env=move.environment(event, pid))
            except PhaulError as error:
                raise MigrationFailed(f"hook {event}: {error.message}", hint=error.hint) from error
            if done.returncode != 0:
                said = (done.stderr.strip() or done.stdout.strip()).splitlines()
                raise MigrationFailed(
                    f"hook {event}: {command[0]} ended with {done.returncode}", log=said[-4:]
                )

    def try_to(self, event: str, move: Move, pid: int = 0) -> list[str]:
        """The same where a failure can change nothing any more; returns warnings."""
        try:
            self.run(event, move, pid)
        except MigrationFailed as error:
            return ["; ".join((error.message, *error.log))]
        return []


@dataclass(frozen=True)
class Move:
    """What a hook is told about the move."""

    id: str
    role: Role
    engine: str
    target: str
    peer: str

    def environment(self, event: str, pid: int) -> dict[str, str]:
        """The environment of a hook's program."""
        return {
            **os.environ,
            "PHAUL_EVENT": event,
            "PHAUL_ROLE": self.role.value,
            "PHAUL_ID": self.id,
            "PHAUL_ENGINE": self.engine,
            "PHAUL_TARGET": self.target,
            "PHAUL_PEER": self.peer,
            "PHAUL_PID": str(pid or ""),
        }


def move_of(journal: Journal) -> Move:
    """What hooks are told of the migration of a journal."""
    facts = journal.facts
    peer = facts.get("peer") or facts.get("to") or ""
    return Move(journal.id, journal.role, facts["engine"], facts["target"], peer)
