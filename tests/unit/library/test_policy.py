"""When to stop iterating."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from phaul_runtime.library.policy import (
    AncestorPolicy,
    BudgetPolicy,
    Decision,
    Round,
    decide_braking,
    estimate_freeze_ms,
)

FIRST = Round(pages_written=25600, pages_skipped=0, duration_s=10.0)  # 10 MiB/s


def later(pages: int, duration_s: float, interval_s: float) -> Round:
    return Round(pages, 25600 - pages, duration_s, interval_s)


def test_the_dirty_rate_is_unknown_after_one_round() -> None:
    decision = BudgetPolicy().decide([FIRST])
    assert estimate_freeze_ms([FIRST]) is None
    assert decision.go_on
    assert decision.expected_freeze_ms is None


def test_a_small_process_needs_no_second_round() -> None:
    assert not BudgetPolicy(max_downtime_ms=300).decide([Round(100, 0, 0.2)]).go_on


def test_nothing_dirtied_ends_it() -> None:
    decision = BudgetPolicy().decide([FIRST, later(0, 0.5, 10)])
    assert (decision.go_on, decision.converged) == (False, True)


def test_the_estimate_is_fixed_cost_plus_dirty_pages() -> None:
    # 2560 pages = 10 MiB in 10 s of dirtying; the round took 2 s: 1 s of transfer, 1 s fixed.
    # By the final dump 2 s have passed: 2 MiB are dirty, 0.2 s at 10 MiB/s.
    estimate = estimate_freeze_ms([FIRST, later(2560, 2.0, 10.0)])
    assert estimate is not None
    assert abs(estimate - 1200) < 1


def test_within_the_budget_it_stops() -> None:
    rounds = [FIRST, later(256, 0.11, 10.0)]
    decision = BudgetPolicy(max_downtime_ms=300).decide(rounds)
    assert (decision.go_on, decision.converged) == (False, True)
    assert "budget of 300 ms" in decision.reason


def test_it_goes_on_while_the_estimate_falls_and_stops_when_it_does_not() -> None:
    policy = BudgetPolicy(max_downtime_ms=10)
    rounds = [FIRST, later(10240, 4.0, 10.0)]
    assert policy.decide(rounds).go_on
    rounds.append(later(4096, 1.6, 4.0))
    assert policy.decide(rounds).go_on
    rounds.append(later(4096, 1.6, 1.6))
    decision = policy.decide(rounds)
    assert (decision.go_on, decision.converged) == (False, False)


def test_the_ancestors_constants() -> None:
    policy = AncestorPolicy()
    assert policy.decide([FIRST]).go_on  # the ancestor itself stops here, by a bug
    assert not policy.decide([FIRST, later(63, 1, 1)]).go_on
    assert policy.decide([FIRST, later(1000, 1, 1), later(1031, 1, 1)]).go_on
    assert not policy.decide([FIRST, later(1000, 1, 1), later(1032, 1, 1)]).go_on
    assert not policy.decide([FIRST, *[later(1000, 1, 1)] * 7]).go_on


ROUNDS = st.lists(
    st.builds(
        Round,
        pages_written=st.integers(0, 1 << 22),
        pages_skipped=st.integers(0, 1 << 22),
        duration_s=st.floats(0.001, 1000),
        interval_s=st.floats(0.001, 1000),
    ),
    min_size=1,
    max_size=12,
)


@given(ROUNDS, st.integers(1, 10_000), st.integers(1, 10))
def test_it_always_ends(rounds: list[Round], budget: int, most: int) -> None:
    decision = BudgetPolicy(budget, most).decide(rounds)
    assert len(rounds) < most or not decision.go_on
    assert decision.expected_freeze_ms is None or decision.expected_freeze_ms >= 0
    assert not (decision.go_on and not decision.converged)


# -- braking -----------------------------------------------------------------------------------

BANDWIDTH = 10 << 20
FIXED_S = 0.02
MOST = 8


class Writer:
    """Dirties pages as fast as its CPU allows: `pages_per_cpu_s` of `hot` different ones."""

    def __init__(self, pages_per_cpu_s: float, *, hot: int = 1 << 20, floor: float = 0.05) -> None:
        self.rate, self.hot, self.floor = pages_per_cpu_s, hot, floor
        self.share = 1.0
        self.steps: list[float] = []

    def slow_down(self) -> float | None:
        if self.share <= self.floor:
            return None
        self.share = max(self.share / 2, self.floor)
        self.steps.append(self.share)
        return self.share


def pre_copy(writer: Writer, policy: BudgetPolicy, *, brake: bool) -> tuple[list[Round], Decision]:
    """Rounds one after another, as a client does them, in simulated time."""
    rounds: list[Round] = []
    dirty, interval = 25600.0, None
    while True:
        pages = int(dirty)
        duration = FIXED_S + pages * 4096 / BANDWIDTH
        rounds.append(Round(pages, 25600 - pages, duration, interval))
        # What is dirtied in this round, before the decision, goes over in the next.
        dirty, interval = min(writer.rate * writer.share * duration, writer.hot), duration
        decision = decide_braking(policy, rounds, writer if brake else None)
        if not decision.go_on:
            return rounds, decision


def test_a_cpu_bound_writer_converges_once_it_is_slowed() -> None:
    policy = BudgetPolicy(max_downtime_ms=300, max_iterations=MOST)
    # As fast as the line: 2560 pages a second.
    _, without = pre_copy(Writer(2560), policy, brake=False)
    assert (without.converged, without.too_hot) == (False, True)
    writer = Writer(2560)
    rounds, decision = pre_copy(writer, policy, brake=True)
    assert decision.converged
    assert decision.expected_freeze_ms is not None
    assert decision.expected_freeze_ms <= 300
    assert writer.steps
    assert len(rounds) <= MOST
    # What is really dirty then fits the budget.
    dirty = writer.rate * writer.share * rounds[-1].duration_s
    assert (FIXED_S + dirty * 4096 / BANDWIDTH) * 1000 <= 300


def test_one_that_never_converges_ends_at_the_floor() -> None:
    writer = Writer(1e9, hot=2560)
    policy = BudgetPolicy(max_downtime_ms=300, max_iterations=20)
    rounds, decision = pre_copy(writer, policy, brake=True)
    assert writer.steps == [0.5, 0.25, 0.125, 0.0625, 0.05]
    assert (decision.go_on, decision.converged) == (False, False)
    assert decision.reason.endswith("cannot be slowed any more")
    assert len(rounds) < 20


def test_pages_that_are_rewritten_all_the_time_are_not_taken_for_a_low_rate() -> None:
    # 2560 pages were dirty after 10 s; they are after 1 s, too.
    policy = BudgetPolicy(max_downtime_ms=300)
    unsure = [FIRST, later(2560, 1.02, 10.0)]
    decision = policy.decide(unsure)
    assert decision.go_on
    assert decision.expected_freeze_ms is not None
    assert decision.expected_freeze_ms < 300
    decision = policy.decide([*unsure, later(2560, 1.02, 1.02)])
    assert (decision.go_on, decision.converged, decision.too_hot) == (False, False, True)
    assert BudgetPolicy(300, 2).decide(unsure).converged


def test_one_that_converges_by_itself_is_not_slowed() -> None:
    writer = Writer(100)
    _, decision = pre_copy(writer, BudgetPolicy(300, MOST), brake=True)
    assert decision.converged
    assert not writer.steps


def test_no_round_more_than_allowed() -> None:
    writer = Writer(1e9, hot=2560)
    rounds, decision = pre_copy(writer, BudgetPolicy(300, 5), brake=True)
    assert len(rounds) == 5
    assert not decision.converged
    assert writer.share > writer.floor


def test_where_the_fixed_cost_breaks_the_budget_slowing_is_no_help() -> None:
    writer = Writer(1000)
    _, decision = pre_copy(writer, BudgetPolicy(10, 20), brake=True)
    assert not decision.converged
    assert not writer.steps


def test_a_slow_round_among_large_ones_is_not_taken_for_a_fixed_cost() -> None:
    rounds = [FIRST, later(20000, 10.0, 10.0), later(20000, 6.0, 10.0), later(20000, 5.5, 6.0)]
    decision = BudgetPolicy(2500).decide(rounds)
    assert (decision.go_on, decision.too_hot) == (False, True)


def test_the_ancestors_policy_brakes_too() -> None:
    writer = Writer(2560)
    rounds = [FIRST, later(1000, 1, 1), later(1032, 1, 1)]
    decision = decide_braking(AncestorPolicy(), rounds, writer)
    assert decision.go_on
    assert writer.steps == [0.5]
    assert "slowed to 50% of a CPU" in decision.reason


@given(st.floats(1, 1e7), st.integers(1, 25600), st.integers(1, 1000), st.integers(1, 20))
def test_braking_always_ends(rate: float, hot: int, budget: int, most: int) -> None:
    writer = Writer(rate, hot=hot)
    rounds, decision = pre_copy(writer, BudgetPolicy(budget, most), brake=True)
    assert len(rounds) <= most
    expected = decision.expected_freeze_ms
    met = expected is not None and expected <= budget
    assert decision.converged == (met or rounds[-1].pages_written == 0)
