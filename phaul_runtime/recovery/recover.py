"""`phaul-runtime recover`: finish or undo a migration from the journals of both hosts.

May be run on either host, twice, or on both at once: each end is settled under its journal's lock,
and `states.decide` says the same of the same two standings at either end.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phaul_runtime.cutover import orphans
from phaul_runtime.cutover.freezer import FACT as HOLD
from phaul_runtime.cutover.freezer import Freezer
from phaul_runtime.cutover.journal import (
    RUNS,
    Journal,
    journal_path,
    open_ends,
    read_records,
    replay,
    trusted,
    unsettled,
)
from phaul_runtime.cutover.states import Decision, Role, Settled, Standing, State, Verdict, decide
from phaul_runtime.errors import (
    ChannelError,
    DestinationUnreachable,
    JournalDamaged,
    NoSuchMigration,
    OutcomeUnknown,
    PhaulError,
    Refused,
)
from phaul_runtime.events import Listener, guarded, nobody
from phaul_runtime.hooks.lifecycle import announce
from phaul_runtime.postcopy.transfer import Transfer, attend
from phaul_runtime.preflight.wiring import STANDARD, Wiring
from phaul_runtime.recovery.resolve import Settler
from phaul_runtime.rpc.client import RemoteAgent
from phaul_runtime.rpc.connect import reach
from phaul_runtime.system.cancel import Cancellation

if TYPE_CHECKING:
    from phaul_runtime.config.model import Config

# An agent whose client is lost gives up by itself after lost_s; then its journal is free.
_MARGIN_S = 15.0


@dataclass(frozen=True)
class Recovered:
    """What became of a migration.

    Attributes:
        id: its id.
        verdict: `run`: the destination's copy is the one; `discard`: the source's.
        reason: why.
        pid: root of the destination's copy, where it runs.
        warnings: what the user should know.
    """

    id: str
    verdict: Verdict
    reason: str
    pid: int = 0
    warnings: tuple[str, ...] = ()


@dataclass
class Recovery:
    """Recovers migrations that this host took part in.

    Args:
        config: as loaded; `transport.to`, if given, is the other host.
        source_is_dead: the operator says that the source's host will never come back.
        cancellation: honoured while a channel is opened.
        listener: told how far the pages of a post-copy move are.
        wiring: what it is made with.
    """

    config: Config
    source_is_dead: bool = False
    cancellation: Cancellation = field(default_factory=Cancellation)
    listener: Listener = nobody
    wiring: Wiring = STANDARD

    def __post_init__(self) -> None:
        self.listener = guarded(self.listener)
        self._state_dir = Path(self.config.state_dir)
        self._workdir = Path(self.config.workdir)
        criu = self.wiring.criu(self.config.criu.binary, deadline_s=self.config.criu.timeout_s)
        self._here = Settler(
            self._state_dir,
            self._workdir,
            criu,
            self.config.hooks.hooks(),
            engines=self.wiring.engine,
        )

    def _reach(self, url: str) -> AbstractContextManager[RemoteAgent]:
        return reach(self.config, url, self.cancellation, self.wiring.transport)

    def waiting(self) -> list[str]:
        """The ids that are not settled here, each once."""
        return list(dict.fromkeys(found[0] for found in unsettled(self._state_dir)))

    def damaged(self) -> list[tuple[str, JournalDamaged]]:
        """The ids with a journal here that cannot be relied on, and what is wrong with it."""
        return [
            (end.id, end.stands)
            for end in open_ends(self._state_dir)
            if isinstance(end.stands, JournalDamaged)
        ]

    def sweep(self) -> list[Path]:
        """Remove the private directories that belong to nobody; returns them."""
        return orphans.sweep(self._workdir, self._state_dir)

    def recover(self, migration_id: str, held: Journal | None = None) -> Recovered:
        """Settle both ends of a migration; idempotent.

        Args:
            migration_id: as `migrate` and `history` print it.
            held: the source's journal, if the caller has it open; then the other end is put away
                even if the migration was done.

        Raises:
            NoSuchMigration: this host took no part in it.
            StillUnderWay: somebody works on it.
            JournalDamaged: a journal of it cannot be relied on, here or on the other host.
            OutcomeUnknown: it cannot be settled now; the message says what is missing.
        """
        mine = {role: read_records(self._state_dir, migration_id, role) for role in Role}
        if not any(mine.values()):
            raise NoSuchMigration(
                f"no migration {migration_id} in {self._state_dir}",
                hint="phaul-runtime history lists them",
            )
        if mine[Role.SOURCE]:
            return self._from_source(migration_id, held, bool(mine[Role.DESTINATION]))
        return self._from_destination(migration_id)

    # -- from either side ------------------------------------------------------------------

    def _from_source(self, migration_id: str, held: Journal | None, both: bool) -> Recovered:
        journal = held or Journal.open(self._state_dir, migration_id, Role.SOURCE)
        try:
            source = self._here.standing(journal)
            wait_s = _patience(journal.path, journal.facts)
            if both and not (source and source.held):
                there = self._here.look(migration_id, Role.DESTINATION, wait_s=wait_s)
                decision = self._decided(migration_id, source, there)
                settled = self._here.settle(migration_id, Role.DESTINATION, decision.verdict)
                return self._finish(journal, source, decision, settled)
            if journal.state is State.DONE and held is None:
                return Recovered(
                    migration_id, Verdict.RUN, "it was done", int(journal.facts.get("pid", 0))
                )
            return self._with_destination(journal, source, wait_s)
        finally:
            if held is None:
                journal.close()

    def _with_destination(
        self, journal: Journal, source: Standing | None, wait_s: float
    ) -> Recovered:
        url = self.config.transport.to or journal.facts.get("to", "")
        try:
            with self._reach(url) as agent:
                there = agent.look(journal.id, wait_s).get(Role.DESTINATION)
                decision = self._decided(journal.id, source, there)
                if decision.verdict is Verdict.RUN and source and source.held:
                    settled = self._serve(journal, agent)
                elif decision.verdict is Verdict.DISCARD:
                    settled = _discarded(agent, journal.id)
                else:
                    settled = agent.settle(journal.id, Role.DESTINATION, decision.verdict)
                    if settled.missing:
                        settled = _lost(settled)
                return self._finish(journal, source, decision, settled)
        except (DestinationUnreachable, ChannelError) as error:
            if journal.facts.get(RUNS):
                decision = Decision(Verdict.RUN, "the destination has confirmed that its copy runs")
                return self._finish(journal, source, decision, Settled(int(journal.facts["pid"])))
            decision = decide(source, None)
            if decision.verdict is not Verdict.DISCARD:
                how = "frozen" if source and source.held else "dead"
                raise OutcomeUnknown(
                    f"the source's copy is {how} and the destination does not answer: "
                    f"{error.message}",
                    host=error.host,
                    log=error.log,
                    hint=f"phaul-runtime recover {journal.id} once it does; its images are kept",
                ) from error
            warning = (
                f"the destination was not reached ({error.message}); what it may hold of this "
                f"migration stays until phaul-runtime recover {journal.id} puts it away"
            )
            return self._finish(journal, source, decision, Settled(warnings=(warning,)))

    def _serve(self, journal: Journal, agent: RemoteAgent) -> Settled:
        """The copy runs there: bring it the pages that it misses, then end the one here."""
        with trusted(journal.path):
            hold = Freezer.recall(journal.facts[HOLD])
            final_dir = Path(journal.facts["final_dir"])
        half = self._here.source(journal)
        if hold is None:
            raise OutcomeUnknown(f"migration {journal.id} holds nothing")
        attend(agent, journal.id, self.config)
        with Transfer(
            self.config,
            journal,
            hold,
            final_dir,
            listener=self.listener,
            cancellation=self.cancellation,
            transports=self.wiring.transport,
        ) as transfer:
            # Should it have to be rebuilt, that needs pages already.
            transfer.begin(agent)
            settled = agent.settle(journal.id, Role.DESTINATION, Verdict.RUN)
            warnings = list(settled.warnings)
            if journal.state is State.COMMITTING:
                journal.enter(State.POST_COPY, pid=settled.pid)
            warnings += announce(self._here.hooks, journal)
            if settled.missing:
                transfer.run()
            transfer.stop()
            warnings += transfer.conclude(half)
        return Settled(settled.pid, tuple(warnings))

    def _finish(
        self, journal: Journal, source: Standing | None, decision: Decision, settled: Settled
    ) -> Recovered:
        """The destination is settled: now the source."""
        mine = self._here.settle_journal(journal, decision.verdict)
        warnings = (*settled.warnings, *mine.warnings)
        if decision.verdict is Verdict.DISCARD and not (source and source.alive):
            warnings += ("the source's copy is gone too: it ended by itself, or with its host",)
        return Recovered(journal.id, decision.verdict, decision.reason, settled.pid, warnings)

    def _from_destination(self, migration_id: str) -> Recovered:
        _, facts = replay(read_records(self._state_dir, migration_id, Role.DESTINATION))
        path = journal_path(self._state_dir, migration_id, Role.DESTINATION)
        wait_s = _patience(path, facts)
        there = self._here.look(migration_id, Role.DESTINATION, wait_s=wait_s)
        decision = decide(None, there)
        warnings: tuple[str, ...] = ()
        if there is not None and there.state is State.PREPARED:
            decision, warnings = self._ask_source(migration_id, there, facts)
        settled = self._here.settle(migration_id, Role.DESTINATION, decision.verdict)
        return Recovered(migration_id, decision.verdict, decision.reason, settled.pid, warnings)

    def _ask_source(
        self, migration_id: str, there: Standing, facts: dict[str, object]
    ) -> tuple[Decision, tuple[str, ...]]:
        if self.source_is_dead and facts.get("post_copy"):
            return Decision(Verdict.DISCARD, "its memory is lost with the source"), ()
        if self.source_is_dead:
            return Decision(Verdict.RUN, "the operator says that the source is dead"), ()
        if not self.config.transport.to:
            peer = facts.get("peer") or "SOURCE"
            raise OutcomeUnknown(
                "only the source's host knows whether its copy was killed",
                hint=f"run recover there, or here with --to ssh://root@{peer}; if that host will "
                "never come back: --source-is-dead",
            )
        with self._reach(self.config.transport.to) as agent:
            source = agent.look(migration_id, 1.0).get(Role.SOURCE)
            if source is None:
                raise Refused(f"{agent.name} knows of no migration {migration_id} of its own")
            decision = self._decided(migration_id, source, there)
            return decision, agent.settle(migration_id, Role.SOURCE, decision.verdict).warnings

    # -- small parts -----------------------------------------------------------------------

    @staticmethod
    def _decided(
        migration_id: str, source: Standing | None, destination: Standing | None
    ) -> Decision:
        decision = decide(source, destination)
        if decision.verdict is Verdict.UNKNOWN:
            raise OutcomeUnknown(
                f"migration {migration_id} cannot be settled: {decision.reason}",
                hint=f"phaul-runtime show {migration_id} on both hosts tells what was done",
            )
        return decision


def _discarded(agent: RemoteAgent, migration_id: str) -> Settled:
    """The destination was never told to run its copy, and nobody else can tell it: the source need
    not wait until that copy is put away.
    """
    try:
        return agent.settle(migration_id, Role.DESTINATION, Verdict.DISCARD)
    except OutcomeUnknown:
        raise
    except PhaulError as error:
        warning = (
            f"what the destination holds of this migration was not put away ({error.message}); "
            f"phaul-runtime recover {migration_id} there does it"
        )
        return Settled(warnings=(warning,))


def _patience(path: Path, facts: Mapping[str, Any]) -> float:
    """How long an end may still be worked on whose other end is lost, in seconds."""
    with trusted(path):
        return float(facts.get("lost_s", 0)) + _MARGIN_S


def _lost(settled: Settled) -> Settled:
    """The source has nothing left to do: its tree is gone, and with it what was not sent."""
    warning = (
        f"{settled.missing} pages of the destination's copy are lost with the source's: it can "
        "never be whole, and waits for them for ever; end it there"
    )
    return Settled(settled.pid, (*settled.warnings, warning))
