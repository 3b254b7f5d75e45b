"""PhaulClient: iterate while the tree runs, then hand over to the engine."""

from __future__ import annotations

import os
import socket
import time
from contextlib import AbstractContextManager, nullcontext

from phaul_runtime.criu.session import Criu, criu_opts
from phaul_runtime.criu.stats import read_dump_stats
from phaul_runtime.errors import Cancelled, CriuError, NotConverging, PhaulError
from phaul_runtime.events import (
    IterationDone,
    IterationStarted,
    Listener,
    PreCopySkipped,
    Warned,
    guarded,
    nobody,
)
from phaul_runtime.library.api import Outcome, PhaulConfig, PhaulLocal, PhaulRemote
from phaul_runtime.library.policy import BudgetPolicy, Decision, Policy, Round, decide_braking
from phaul_runtime.library.throttle import Throttle
from phaul_runtime.memory.image_dirs import ImageDirs, keep_page_maps
from phaul_runtime.report import Iteration, MigrationReport
from phaul_runtime.system.cancel import Cancellation

LOG_FILE = "pre-dump.log"
PRE_COPY, POST_COPY, HYBRID = MODES = ("pre-copy", "post-copy", "hybrid")


class PhaulClient:
    """Moves the tree of `config.pid` through `remote` and `local`.

    Args:
        local: the engine's way to switch over.
        remote: the way to the destination's PhaulServer.
        config: root pid, memory socket, private directory.
        policy: when to stop iterating; a budget of 300 ms by default.
        if_not_converging: `proceed` or `abort`, when the policy ends without meeting its budget.
        throttle: slows the target before it comes to that; undone when `migrate` ends, however it
            does. The cut-over may lift it in the freeze.
        mode: `pre-copy`; `post-copy`: no rounds; `hybrid`: rounds, and then, as with post-copy,
            `local` leaves the contents of lazy pages at the source, to be served afterwards.
        criu: a session factory; by default the `criu` on PATH.
        listener: told of everything that happens.
        cancellation: asked between steps; a request also cuts the memory channel, on which CRIU
            gives up and lets the tree run.
        log_level: of CRIU's logs, 0 to 4.
    """

    def __init__(
        self,
        local: PhaulLocal,
        remote: PhaulRemote,
        config: PhaulConfig,
        *,
        policy: Policy | None = None,
        if_not_converging: str = "proceed",
        throttle: Throttle | None = None,
        mode: str = PRE_COPY,
        criu: Criu | None = None,
        listener: Listener = nobody,
        cancellation: Cancellation | None = None,
        log_level: int = 4,
    ) -> None:
        self.local = local
        self.remote = remote
        self.config = config
        self.policy: Policy = policy or BudgetPolicy()
        self.if_not_converging = if_not_converging
        self.throttle = throttle
        self.mode = mode
        self.criu = criu or Criu()
        self.listener = guarded(listener)
        self.cancellation = cancellation or Cancellation()
        self.log_level = log_level
        self._dirs = ImageDirs(config.wdir)
        self._begun = False

    def migrate(self) -> MigrationReport:
        """Run the pre-copy rounds and the switch-over.

        After a failure it may be called again, if `remote.end_chain` is implemented: it then
        begins with all of memory. A failed final dump has reset the kernel's dirty tracking, and
        what only that dump knew of would be lost with no error.

        Returns:
            what was measured; `result` is "moved".

        Raises:
            UsageError: it is called again and `remote` cannot begin anew.
            MigrationFailed: and its kin: the source's copy runs on.
            OutcomeUnknown: the source's copy is dead, the destination's not known to run.
            Cancelled: on request, before the cut-over.
        """
        with self.throttle or nullcontext():
            return self._migrate()

    def _migrate(self) -> MigrationReport:
        begun = time.monotonic()
        if self._begun:
            # The last round may have been the final dump alone, which only the remote has.
            self.remote.end_chain()
            self._dirs.end_chain()
        self._begun = True
        iterations, converged, pre_copy = self._iterate()
        self.cancellation.check()
        last = self._dirs.last
        with self._memory_cut_on_request():
            if self.mode == PRE_COPY:
                self.remote.start_iter()
            else:
                keep_page_maps(last, self.remote.start_local())
            outcome = self._hand_over(None if last is None else str(last)) or Outcome()
        report = MigrationReport(
            result="moved",
            iterations=iterations,
            converged=converged,
            pre_copy=pre_copy,
            expected_freeze_ms=iterations[-1].expected_freeze_ms if iterations else None,
            throttled_to=self.throttle.share if self.throttle else None,
            downtime_ms=outcome.downtime_ms,
            freeze=dict(outcome.freeze),
            restored_pid=outcome.restored_pid,
            final_pages_written=outcome.pages_written,
            final_pages_skipped=outcome.pages_skipped,
            warnings=list(outcome.warnings),
        )
        report.bytes_transferred = (
            sum(i.bytes for i in iterations) + outcome.pages_written * 4096 + outcome.extra_bytes
        )
        try:
            self.remote.stop_iter()
        except PhaulError as error:
            # Too late to matter: the destination's copy runs already.
            report.warnings.append(f"the last page server did not end well: {error.message}")
        report.total_ms = (time.monotonic() - begun) * 1000
        return report

    def _hand_over(self, last_images: str | None) -> Outcome | None:
        try:
            return self.local.dump_copy_restore(self.criu, self.config, last_images)
        except PhaulError as error:
            self._raise_cause(error)
            raise

    def _raise_cause(self, error: PhaulError) -> None:
        """This side's CRIU sees only its channel closed: raise why, if that is known."""
        if isinstance(error, Cancelled):
            return
        if self.cancellation.requested:
            raise Cancelled("cancelled; the source's copy runs on") from error
        if isinstance(error, CriuError) and not error.host:
            there = self.remote.failure()
            if there is not None:
                raise there from error

    def _iterate(self) -> tuple[list[Iteration], bool, str]:
        """Pre-dump until the policy has enough; returns rounds, convergence, and what was done."""
        if self.mode == POST_COPY:
            return [], True, "none: post-copy"
        if not self.criu.feature_check().mem_track:
            reason = "this kernel has no dirty tracking (CONFIG_MEM_SOFT_DIRTY)"
            self.listener(PreCopySkipped(reason))
            return [], True, f"none: {reason}"
        rounds: list[Round] = []
        iterations: list[Iteration] = []
        started_before: float | None = None
        while True:
            self.cancellation.check()
            number = len(rounds) + 1
            self.listener(IterationStarted(number))
            started = time.monotonic()
            images = self._one_round()
            duration = time.monotonic() - started
            stats = read_dump_stats(images)
            interval = None if started_before is None else started - started_before
            started_before = started
            rounds.append(Round(stats.pages_written, stats.pages_skipped, duration, interval))
            decision = decide_braking(self.policy, rounds, self.throttle)
            iterations.append(
                Iteration(
                    pages_written=stats.pages_written,
                    pages_skipped=stats.pages_skipped,
                    bytes=rounds[-1].bytes,
                    duration_ms=duration * 1000,
                    frozen_ms=stats.frozen_s * 1000,
                    expected_freeze_ms=decision.expected_freeze_ms,
                )
            )
            self._tell(number, iterations[-1], decision)
            if not decision.go_on:
                return iterations, decision.converged, decision.reason

    def _tell(self, number: int, done: Iteration, decision: Decision) -> None:
        self.listener(
            IterationDone(
                number=number,
                pages_written=done.pages_written,
                pages_skipped=done.pages_skipped,
                bytes=done.bytes,
                duration_ms=done.duration_ms,
                expected_freeze_ms=decision.expected_freeze_ms,
                go_on=decision.go_on,
                reason=decision.reason,
            )
        )
        if decision.go_on or decision.converged or self.mode != PRE_COPY:
            return
        if self.if_not_converging == "abort":
            raise NotConverging(
                f"pre-copy does not meet the budget: {decision.reason}",
                hint="raise policy.max_downtime_ms, or set policy.if_not_converging to proceed or "
                "throttle",
            )
        self.listener(Warned(f"pre-copy did not meet the budget: {decision.reason}; proceeding"))

    def _one_round(self) -> str:
        """One pre-dump into a new directory; returns it. The page server was awaited."""
        with self._memory_cut_on_request():
            self.remote.start_iter()
            directory = self._dirs.open_next()
            try:
                opts = criu_opts(
                    pid=self.config.pid,
                    images_dir_fd=directory,
                    log_level=self.log_level,
                    log_file=LOG_FILE,
                    track_mem=True,
                    parent_img=self._dirs.parent,
                )
                opts.ps.fd = self.config.memfd
                self.criu.pre_dump(opts)
            except PhaulError as error:
                self._raise_cause(error)
                raise
            finally:
                os.close(directory)
            self.remote.stop_iter()
        return str(self._dirs.last)

    def _memory_cut_on_request(self) -> AbstractContextManager[None]:
        """A request to cancel cuts the memory channel: CRIU then gives up by itself."""
        return self.cancellation.interrupt_with(self._cut_memory)

    def _cut_memory(self) -> None:
        channel = socket.socket(fileno=os.dup(self.config.memfd))
        try:
            channel.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it is cut already
        finally:
            channel.close()
