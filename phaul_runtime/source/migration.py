"""One migration from the source's side: channel, checks, pre-copy, cut-over, clean-up.

This is what `phaul-runtime migrate` runs; a program that wants the whole of it calls `migrate`.
"""

from __future__ import annotations

import json
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phaul_runtime.criu.session import Criu
from phaul_runtime.cutover.cutover import RECOVER, CutOver
from phaul_runtime.cutover.freezer import FACT as HOLD
from phaul_runtime.cutover.freezer import Hold, check_hold
from phaul_runtime.cutover.journal import Journal, forget_old
from phaul_runtime.cutover.states import Role, State, Verdict
from phaul_runtime.engine.findings import OK, REFUSED, WARNING, Finding
from phaul_runtime.engine.interface import Engine, Inspection, SourceHalf, load_engine
from phaul_runtime.engine.targets import FileVerdict, Tree
from phaul_runtime.errors import (
    MigrationFailed,
    OutcomeUnknown,
    PhaulError,
    Refused,
    TargetGone,
)
from phaul_runtime.events import (
    Event,
    FilesCopied,
    IterationDone,
    Listener,
    MigrationStarted,
    Progress,
    Recovering,
    RolledBack,
    Served,
    Staging,
    Warned,
    guarded,
    nobody,
)
from phaul_runtime.files.tree_sender import STAGED, trees_to_carry
from phaul_runtime.hooks.lifecycle import ON_ROLLBACK, PRE_FREEZE, Move, announce, move_of
from phaul_runtime.library.api import PhaulConfig
from phaul_runtime.library.client import POST_COPY, PRE_COPY, PhaulClient
from phaul_runtime.library.policy import AncestorPolicy, BudgetPolicy, Policy
from phaul_runtime.library.throttle import FACT, Throttle
from phaul_runtime.postcopy.transfer import Transfer
from phaul_runtime.preflight.checks import (
    HostFinding,
    check_lazy,
    check_rsync,
    compare_hosts,
    judge,
    refuse,
)
from phaul_runtime.preflight.host_facts import gather_facts, one_host
from phaul_runtime.recovery.recover import Recovery
from phaul_runtime.report import Iteration, MigrationReport, result_of
from phaul_runtime.rpc import phaul_pb2 as pb
from phaul_runtime.rpc.client import RemoteAgent
from phaul_runtime.source.await_memory import await_filled
from phaul_runtime.source.failure_logs import keep_logs
from phaul_runtime.source.hooks import SourceHooks
from phaul_runtime.source.session import Session
from phaul_runtime.system.cancel import Cancellation
from phaul_runtime.transport.base import Destination, load_transport

if TYPE_CHECKING:
    from phaul_runtime.config.model import Config

