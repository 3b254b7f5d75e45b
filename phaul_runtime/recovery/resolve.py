"""One host's part of a recovery: look at an end of a migration, and settle it.

Used by `recover` for its own host and by the agent for the other one. Both work on a journal that
nobody else holds, and may be repeated.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from phaul_runtime.criu.session import Criu
from phaul_runtime.cutover.freezer import FACT as HOLD
from phaul_runtime.cutover.freezer import Freezer
from phaul_runtime.cutover.journal import Journal, journal_path, read_records, replay, trusted
from phaul_runtime.cutover.orphans import private_directories
from phaul_runtime.cutover.states import Role, Settled, Standing, State, Verdict
from phaul_runtime.destination.copy import may_run
from phaul_runtime.destination.incoming import Incoming
from phaul_runtime.engine.interface import Engines, SourceHalf, load_engine
from phaul_runtime.errors import (
    JournalDamaged,
    MigrationFailed,
    NoSuchMigration,
    OutcomeUnknown,
    PhaulError,
)
from phaul_runtime.files.tree_sender import STAGED
from phaul_runtime.hooks.lifecycle import ON_FAILURE, ON_ROLLBACK, Failure, Hooks, announce, move_of
from phaul_runtime.library import throttle
from phaul_runtime.memory.image_dirs import remove_tree

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settler:
    """Looks at and settles the ends of migrations of this host.

    Args:
        state_dir: of the journals.
        workdir: private directory of images and sockets.
        criu: a session factory.
        hooks: of this host.
        engines: find one by its name.
    """

    state_dir: Path
    workdir: Path
    criu: Criu
    hooks: Hooks = field(default_factory=Hooks)
    engines: Engines = load_engine

    def look(self, migration_id: str, role: Role, *, wait_s: float = 1.0) -> Standing | None:
        """How an end stands, once nobody works on it any more; None if there is none here.

        Raises:
            StillUnderWay: somebody still does after `wait_s` seconds.
            JournalDamaged: what its journal says cannot be relied on.
        """
        try:
            journal = Journal.open(self.state_dir, migration_id, role, wait_s=wait_s)
        except NoSuchMigration:
            return None
        with journal:
            return self.standing(journal)

    def standing(self, journal: Journal) -> Standing | None:
        """The same for a journal that the caller holds."""
        with trusted(journal.path):
            return self._standing(journal)

    def _standing(self, journal: Journal) -> Standing | None:
        if journal.state is None:
            return None
        if journal.role is Role.DESTINATION:
            return Standing(journal.state)
        source = self.source(journal)
        hold = Freezer.recall(journal.facts.get(HOLD))
        if hold is not None and hold.lives() and hold.frozen():
            # A tree that runs is not frozen now: the destination may have been told nothing.
            hold.cut_loose()
            return Standing(journal.state, held=True)
        alive = not source.gone()
        if journal.state is State.COMMITTING and not alive:
            # CRIU may not have lived to kill all of it; nothing of it may be left.
            source.end_rest()
        return Standing(journal.state, alive)

    def settle(
        self,
        migration_id: str,
        role: Role,
        verdict: Verdict,
        take_up: Callable[[Incoming], object] | None = None,
    ) -> Settled:
        """Bring an end to done (`RUN`) or aborted (`DISCARD`).

        Args:
            migration_id: of the migration.
            role: which end.
            verdict: on the destination's copy.
            take_up: told of a destination that runs and misses pages of a post-copy move: it is the
                callee's from then on, its journal with it. Without, it cannot be settled so.

        Raises:
            OutcomeUnknown: it could not be done; it may be tried again.
            JournalDamaged: what its journal says cannot be relied on.
            PhaulError: the state table does not allow it.
        """
        try:
            journal = Journal.open(self.state_dir, migration_id, role)
        except NoSuchMigration:
            self._tidy(migration_id)
            return Settled()
        if (
            role is Role.DESTINATION
            and verdict is Verdict.RUN
            and journal.facts.get("post_copy")
            and journal.state not in (State.DONE, State.ABORTED)
        ):
            return self._run_on(journal, take_up)
        with journal:
            return self.settle_journal(journal, verdict)

    def _run_on(self, journal: Journal, take_up: Callable[[Incoming], object] | None) -> Settled:
        """Let the copy run that a post-copy move has made, and have its pages taken in."""
        try:
            if take_up is None and not may_run(journal):
                raise _elsewhere(journal.id)
            incoming = Incoming.revive(journal, self.criu, self.hooks, self.engines)
        except BaseException:
            journal.close()
            raise
        if take_up is not None:
            # Already now: a restore may need pages that are still at the source.
            take_up(incoming)
        try:
            reply = incoming.commit()
        except PhaulError as error:
            incoming.abort(client_lost=True)
            raise _not_rebuilt(error) from error
        if take_up is None:
            if incoming.still_misses:
                incoming.abort(client_lost=True)
                raise _elsewhere(journal.id)
            incoming.wait_settled()
        self._tidy(journal.id)
        return Settled(pid=reply.pid, missing=incoming.copy.missing)

    def settle_journal(self, journal: Journal, verdict: Verdict) -> Settled:
        """The same for a journal that the caller holds."""
        if verdict is Verdict.UNKNOWN:
            raise OutcomeUnknown(f"migration {journal.id} cannot be settled yet")
        with trusted(journal.path):
            if journal.state is None:
                settled = Settled()  # its host crashed before anything was done
            elif journal.role is Role.SOURCE:
                settled = self._settle_source(journal, verdict)
            else:
                settled = self._settle_destination(journal, verdict)
        self._tidy(journal.id)
        return settled

    def source(self, journal: Journal) -> SourceHalf:
        """The engine's half for the target that a journal of the source tells of."""
        facts = journal.facts
        engine = self.engines(facts["engine"])
        options = engine.options_model.model_validate(facts["options"])
        source = engine.source(facts["target"], options, criu_log_level=4)
        source.recall(facts["identity"])
        return source

    def _settle_source(self, journal: Journal, verdict: Verdict) -> Settled:
        source = self.source(journal)
        if journal.state in (State.DONE, State.ABORTED):
            return Settled()
        unthrottled = [text] if (text := throttle.undo(journal.facts.get(throttle.FACT))) else []
        hold = Freezer.recall(journal.facts.get(HOLD))
        if verdict is Verdict.RUN:
            if hold is not None and hold.lives():
                raise OutcomeUnknown(
                    f"the pages of migration {journal.id} are still here",
                    hint=f"phaul-runtime recover {journal.id} on this host",
                )
            given_up = journal.state in (State.COMMITTING, State.POST_COPY)
            if not given_up or not source.gone():
                raise MigrationFailed(f"the source of {journal.id} was not given up")
            warnings = unthrottled + announce(self.hooks, journal)
            warnings += source.finish()
            journal.enter(State.DONE)
            return Settled(warnings=tuple(warnings))
        if journal.state is State.POST_COPY:
            raise MigrationFailed(f"the destination of {journal.id} was told to run")
        if hold is not None:
            hold.release()
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
        if verdict is Verdict.DISCARD:
            return self._discard(journal)
        incoming = Incoming.revive(journal, self.criu, self.hooks, self.engines)
        try:
            reply = incoming.commit()
        except PhaulError as error:
            incoming.abort(client_lost=True)
            raise _not_rebuilt(error) from error
        incoming.wait_settled()
        return Settled(pid=reply.pid)

    def _discard(self, journal: Journal) -> Settled:
        """The copy never runs from here on; what cannot be put away now is a warning.

        The source may be waiting for this, its copy frozen: it must not wait for a docker that does
        not answer. The journal stands at aborting then, and a recovery goes on.
        """
        if journal.state in (State.COMMITTING, State.POST_COPY):
            raise MigrationFailed(f"the destination of {journal.id} was told to run")
        if journal.state is not State.ABORTING:
            journal.enter(State.ABORTING)
        try:
            Incoming.revive(journal, self.criu, self.hooks, self.engines).abort()
        except PhaulError as error:
            text = f"what was prepared is not put away yet: {error.message}"
            return Settled(warnings=(f"{text}; phaul-runtime recover {journal.id} goes on",))
        return Settled()

    def _tidy(self, migration_id: str) -> None:
        """Remove what an earlier process of this migration left in the working directory."""
        for path in private_directories(self.workdir):
            if path.name.endswith(migration_id) and not self._needed(path, migration_id):
                remove_tree(path)

    def _needed(self, path: Path, migration_id: str) -> bool:
        """Images of a copy that may still have to be rebuilt, or page maps of one that is held.

        Where a journal is damaged, all that it may be about.
        """
        ends = {}
        try:
            for role in Role:
                with trusted(journal_path(self.state_dir, migration_id, role)):
                    ends[role] = self._needs(migration_id, role)
        except JournalDamaged:
            return True
        if held := ends[Role.SOURCE]:
            return path in held.parents
        return path == ends[Role.DESTINATION]

    def _needs(self, migration_id: str, role: Role) -> Path | None:
        """What an end that is not settled needs: the final images, or its directory."""
        state, facts = replay(read_records(self.state_dir, migration_id, role))
        if state is None or state.settled:
            return None
        if role is Role.SOURCE:
            return Path(facts["final_dir"]) if HOLD in facts else None
        return Path(facts["workdir"]) / migration_id


def _elsewhere(migration_id: str) -> OutcomeUnknown:
    return OutcomeUnknown(
        f"pages of migration {migration_id} are still at its source",
        hint=f"phaul-runtime recover {migration_id} on the source's host",
    )


def _not_rebuilt(error: PhaulError) -> OutcomeUnknown:
    return OutcomeUnknown(
        f"the copy could not be rebuilt: {error.message}",
        log=error.log,
        hint="its images are kept; mend the cause and run recover again",
    )
