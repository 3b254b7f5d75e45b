"""One host's part of a recovery: look at an end of a migration, and settle it.

Used by `recover` for its own host and by the agent for the other one. Both work on a journal that
nobody else holds, and may be repeated.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from phaul_runtime import throttle
from phaul_runtime.criu import Criu
from phaul_runtime.engine import SourceHalf, load_engine
from phaul_runtime.errors import MigrationFailed, NoSuchMigration, OutcomeUnknown, PhaulError
from phaul_runtime.images import remove_tree
from phaul_runtime.incoming import Incoming
from phaul_runtime.journal import Journal, read_records, replay
from phaul_runtime.leftovers import private_directories
from phaul_runtime.lifecycle import COMMITTED, ON_FAILURE, ON_ROLLBACK, Failure, Hooks, move_of
from phaul_runtime.states import Role, Settled, Standing, State, Verdict
from phaul_runtime.trees import STAGED

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settler:
    """Looks at and settles the ends of migrations of this host.

    Args:
        state_dir: of the journals.
        workdir: private directory of images and sockets.
        criu: a session factory.
        hooks: of this host.
    """

    state_dir: Path
    workdir: Path
    criu: Criu
    hooks: Hooks = field(default_factory=Hooks)

    def look(self, migration_id: str, role: Role, *, wait_s: float = 1.0) -> Standing | None:
        """How an end stands, once nobody works on it any more; None if there is none here.

        Raises:
            StillUnderWay: somebody still does after `wait_s` seconds.
        """
        try:
            journal = Journal.open(self.state_dir, migration_id, role, wait_s=wait_s)
        except NoSuchMigration:
            return None
        with journal:
            return self.standing(journal)

    def standing(self, journal: Journal) -> Standing | None:
        """The same for a journal that the caller holds."""
        if journal.state is None:
            return None
        if journal.role is Role.DESTINATION:
            return Standing(journal.state)
        source = self._source(journal)
        alive = not source.gone()
        if journal.state is State.COMMITTING and not alive:
            # CRIU may not have lived to kill all of it; nothing of it may be left.
            source.end_rest()
        return Standing(journal.state, alive)

    def settle(self, migration_id: str, role: Role, verdict: Verdict) -> Settled:
        """Bring an end to done (`RUN`) or aborted (`DISCARD`).

        Raises:
            OutcomeUnknown: it could not be done; it may be tried again.
            PhaulError: the state table does not allow it.
        """
        try:
            journal = Journal.open(self.state_dir, migration_id, role)
        except NoSuchMigration:
            self._tidy(migration_id)
            return Settled()
        with journal:
            return self.settle_journal(journal, verdict)

    def settle_journal(self, journal: Journal, verdict: Verdict) -> Settled:
        """The same for a journal that the caller holds."""
        if verdict is Verdict.UNKNOWN:
            raise OutcomeUnknown(f"migration {journal.id} cannot be settled yet")
        if journal.state is None:
            settled = Settled()  # its host crashed before anything was done
        elif journal.role is Role.SOURCE:
            settled = self._settle_source(journal, verdict)
        else:
            settled = self._settle_destination(journal, verdict)
        self._tidy(journal.id)
        return settled

    def _source(self, journal: Journal) -> SourceHalf:
        facts = journal.facts
        engine = load_engine(facts["engine"])
        options = engine.options_model.model_validate(facts["options"])
        source = engine.source(facts["target"], options, criu_log_level=4)
        source.recall(facts["identity"])
        return source

    def _settle_source(self, journal: Journal, verdict: Verdict) -> Settled:
        source = self._source(journal)
        if journal.state in (State.DONE, State.ABORTED):
            return Settled()
        unthrottled = [text] if (text := throttle.undo(journal.facts.get(throttle.FACT))) else []
        if verdict is Verdict.RUN:
            if journal.state is not State.COMMITTING or not source.gone():
                raise MigrationFailed(f"the source of {journal.id} was not given up")
            warnings = unthrottled + self.hooks.try_to(COMMITTED, move_of(journal))
            warnings += source.finish()
            journal.enter(State.DONE)
            return Settled(warnings=tuple(warnings))
        if journal.state is State.COMMITTING and source.gone():
            raise MigrationFailed(f"the source's copy of {journal.id} is dead")
        if journal.state is not State.ABORTING:
            journal.enter(State.ABORTING)
        warnings = unthrottled
        for name in journal.facts.get(STAGED, []):
            try:
                source.unstage(name)
            except PhaulError as error:
                warnings.append(f"tree {name} is left on this host: {error.message}")
        source.rollback()
        move = move_of(journal)
        warnings += self.hooks.try_to(ON_ROLLBACK, move)
        failure = Failure("failed", "it was undone by a recovery")
        warnings += self.hooks.try_to(ON_FAILURE, move, failure=failure)
        journal.enter(State.ABORTED)
        return Settled(warnings=tuple(warnings))

    def _settle_destination(self, journal: Journal, verdict: Verdict) -> Settled:
        if journal.state in (State.DONE, State.ABORTED):
            return Settled(pid=int(journal.facts.get("pid", 0)))
        incoming = Incoming.revive(journal, self.criu, self.hooks)
        if verdict is Verdict.DISCARD:
            if journal.state is State.COMMITTING:
                raise MigrationFailed(f"the destination of {journal.id} was told to run")
            incoming.abort()
            return Settled()
        try:
            reply = incoming.commit()
        except PhaulError as error:
            incoming.abort(client_lost=True)
            raise OutcomeUnknown(
                f"the copy could not be rebuilt: {error.message}",
                log=error.log,
                hint="its images are kept; mend the cause and run recover again",
            ) from error
        incoming.wait_settled()
        return Settled(pid=reply.pid)

    def _tidy(self, migration_id: str) -> None:
        """Remove what an earlier process of this migration left in the working directory."""
        for path in private_directories(self.workdir):
            if path.name.endswith(migration_id) and not self._needed(path, migration_id):
                remove_tree(path)

    def _needed(self, path: Path, migration_id: str) -> bool:
        """Images of a copy that may still have to be rebuilt."""
        records = read_records(self.state_dir, migration_id, Role.DESTINATION)
        state, facts = replay(records)
        if state is None or state.settled:
            return False
        return path == Path(facts["workdir"]) / migration_id