HERE = "here"
_RETRY_S = 1.0


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
        id: unused on both hosts; `once` has the way for one that may be known already.
        channel: names the channel's directories; the id by default.
    """

    config: Config
    target: str
    listener: Listener = nobody
    cancellation: Cancellation = field(default_factory=Cancellation)
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    channel: str = ""

    def __post_init__(self) -> None:
        self.listener = guarded(self.listener)
        self.criu = Criu(self.config.criu.binary, deadline_s=self.config.criu.timeout_s)
        self._iterations: list[Iteration] = []
        self._begun = time.monotonic()
        self._journal: Journal | None = None
        self._cut_over: CutOver | None = None
        self._left_there = False
        self._group: Path | None = None
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
                inspection, differing = self._preflight(session, engine)
                if dry_run:
                    return self._finish_report(MigrationReport("checked"), destination)
                try:
                    report = self._move(session, engine, inspection, differing)
                except Exception as error:
                    meaning = self._meaning(error)
                    if meaning is error:
                        raise
                    raise meaning from error
        except OutcomeUnknown as error:
            report = self._recover(error)
        except Exception:
            if self._left_there:
                self._put_away_there()
            raise
        else:
            if self._left_there:
                self._put_away_there()
        finally:
            if self._journal is not None:
                self._journal.close()
        return self._finish_report(report, destination)

    def check(self) -> list[HostFinding]:
        """Only the checks, of the target too if there is one; returns what refuses."""
        destination = Destination.parse(self.config.transport.to or "")
        load_transport(destination)
        engine = load_engine(self.config.engine) if self.target else None
        with self._session(destination) as session:
            findings = self._source_hooks.asked(self._about(), HERE) if engine else []
            findings += self._host_findings(session)
            if engine is not None:
                source = self._source = self._source_half(engine)
                findings += self._target_findings(session, source.inspect())[0]
                findings += self._throttle_findings(source)
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
        return Session(config, destination, self.id, stop, self.roll_back, token=self.channel)

    # -- steps -----------------------------------------------------------------------------

    def _understand(self) -> tuple[Engine, Destination]:
        """Everything that can be wrong with the command itself, before anything is opened."""
        if not self.config.transport.to:
            raise Refused("no destination", hint="--to ssh://root@host, or transport.to")
        destination = Destination.parse(self.config.transport.to)
        load_transport(destination)
        engine = load_engine(self.config.engine)
        self.listener(
            MigrationStarted(self.id, self.config.engine, self.target, self.config.transport.to)
        )
        return engine, destination

    def _source_half(self, engine: Engine) -> SourceHalf:
        self._options = self.config.engine_options(engine.name, engine.options_model)
        return engine.source(self.target, self._options, criu_log_level=self.config.criu.log_level)

    _options: Any = None

    def _host_findings(self, session: Session) -> list[HostFinding]:
        self._here = gather_facts(self.config.workdir, self.config.state_dir, self.criu)
        there = self._there = session.agent.hello()
        self._same_host = one_host(self._here, there)
        names = (HERE, session.agent.name)
        findings = compare_hosts(self._here, there, names, self.config.criu.page_server)
        if self.config.restore == "lazy" or self.config.mode != PRE_COPY:
            findings.append(HostFinding(session.agent.name, check_lazy(there)))
        if self.config.mode != PRE_COPY:
            findings += [HostFinding(HERE, check_lazy(self._here)), HostFinding(HERE, check_hold())]
        return findings

    def _target_findings(
        self, session: Session, inspection: Inspection
    ) -> tuple[list[HostFinding], list[str]]:
        """What speaks against this target, and the paths of files that differ."""
        findings = [HostFinding(HERE, f) for f in inspection.findings]
        if self.config.mode != PRE_COPY and self._source.no_post_copy:
            text = f"no {self.config.mode}: {self._source.no_post_copy}"
            findings.append(HostFinding(HERE, Finding("mode", REFUSED, text, "--mode pre-copy")))
        request = pb.CheckRequest(
            engine=self.config.engine,
            manifest=json.dumps(self._manifest(inspection)).encode(),
            memory=inspection.memory,
            cpuinfo=self._here.cpuinfo,
            same_host=self._same_host,
            id=self.id,
            target=self.target,
            source=self._here.hostname,
            restore=self.config.restore,
        )
        files = () if self._same_host else inspection.files
        found, differing = session.agent.check(request, files)
        there = session.agent.name
        findings += [HostFinding(there, finding) for finding in found]
        findings.append(HostFinding(there, self._files_finding(differing, inspection)))
        if trees := self._trees_of(inspection):
            # Within one host they may be at their place already; the first may not be needed.
            needed = not self._same_host and not all(tree.first for tree in trees)
            for host, facts in ((HERE, self._here), (there, self._there)):
                findings.append(HostFinding(host, check_rsync(facts, needed=needed)))
        return findings, [verdict.path for verdict in differing]

    def _files_finding(self, verdicts: Sequence[FileVerdict], inspection: Inspection) -> Finding:
        copy = self.config.filesystem.files == "copy"
        stuck = [v for v in verdicts if not (copy and v.copyable)]
        if stuck:
            text = "; ".join(f"{v.path} {v.reason}" for v in stuck)
            if all(v.copyable for v in stuck):
                return Finding("files", REFUSED, text, "--files copy carries them")
            return Finding(
                "files", REFUSED, text, "install the same packages on both hosts, or the same file"
            )
        if verdicts:
            return Finding(
                "files",
                OK,
                f"{len(verdicts)} of {len(inspection.files)} differ and will be carried",
            )
        return Finding("files", OK, f"{len(inspection.files)} files are there")

    def _throttle_findings(self, source: SourceHalf) -> list[HostFinding]:
        """Whether the target last inspected can be slowed, if that may be asked for."""
        if self.config.policy.if_not_converging != "throttle":
            return []
        try:
            self._group = source.throttle_cgroup()
        except Refused as error:
            finding = Finding(
                "throttle",
                WARNING,
                f"it cannot be slowed: {error.message}",
                "give it a cgroup v2 of its own with the cpu controller; without: proceed",
            )
        else:
            finding = Finding("throttle", OK, f"{self._group / 'cpu.max'} can slow it")
        return [HostFinding(HERE, finding)]

    def _throttle(self, inspection: Inspection, journal: Journal) -> Throttle | None:
        if self._group is None:
            return None
        return Throttle(
            self._group,
            inspection.pid,
            remember=lambda fact: journal.note(**{FACT: fact}),
            warn=lambda text: self.listener(Warned(text)),
        )

    def _trees_of(self, inspection: Inspection) -> list[Tree]:
        """Those that are carried where the destination has a place for them."""
        shared = self.config.filesystem.rootfs == "shared"
        return [tree for tree in inspection.trees if tree.first or not shared]

    def _manifest(self, inspection: Inspection) -> dict[str, Any]:
        """What the engine's other half is told: its own, and what the core decides."""
        return {**inspection.manifest, "rootfs": self.config.filesystem.rootfs}

    def _preflight(self, session: Session, engine: Engine) -> tuple[Inspection, list[str]]:
        self._source = self._source_half(engine)
        ignore = self.config.checks.ignore
        refuse(judge(self._source_hooks.asked(self._about(), HERE), ignore, self.listener))
        # The hosts first: an inspection as an ordinary user would fail for the wrong reason.
        refuse(judge(self._host_findings(session), ignore, self.listener))
        inspection = self._source.inspect()
        findings, differing = self._target_findings(session, inspection)
        findings += self._throttle_findings(self._source)
        refuse(judge(findings, ignore, self.listener))
        self.cancellation.check()
        return inspection, differing

    def _move(
        self, session: Session, engine: Engine, inspection: Inspection, differing: list[str]
    ) -> MigrationReport:
        agent = session.agent
        config = self.config
        options = self._options.model_dump(mode="json")
        workdir = session.make_workdir()
        journal = self._journal = Journal.create(Path(config.state_dir), self.id, Role.SOURCE)
        forget_old(Path(config.state_dir), config.history)
        journal.enter(
            State.ITERATING,
            engine=engine.name,
            target=self.target,
            to=config.transport.to,
            owner=session.certificate,
            options=options,
            identity=dict(self._source.identity()),
            lost_s=config.timeouts.lost_s,
            mode=config.mode,
        )
        places = agent.open(
            self.id,
            engine=engine.name,
            target=self.target,
            manifest=self._manifest(inspection),
            options=options,
            lost_s=config.timeouts.lost_s,
            log_level=config.criu.log_level,
            restore=config.restore,
            post_copy=config.mode != PRE_COPY,
            memory=0 if config.mode == POST_COPY else inspection.memory,
            late_memory=inspection.memory if config.mode == POST_COPY else 0,
            page_server=config.criu.page_server,
            page_format=self._here.page_format,
        )
        memory = session.open_memory()
        agent.beat_every(
            config.timeouts.heartbeat_s,
            config.timeouts.lost_s,
            lambda count: self.listener(Progress(len(self._iterations) + 1, count)),
            session.cut_memory,
        )
        carried = self._carry_files(agent, inspection, differing)
        carried += self._carry_trees(agent, journal, self._trees_of(inspection), places)
        throttle = self._throttle(inspection, journal)
        cut_over = self._cut_over = CutOver(
            agent,
            self.listener,
            self.cancellation,
            journal,
            before_freeze=lambda: self._before_freeze(agent, journal),
            in_freeze=throttle.lift if throttle else lambda: None,
            when_frozen=self._source_hooks.when_frozen(journal),
            processes=None if config.mode == PRE_COPY else self._source.processes,
            serve=lambda hold, images_dir: self._begin_pages(agent, journal, hold, images_dir),
        )
        client = PhaulClient(
            self._source.local(cut_over, self.cancellation),
            agent,
            PhaulConfig(inspection.pid, memory.fileno(), str(workdir)),
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
            report.warnings += self._source.finish()
            cut_over.finished()
            await_filled(agent, report, cut_over.full_because, self.listener)
        else:
            answering = self._serve_pages(cut_over, report)
            self._left_there = answering is not agent
        self._left_there = self._left_there or agent.lost
        for warning in report.warnings:
            self.listener(Warned(warning))
        return report

    def _begin_pages(
        self, agent: RemoteAgent, journal: Journal, hold: Hold, images_dir: Path
    ) -> Callable[[], None]:
        """Before the restore, which may need some of the pages that stay here.

        Returns what raises if they cannot be served.
        """
        self._transfer = Transfer(
            self.config,
            journal,
            hold,
            images_dir,
            listener=self.listener,
            cancellation=self.cancellation,
        )
        self._transfer.begin(agent)
        return self._transfer.check

    _transfer: Transfer | None = None

    def _serve_pages(self, cut_over: CutOver, report: MigrationReport) -> RemoteAgent:
        """The copy runs there: bring it the pages that it misses, then end the one here.

        Returns the agent that answered last.
        """
        transfer = self._transfer
        if transfer is None:
            raise MigrationFailed("nothing serves the pages that are missing")
        with transfer:
            answering = transfer.run()
            report.warnings += transfer.conclude(self._source)
            report.bytes_transferred += transfer.bytes_sent
            await_filled(answering, report, cut_over.full_because, self.listener)
        faults, worst = report.lazy.get("faults", 0), report.lazy.get("worst_fault_ms", 0.0)
        report.post_copy = {
            "pages": transfer.total,
            "faults": faults,
            "worst_fault_ms": worst,
            "seconds": transfer.seconds,
        }
        self.listener(Served(transfer.total, int(faults), worst, transfer.seconds))
        return answering

    def _before_freeze(self, agent: RemoteAgent, journal: Journal) -> None:
        """CRIU is about to freeze: the last moment for what takes its time."""
        self._hooks.run(PRE_FREEZE, move_of(journal))
        agent.freshen_trees()

    def _carry_files(self, agent: RemoteAgent, inspection: Inspection, differing: list[str]) -> int:
        """While the target runs: stage the files that differ; returns the bytes sent."""
        if self._same_host:
            return 0  # one file system
        if self.config.filesystem.files != "copy":
            agent.watch_files(inspection.files)
            return 0
        sender = agent.carry_files(inspection.files, differing)
        if sender.files:
            self.listener(FilesCopied(sender.files, sender.bytes, final=False))
        return sender.bytes

    def _carry_trees(
        self,
        agent: RemoteAgent,
        journal: Journal,
        trees: Sequence[Tree],
        places: Mapping[str, str],
    ) -> int:
        """While the target runs; returns the bytes sent of those that go first."""
        sent = 0
        for tree in (tree for tree in trees if tree.first):
            # Each may bring the places of those after it.
            if trees_to_carry([tree], places, agent.name, same_host=self._same_host):
                journal.add(STAGED, tree.name)
                count, places = self._carry_first(agent, tree)
                sent += count
        rest = [tree for tree in trees if not tree.first]
        if rest:
            rest = trees_to_carry(rest, places, agent.name, same_host=self._same_host)
            agent.carry_trees(rest, self.listener, self._source.mapped)
        return sent

    def _carry_first(self, agent: RemoteAgent, tree: Tree) -> tuple[int, dict[str, str]]:
        """Have a tree made, and carry it; returns the bytes sent and all places from now on."""
        self.listener(Staging(tree.name))
        try:
            self._source.stage(tree.name, self.cancellation)
            return agent.carry_first(tree, self.listener)
        finally:
            try:
                self._source.unstage(tree.name)
            except PhaulError as error:
                self.listener(Warned(f"tree {tree.name} is left on this host: {error.message}"))

    def _meaning(self, error: Exception) -> Exception:
        """What a failure means, whatever it is: that depends on which copy is alive."""
        if isinstance(error, OutcomeUnknown):
            return error
        unknown = self._given_up(error)
        if unknown is not None:
            return unknown
        if not isinstance(error, MigrationFailed):
            return error
        error.host = error.host or HERE
        if self._source_gone():
            return TargetGone(
                f"{self.config.engine} {self.target} ended by itself while it was being moved; "
                "nothing runs at the destination"
            )
        return error

    def _given_up(self, error: BaseException) -> OutcomeUnknown | None:
        """That the source's copy is dead or held, or may be: then only a recovery may undo."""
        held = self._cut_over is not None and self._cut_over.hold is not None
        if not held and (self._journal is None or self._journal.state is not State.COMMITTING):
            return None
        try:
            gone = self._source.gone()
        except OutcomeUnknown as unknown:
            return unknown
        if not held and not gone:
            return None
        how = "frozen" if held and not gone else "dead"
        return OutcomeUnknown(
            f"the source's copy is {how}, and then: {error}", hint=RECOVER.format(self.id)
        )

    def _source_gone(self) -> bool:
        """The same of one that was not given up: what is not known counts for nothing."""
        try:
            return self._source.gone()
        except OutcomeUnknown:
            return False

    def _recover(self, unknown: OutcomeUnknown) -> MigrationReport:
        """The source's copy is dead: find out about the other, from a new channel.

        Raises:
            OutcomeUnknown: not even that helps within `timeouts.commit_s`.
            MigrationFailed: the source's copy turns out to run.
        """
        if self._transfer is not None:
            self._transfer.stop()
        if self._journal is not None and self._journal.state is State.POST_COPY:
            raise unknown  # New channels were tried, and for longer.
        self.listener(Recovering(unknown.message))
        deadline = time.monotonic() + self.config.timeouts.commit_s
        while True:
            try:
                recovery = Recovery(self.config, listener=self.listener)
                recovered = recovery.recover(self.id, self._journal)
                break
            except PhaulError as error:
                if time.monotonic() > deadline:
                    raise unknown from error
                time.sleep(_RETRY_S)
        if recovered.verdict is Verdict.DISCARD:
            raise MigrationFailed(
                f"{unknown.message}; the source's copy runs on: {recovered.reason}",
                host=unknown.host,
                log=unknown.log,
            ) from unknown
        report = MigrationReport(
            "moved",
            iterations=self._iterations,
            restored_pid=recovered.pid,
            warnings=[
                f"finished by a recovery, after: {unknown.message}",
                *recovered.warnings,
            ],
        )
        if self._cut_over is not None:
            report.downtime_ms = self._cut_over.frozen_for_ms()
            if self._iterations:
                report.expected_freeze_ms = self._iterations[-1].expected_freeze_ms
            report.freeze = self._cut_over.freeze
            report.files_copied = self._cut_over.files_sent
        for warning in report.warnings:
            self.listener(Warned(warning))
        return report

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

    @property
    def begun(self) -> bool:
        """Something may have to be undone."""
        state = self._journal.state if self._journal else None
        return state is not None and not state.settled

    def roll_back(self, session: Session, reason: BaseException) -> None:
        """Undo everything on both sides, if anything was begun; the source runs, or runs again.

        Once the source was given up, only a recovery may: it looks which copy lives.
        """
        if not self.begun or self._given_up(reason) is not None:
            return
        self._journal_quietly(State.ABORTING)
        if self._transfer is not None:
            self._transfer.stop()
        if self._cut_over is not None:
            self._cut_over.end()
        if self._journal is not None and (hold := Hold.recall(self._journal.facts.get(HOLD))):
            hold.release()
        self._source.rollback()
        if self._journal is not None:
            for warning in self._hooks.try_to(ON_ROLLBACK, move_of(self._journal)):
                self.listener(Warned(warning))
        clean = session.agent.abort()
        self._left_there = not clean
        self._journal_quietly(State.ABORTED)
        text = reason.message if isinstance(reason, PhaulError) else repr(reason)
        self.listener(RolledBack(text, clean))

    def _put_away_there(self) -> None:
        """The agent was lost before it could put away its part: ask another one, once."""
        try:
            warnings = Recovery(self.config).recover(self.id, self._journal).warnings
        except PhaulError as error:
            warnings = (
                f"the destination may hold what is left of this migration: {error.message}; "
                f"phaul-runtime recover {self.id} puts it away",
            )
        for warning in warnings:
            self.listener(Warned(warning))

    def _journal_quietly(self, state: State) -> None:
        """The source runs: a full disk is no reason to stop on the way back."""
        if self._journal is None:
            return
        try:
            self._journal.enter(state)
        except MigrationFailed as error:
            self.listener(Warned(error.message))

    def _finish_report(
        self, report: MigrationReport, destination: Destination | None
    ) -> MigrationReport:
        report.id = self.id
        report.engine = self.config.engine
        report.mode = self.config.mode
        report.target = self.target
        report.source = socket.gethostname()
        report.destination = destination.url if destination else (self.config.transport.to or "")
        report.total_ms = (time.monotonic() - self._begun) * 1000
        if self._journal is not None:
            self._journal.keep_report(report.to_json())
        return report

    def _keep_logs(self, error: PhaulError) -> str:
        directory = Path(self.config.log_dir) / self.id
        try:
            return str(directory) if keep_logs(error, directory, HERE) else ""
        except OSError as problem:
            self.listener(Warned(f"logs cannot be kept in {directory}: {problem.strerror}"))
            return ""
