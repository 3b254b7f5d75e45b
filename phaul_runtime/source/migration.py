"""One migration from the source's side: channel, checks, pre-copy, cut-over, clean-up.

This is what `phaul-runtime migrate` runs; a program that wants the whole of it calls `migrate`.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phaul_runtime.cutover.cutover import CutOver
from phaul_runtime.cutover.freezer import Freezer
from phaul_runtime.cutover.journal import Journal, forget_old
from phaul_runtime.cutover.states import Role, State
from phaul_runtime.engine.interface import Engine, Inspection, SourceHalf
from phaul_runtime.errors import (
    MigrationFailed,
    OutcomeUnknown,
    PhaulError,
    Refused,
)
from phaul_runtime.events import (
    Event,
    IterationDone,
    Listener,
    MigrationStarted,
    Progress,
    RolledBack,
    Served,
    Warned,
    guarded,
    nobody,
)
from phaul_runtime.hooks.lifecycle import ON_ROLLBACK, PRE_FREEZE, Move, announce, move_of
from phaul_runtime.library.api import PhaulConfig
from phaul_runtime.library.client import POST_COPY, PRE_COPY, PhaulClient
from phaul_runtime.library.policy import AncestorPolicy, BudgetPolicy, Policy
from phaul_runtime.library.throttle import FACT, Throttle
from phaul_runtime.postcopy.transfer import Transfer
from phaul_runtime.preflight.checks import (
    HostFinding,
    judge,
    refuse,
)
from phaul_runtime.preflight.wiring import STANDARD, Wiring
from phaul_runtime.recovery.recover import Recovery
from phaul_runtime.report import Iteration, MigrationReport, result_of
from phaul_runtime.rpc.client import RemoteAgent
from phaul_runtime.source.await_memory import await_filled
from phaul_runtime.source.carry import Carriage, TreeCarrier, carry_files
from phaul_runtime.source.failure_logs import keep_logs
from phaul_runtime.source.hooks import SourceHooks
from phaul_runtime.source.outcome import Begun, recover
from phaul_runtime.source.preflight import (
    HERE,
    Checked,
    Hosts,
    check_both,
    check_target,
    check_throttle,
    look_at_hosts,
    manifest_of,
    trees_of,
)
from phaul_runtime.source.session import Session
from phaul_runtime.system.cancel import Cancellation
from phaul_runtime.transport.base import Destination

if TYPE_CHECKING:
    from phaul_runtime.config.model import Config


def policy_from(config: Config) -> Policy:
    """The policy that the configuration asks for."""
    if config.policy.name == "phaul":
        return AncestorPolicy()
    return BudgetPolicy(config.policy.max_downtime_ms, config.policy.max_iterations)


@dataclass
class Migration:
    """One migration; make one, `run` or `check` it once.

    Args:
        config: as loaded; `config.engine` and `config.transport.to` are used.
        target: what the engine is to move.
        listener: told of everything that happens.
        cancellation: asks to stop; honoured up to the cut-over.
        id: unused on both hosts; `idempotent` has the way for one that may be known already.
        channel: names the channel's directories; the id by default.
        wiring: what it is made with.
    """

    config: Config
    target: str
    listener: Listener = nobody
    cancellation: Cancellation = field(default_factory=Cancellation)
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    channel: str = ""
    wiring: Wiring = STANDARD

    def __post_init__(self) -> None:
        self.listener = guarded(self.listener)
        self.criu = self.wiring.criu(self.config.criu.binary, deadline_s=self.config.criu.timeout_s)
        self._iterations: list[Iteration] = []
        self._started = time.monotonic()
        self._begun: Begun | None = None
        self._left_there = False
        self._hooks = self.config.hooks.hooks()
        self._source_hooks = SourceHooks(self._hooks, self.listener)

    # -- what the command line calls -------------------------------------------------------

    def run(self, *, dry_run: bool = False) -> MigrationReport:
        """Move the target, or only check everything (`dry_run`).

        Raises:
            PhaulError: with the meaning of its exit code; `error.report` is not needed, a report
                of the failure is made by `failed`.
        """
        try:
            return self._run(dry_run=dry_run)
        except Exception as error:
            if not dry_run:
                self._source_hooks.failed(self._about(), error)
            raise

    def _run(self, *, dry_run: bool) -> MigrationReport:
        engine, destination = self._understand()
        try:
            with self._session(destination) as session:
                checked = self._preflight(session, engine)
                if dry_run:
                    return self._finish_report(MigrationReport("checked"), destination)
                try:
                    report = self._move(session, engine, checked)
                except Exception as error:
                    meaning = self._begun.meaning(error) if self._begun else error
                    if meaning is error:
                        raise
                    raise meaning from error
        except OutcomeUnknown as error:
            if self._begun is None:
                raise
            report = recover(error, self._begun, self._iterations, self.recovery())
        except Exception:
            if self._left_there:
                self._put_away_there()
            raise
        else:
            if self._left_there:
                self._put_away_there()
        finally:
            if self._begun is not None:
                self._begun.journal.close()
        return self._finish_report(report, destination)

    def check(self) -> list[HostFinding]:
        """Only the checks, of the target too if there is one; returns what refuses."""
        destination = Destination.parse(self.config.transport.to or "")
        self.wiring.transport(destination)
        engine = self.wiring.engine(self.config.engine) if self.target else None
        with self._session(destination) as session:
            findings = self._source_hooks.asked(self._about(), HERE) if engine else []
            hosts = look_at_hosts(self.config, self.criu, session.agent, self.wiring)
            findings += check_both(self.config, hosts)
            if engine is not None:
                source, _ = self._source_half(engine)
                inspection = source.inspect()
                findings += self._of_target(session, hosts, source, inspection)[0]
                findings += check_throttle(self.config, source)[0]
            return judge(findings, self.config.checks.ignore, self.listener)

    def failed(self, error: PhaulError) -> MigrationReport:
        """The report of a failure; CRIU's logs are kept under `log_dir`."""
        report = MigrationReport(
            result_of(error),
            error=str(error),
            error_kind=type(error).__name__,
            exit_code=int(error.exit_code),
        )
        report.logs = self._keep_logs(error)
        return self._finish_report(report, None)

    def _about(self) -> Move:
        """What hooks are told before there is a journal, too."""
        to = self.config.transport.to or ""
        return Move(self.id, Role.SOURCE, self.config.engine, self.target, to)

    def _session(self, destination: Destination) -> Session:
        config, stop = self.config, self.cancellation
        return Session(
            config,
            destination,
            self.id,
            stop,
            self.roll_back,
            token=self.channel,
            transports=self.wiring.transport,
        )

    # -- steps -----------------------------------------------------------------------------

    def _understand(self) -> tuple[Engine, Destination]:
        """Everything that can be wrong with the command itself, before anything is opened."""
        if not self.config.transport.to:
            raise Refused("no destination", hint="--to ssh://root@host, or transport.to")
        destination = Destination.parse(self.config.transport.to)
        self.wiring.transport(destination)
        engine = self.wiring.engine(self.config.engine)
        self.listener(
            MigrationStarted(self.id, self.config.engine, self.target, self.config.transport.to)
        )
        return engine, destination

    def _source_half(self, engine: Engine) -> tuple[SourceHalf, Any]:
        """The engine's half here, and its options."""
        options = self.config.engine_options(engine.name, engine.options_model)
        level = self.config.criu.log_level
        return engine.source(self.target, options, criu_log_level=level), options

    def _of_target(
        self, session: Session, hosts: Hosts, source: SourceHalf, inspection: Inspection
    ) -> tuple[list[HostFinding], list[str]]:
        agent = session.agent
        return check_target(
            self.config, self._about(), agent, hosts=hosts, source=source, inspection=inspection
        )

    def _preflight(self, session: Session, engine: Engine) -> Checked:
        source, options = self._source_half(engine)
        ignore = self.config.checks.ignore
        refuse(judge(self._source_hooks.asked(self._about(), HERE), ignore, self.listener))
        # The hosts first: an inspection as an ordinary user would fail for the wrong reason.
        hosts = look_at_hosts(self.config, self.criu, session.agent, self.wiring)
        refuse(judge(check_both(self.config, hosts), ignore, self.listener))
        inspection = source.inspect()
        findings, differing = self._of_target(session, hosts, source, inspection)
        of_throttle, throttled = check_throttle(self.config, source)
        refuse(judge([*findings, *of_throttle], ignore, self.listener))
        self.cancellation.check()
        return Checked(hosts, source, options, inspection, differing, throttled)

    def _move(self, session: Session, engine: Engine, checked: Checked) -> MigrationReport:
        agent, config, source = session.agent, self.config, checked.source
        workdir = session.make_workdir()
        begun = self._begin(session, engine, checked)
        journal = begun.journal
        places = self._open(agent, engine, checked)
        memory = session.open_memory()
        agent.beat_every(
            config.timeouts.heartbeat_s,
            config.timeouts.lost_s,
            lambda count: self.listener(Progress(len(self._iterations) + 1, count)),
        )
        agent.when_silent(session.cut_memory)
        carriage = Carriage(agent, self.cancellation, config.timeouts.prepare_s)
        carried = carry_files(carriage, config, checked, self.listener)
        trees = TreeCarrier(
            carriage,
            agent.name,
            source,
            journal=journal,
            listener=self.listener,
            cancellation=self.cancellation,
            same_host=checked.hosts.same,
        )
        carried += trees.carry(trees_of(config, checked.inspection), places)
        throttle = self._throttle(checked, journal)
        cut_over = begun.cut_over = CutOver(
            carriage,
            self.listener,
            self.cancellation,
            journal,
            before_freeze=lambda: self._before_freeze(carriage, journal),
            in_freeze=throttle.lift if throttle else lambda: None,
            when_frozen=self._source_hooks.when_frozen(journal),
            processes=None if config.mode == PRE_COPY else source.processes,
            serve=lambda hold, images_dir: self._begin_pages(agent, begun, hold, images_dir),
        )
        client = PhaulClient(
            source.local(cut_over, self.cancellation),
            agent,
            PhaulConfig(checked.inspection.pid, memory.fileno(), str(workdir)),
            policy=policy_from(config),
            if_not_converging=config.policy.if_not_converging,
            throttle=throttle,
            mode=config.mode,
            criu=self.criu,
            listener=self._track,
            cancellation=self.cancellation,
            log_level=config.criu.log_level,
        )
        report = client.migrate()
        report.files_copied = cut_over.files_sent
        report.bytes_transferred += carried
        report.link_bytes = session.link_bytes
        # An address leaves this host before CRIU's lock on its connections does.
        report.warnings += announce(self._hooks, journal)
        if cut_over.hold is None:
            report.warnings += source.finish()
            cut_over.finished()
            await_filled(agent, report, cut_over.full_because, self.listener)
        else:
            answering = self._serve_pages(begun, report, cut_over.full_because)
            self._left_there = answering is not agent
        self._left_there = self._left_there or agent.lost
        for warning in report.warnings:
            self.listener(Warned(warning))
        return report

    def _begin(self, session: Session, engine: Engine, checked: Checked) -> Begun:
        """Write down that there is a move, before the destination is told of it."""
        config = self.config
        journal = Journal.create(Path(config.state_dir), self.id, Role.SOURCE)
        # From here on there is something to close, and to undo.
        begun = self._begun = Begun(f"{engine.name} {self.target}", checked.source, journal)
        forget_old(Path(config.state_dir), config.history)
        journal.enter(
            State.ITERATING,
            engine=engine.name,
            target=self.target,
            to=config.transport.to,
            owner=session.certificate,
            options=checked.options.model_dump(mode="json"),
            identity=dict(checked.source.identity()),
            lost_s=config.timeouts.lost_s,
            mode=config.mode,
        )
        return begun

    def _open(self, agent: RemoteAgent, engine: Engine, checked: Checked) -> Mapping[str, str]:
        """Open the migration at the destination; returns where each tree lies there."""
        config, memory = self.config, checked.inspection.memory
        return agent.open(
            self.id,
            engine=engine.name,
            target=self.target,
            manifest=manifest_of(config, checked.inspection),
            options=checked.options.model_dump(mode="json"),
            lost_s=config.timeouts.lost_s,
            log_level=config.criu.log_level,
            restore=config.restore,
            post_copy=config.mode != PRE_COPY,
            memory=0 if config.mode == POST_COPY else memory,
            late_memory=memory if config.mode == POST_COPY else 0,
            page_server=config.criu.page_server,
            page_format=checked.hosts.here.page_format,
        )

    def _throttle(self, checked: Checked, journal: Journal) -> Throttle | None:
        if checked.throttled is None:
            return None
        return Throttle(
            checked.throttled,
            checked.inspection.pid,
            remember=lambda fact: journal.note(**{FACT: fact}),
            warn=lambda text: self.listener(Warned(text)),
        )

    def _begin_pages(
        self, agent: RemoteAgent, begun: Begun, hold: Freezer, images_dir: Path
    ) -> Callable[[], None]:
        """Before the restore, which may need some of the pages that stay here.

        Returns what raises if they cannot be served.
        """
        transfer = begun.transfer = Transfer(
            self.config,
            begun.journal,
            hold,
            images_dir,
            listener=self.listener,
            cancellation=self.cancellation,
            transports=self.wiring.transport,
        )
        transfer.begin(agent)
        return transfer.check

    def _serve_pages(self, begun: Begun, report: MigrationReport, full_because: str) -> RemoteAgent:
        """The copy runs there: bring it the pages that it misses, then end the one here.

        Returns the agent that answered last.
        """
        transfer = begun.transfer
        if transfer is None:
            raise MigrationFailed("nothing serves the pages that are missing")
        with transfer:
            answering = transfer.run()
            report.warnings += transfer.conclude(begun.source)
            report.bytes_transferred += transfer.bytes_sent
            await_filled(answering, report, full_because, self.listener)
        faults, worst = report.lazy.get("faults", 0), report.lazy.get("worst_fault_ms", 0.0)
        report.post_copy = {
            "pages": transfer.total,
            "faults": faults,
            "worst_fault_ms": worst,
            "seconds": transfer.seconds,
        }
        self.listener(Served(transfer.total, int(faults), worst, transfer.seconds))
        return answering

    def _before_freeze(self, carriage: Carriage, journal: Journal) -> None:
        """CRIU is about to freeze: the last moment for what takes its time."""
        self._hooks.run(PRE_FREEZE, move_of(journal))
        carriage.freshen_trees()

    def _track(self, event: Event) -> None:
        if isinstance(event, IterationDone):
            self._iterations.append(
                Iteration(
                    event.pages_written,
                    event.pages_skipped,
                    event.bytes,
                    event.duration_ms,
                    expected_freeze_ms=event.expected_freeze_ms,
                )
            )
        self.listener(event)

    def roll_back(self, session: Session, reason: BaseException) -> None:
        """Undo everything on both sides, if anything was begun; the source runs, or runs again.

        Once the source was given up, only a recovery may: it looks which copy lives.
        """
        begun = self._begun
        if begun is None or not begun.unsettled or begun.given_up(reason) is not None:
            return
        begun.enter_quietly(State.ABORTING, self.listener)
        begun.let_run()
        for warning in self._hooks.try_to(ON_ROLLBACK, move_of(begun.journal)):
            self.listener(Warned(warning))
        clean = session.agent.abort()
        self._left_there = not clean
        begun.enter_quietly(State.ABORTED, self.listener)
        text = reason.message if isinstance(reason, PhaulError) else repr(reason)
        self.listener(RolledBack(text, clean))

    def recovery(self) -> Recovery:
        """What settles this migration where it was left unsettled."""
        return Recovery(self.config, listener=self.listener, wiring=self.wiring)

    def _put_away_there(self) -> None:
        """The agent was lost before it could put away its part: ask another one, once."""
        try:
            journal = self._begun.journal if self._begun else None
            warnings = Recovery(self.config, wiring=self.wiring).recover(self.id, journal).warnings
        except PhaulError as error:
            warnings = (
                f"the destination may hold what is left of this migration: {error.message}; "
                f"phaul-runtime recover {self.id} puts it away",
            )
        for warning in warnings:
            self.listener(Warned(warning))

    def _finish_report(
        self, report: MigrationReport, destination: Destination | None
    ) -> MigrationReport:
        report.id = self.id
        report.engine = self.config.engine
        report.mode = self.config.mode
        report.target = self.target
        report.source = socket.gethostname()
        report.destination = destination.url if destination else (self.config.transport.to or "")
        report.total_ms = (time.monotonic() - self._started) * 1000
        if self._begun is not None:
            self._begun.journal.keep_report(report.to_json())
        return report

    def _keep_logs(self, error: PhaulError) -> str:
        directory = Path(self.config.log_dir) / self.id
        try:
            return str(directory) if keep_logs(error, directory, HERE) else ""
        except OSError as problem:
            self.listener(Warned(f"logs cannot be kept in {directory}: {problem.strerror}"))
            return ""
