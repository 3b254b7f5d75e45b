"""When to stop iterating."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from phaul_runtime.policy import AncestorPolicy, BudgetPolicy, Round, estimate_freeze_ms

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
