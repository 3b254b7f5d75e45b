"""When to stop iterating: pure functions of what was measured.

Two policies. `BudgetPolicy` asks after each round: with the dirty rate and the bandwidth just
measured, is the expected freeze within the budget? Otherwise go on while the estimate falls.
`AncestorPolicy` has the three constants of the Go library (64 pages, 8 iterations, growth of 32).

Either may be given a `Brake`: where a policy would end because pages are dirtied too fast, the
target is slowed by a step and the rounds go on (`decide_braking`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

PAGE_SIZE = 4096
# An estimate that falls by less than this share from one round to the next no longer converges.
MIN_GAIN = 0.1


@dataclass(frozen=True)
class Round:
    """One pre-dump, measured.

    Attributes:
        pages_written: pages that went over.
        pages_skipped: pages unchanged since the round before.
        duration_s: from the request to the page server's exit.
        interval_s: from the start of the round before to the start of this one; None for the first.
    """

    pages_written: int
    pages_skipped: int
    duration_s: float
    interval_s: float | None = None

    @property
    def bytes(self) -> int:
        """Bytes of memory that went over."""
        return self.pages_written * PAGE_SIZE


@dataclass(frozen=True)
class Decision:
    """Whether to run another round, and why.

    Attributes:
        go_on: run another round.
        reason: one phrase for people.
        expected_freeze_ms: the freeze if it were taken now, as far as the source can know it: the
            fixed cost of a dump plus the transfer of what is dirty by now, without the restore.
        converged: False if iterating ends without having met the budget.
        too_hot: it ends so since pages are dirtied too fast, and another round is allowed: a slower
            target might do.
    """

    go_on: bool
    reason: str
    expected_freeze_ms: float | None
    converged: bool = True
    too_hot: bool = False


class Brake(Protocol):
    """What slows the target; see `throttle.Throttle`."""

    def slow_down(self) -> float | None:
        """Slow it by one step; returns the CPUs left to it, None if it cannot get any slower."""


class Policy(Protocol):
    """Decides after each round; keeps no state, so that it can be asked twice."""

    def decide(self, rounds: Sequence[Round]) -> Decision:
        """Decide with all rounds so far, at least one."""


def estimate_freeze_ms(rounds: Sequence[Round]) -> float | None:
    """Expected freeze after the last of `rounds`, ms; None while the dirty rate is unknown.

    Bandwidth is that of the fastest round (small rounds are all fixed cost); the dirty rate is
    the last round's pages over the time in which they became dirty; by the time of the final
    dump, pages have been dirtied for as long as the last round took. Of a target that was slowed
    before the last round, it is more than the truth: half of what was measured is older.
    """
    parts = _freeze_parts_ms(rounds)
    return None if parts is None else sum(parts)


def _freeze_parts_ms(rounds: Sequence[Round]) -> tuple[float, float] | None:
    """The fixed cost, and the transfer of what is dirty."""
    last = rounds[-1]
    if len(rounds) < 2 or last.interval_s is None or last.interval_s <= 0:
        return None
    bandwidth = max(r.bytes / r.duration_s for r in rounds if r.duration_s > 0)
    if bandwidth <= 0:
        return min(r.duration_s for r in rounds) * 1000, 0.0
    # Small rounds tell it best; where all are large, the fastest of them bounds it from below.
    half = max(r.pages_written for r in rounds) / 2
    small = [r for r in rounds if r.pages_written <= half] or rounds[1:]
    fixed_s = min(max(0.0, r.duration_s - r.bytes / bandwidth) for r in small)
    dirty_bytes = last.bytes / last.interval_s * last.duration_s
    return fixed_s * 1000, dirty_bytes / bandwidth * 1000


@dataclass(frozen=True)
class BudgetPolicy(Policy):
    """Iterate until the expected freeze fits a budget, or no longer falls."""

    max_downtime_ms: float = 300
    max_iterations: int = 8

    def decide(self, rounds: Sequence[Round]) -> Decision:
        last = rounds[-1]
        estimate = estimate_freeze_ms(rounds)
        if last.pages_written == 0:
            return Decision(False, "nothing was dirtied", estimate)
        if estimate is None and last.duration_s * 1000 <= self.max_downtime_ms:
            return Decision(False, "all of memory fits the budget", last.duration_s * 1000)
        within = estimate is not None and estimate <= self.max_downtime_ms
        if within and (len(rounds) >= self.max_iterations or self._sure(rounds)):
            return Decision(False, f"within the budget of {self.max_downtime_ms:g} ms", estimate)
        if len(rounds) >= self.max_iterations:
            return Decision(
                False, f"{self.max_iterations} iterations did not meet the budget", estimate, False
            )
        if within:
            return Decision(True, "in the time of one round more may be dirtied again", estimate)
        if estimate is not None:
            before = estimate_freeze_ms(rounds[:-1]) if len(rounds) > 1 else None
            if before is not None and estimate > before * (1 - MIN_GAIN):
                parts = _freeze_parts_ms(rounds)
                too_hot = parts is not None and parts[0] < self.max_downtime_ms
                return Decision(False, "the estimate no longer falls", estimate, False, too_hot)
            return Decision(True, "the estimate may still fall", estimate)
        return Decision(True, "the dirty rate is not known yet", estimate)

    def _sure(self, rounds: Sequence[Round]) -> bool:
        """Whether the dirty rate holds for as short a time as a round takes.

        A page that is rewritten all the time counts once, however long the time: the rate over a
        long one says too little. All that was dirtied in it is the most that there can be.
        """
        last, parts = rounds[-1], _freeze_parts_ms(rounds)
        if parts is None or last.interval_s is None or last.duration_s * 2 >= last.interval_s:
            return True
        all_of_it = parts[1] * last.interval_s / last.duration_s
        return parts[0] + all_of_it <= self.max_downtime_ms


@dataclass(frozen=True)
class AncestorPolicy(Policy):
    """The constants of go-criu's phaul (client.go), with its comparison mended.

    The ancestor compares the first round with statistics of zero and so always stops after it;
    here the growth is measured from the second round on.
    """

    min_pages: int = 64
    max_iterations: int = 8
    max_growth: int = 32

    def decide(self, rounds: Sequence[Round]) -> Decision:
        last = rounds[-1]
        estimate = estimate_freeze_ms(rounds)
        if last.pages_written < self.min_pages:
            return Decision(False, f"fewer than {self.min_pages} pages", estimate)
        if len(rounds) >= self.max_iterations:
            return Decision(False, f"{self.max_iterations} iterations", estimate, False)
        if len(rounds) > 1:
            growth = last.pages_written - rounds[-2].pages_written
            if growth >= self.max_growth:
                return Decision(False, f"{growth} pages more than before", estimate, False, True)
        return Decision(True, "not yet few pages", estimate)


def decide_braking(policy: Policy, rounds: Sequence[Round], brake: Brake | None) -> Decision:
    """What `policy` says; where it ends because of the dirty rate, brake and go on.

    A step at most for each round, until the budget is met, the brake can do no more, or the policy
    allows no more rounds.
    """
    decision = policy.decide(rounds)
    if brake is None or not decision.too_hot:
        return decision
    share = brake.slow_down()
    if share is None:
        return replace(decision, reason=f"{decision.reason}, and it cannot be slowed any more")
    return Decision(
        True, f"{decision.reason}: slowed to {share:.0%} of a CPU", decision.expected_freeze_ms
    )
