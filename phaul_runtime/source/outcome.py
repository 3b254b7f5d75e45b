"""What a failure of a move means: that depends on which copy is alive."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from phaul_runtime.cutover.cutover import RECOVER, CutOver
from phaul_runtime.cutover.freezer import FACT as HOLD
from phaul_runtime.cutover.freezer import Freezer
from phaul_runtime.cutover.journal import Journal
from phaul_runtime.cutover.states import State, Verdict
from phaul_runtime.engine.interface import SourceHalf
from phaul_runtime.errors import MigrationFailed, OutcomeUnknown, PhaulError, TargetGone
from phaul_runtime.events import Listener, Recovering, Warned
from phaul_runtime.postcopy.transfer import Transfer
from phaul_runtime.recovery.recover import Recovery
from phaul_runtime.report import Iteration, MigrationReport
from phaul_runtime.source.preflight import HERE

_RETRY_S = 1.0


@dataclass
class Begun:
    """A move from its journal on.

    Attributes:
        name: engine and target, for messages.
        source: the engine's half here.
        journal: of the source's role.
        cut_over: once there is one.
        transfer: of the pages that stay here, once there is one.
    """

    name: str
    source: SourceHalf
    journal: Journal
    cut_over: CutOver | None = None
    transfer: Transfer | None = None

    @property
    def unsettled(self) -> bool:
        """Something may have to be undone."""
        state = self.journal.state
        return state is not None and not state.settled

    @property
    def _held(self) -> bool:
        return self.cut_over is not None and self.cut_over.hold is not None

    def given_up(self, error: BaseException) -> OutcomeUnknown | None:
        """That the source's copy is dead or held, or may be: then only a recovery may undo."""
        if not self._held and self.journal.state is not State.COMMITTING:
            return None
        try:
            gone = self.source.gone()
        except OutcomeUnknown as unknown:
            return unknown
        if not self._held and not gone:
            return None
        how = "frozen" if self._held and not gone else "dead"
        return OutcomeUnknown(
            f"the source's copy is {how}, and then: {error}",
            hint=RECOVER.format(self.journal.id),
        )

    def meaning(self, error: Exception) -> Exception:
        """What an error means, whatever it is."""
        if isinstance(error, OutcomeUnknown):
            return error
        unknown = self.given_up(error)
        if unknown is not None:
            return unknown
        if not isinstance(error, MigrationFailed):
            return error
        error.host = error.host or HERE
        if self._ended():
            return TargetGone(
                f"{self.name} ended by itself while it was being moved; nothing runs at the "
                "destination"
            )
        return error

    def _ended(self) -> bool:
        """Whether a source that was not given up is gone; what is not known counts for nothing."""
        try:
            return self.source.gone()
        except OutcomeUnknown:
            return False

    def enter_quietly(self, state: State, listener: Listener) -> None:
        """The source runs: a full disk is no reason to stop on the way back."""
        try:
            self.journal.enter(state)
        except MigrationFailed as error:
            listener(Warned(error.message))

    def let_run(self) -> None:
        """Undo what the move has done to the source: it runs, or runs again."""
        if self.transfer is not None:
            self.transfer.stop()
        if self.cut_over is not None:
            self.cut_over.end()
        if hold := Freezer.recall(self.journal.facts.get(HOLD)):
            hold.release()
        self.source.rollback()


def recover(
    unknown: OutcomeUnknown,
    begun: Begun,
    iterations: Sequence[Iteration],
    recovery: Recovery,
) -> MigrationReport:
    """The source's copy is dead: find out about the other, from a new channel.

    Raises:
        OutcomeUnknown: not even that helps within `timeouts.commit_s`.
        MigrationFailed: the source's copy turns out to run.
    """
    listener = recovery.listener
    if begun.transfer is not None:
        begun.transfer.stop()
    if begun.journal.state is State.POST_COPY:
        raise unknown  # New channels were tried, and for longer.
    listener(Recovering(unknown.message))
    deadline = time.monotonic() + recovery.config.timeouts.commit_s
    while True:
        try:
            recovered = recovery.recover(begun.journal.id, begun.journal)
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
        iterations=list(iterations),
        restored_pid=recovered.pid,
        warnings=[f"finished by a recovery, after: {unknown.message}", *recovered.warnings],
    )
    if begun.cut_over is not None:
        report.downtime_ms = begun.cut_over.frozen_for_ms()
        if iterations:
            report.expected_freeze_ms = iterations[-1].expected_freeze_ms
        report.freeze = begun.cut_over.freeze
        report.files_copied = begun.cut_over.files_sent
    for warning in report.warnings:
        listener(Warned(warning))
    return report
