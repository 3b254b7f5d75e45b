"""Which moves may start: limits, order, groups, and how good a schedule comes of it."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phaul_runtime.batch.model import Batch, Move, predecessors
from phaul_runtime.batch.plan import MoveState, Planner


def over(planner: Planner) -> bool:
    return planner.over


def batch(moves: Sequence[Mapping[str, Any]], **keys: Any) -> Batch:
    filled = [
        {"target": "t", "engine": "fake", "from": "ssh://a", "to": "ssh://b", **move}
        for move in moves
    ]
    return Batch.from_json({"moves": filled, **keys})


def names(moves: Any) -> list[str]:
    return [move.name for move in moves]


WIDE = {"total": 100, "per_source": 100, "per_destination": 100}


def test_limits_in_all_per_source_and_per_destination() -> None:
    moves = [
        {"name": f"m{n}", "from": f"ssh://s{n % 4}", "to": f"ssh://d{n % 2}"} for n in range(20)
    ]
    for limits, most in (
        ({**WIDE, "total": 3}, 3),
        ({**WIDE, "per_source": 1}, 4),
        ({**WIDE, "per_destination": 1}, 2),
        (WIDE, 20),
    ):
        assert len(list(Planner(batch(moves, limits=limits)).start())) == most


def test_the_same_host_by_another_user_is_one_host() -> None:
    moves = [
        {"name": "one", "from": "ssh://root@a"},
        {"name": "two", "from": "ssh://a", "to": "local:"},
        {"name": "three", "from": "ssh://c", "to": "ssh://operator@a"},
    ]
    planner = Planner(batch(moves, limits={**WIDE, "per_source": 1}))
    assert names(planner.start()) == ["one", "three"]
    planner = Planner(batch(moves[1:], limits={**WIDE, "per_destination": 1}))
    assert names(planner.start()) == ["two"]


def test_after_waits_for_the_end_and_is_skipped_if_that_failed() -> None:
    moves: list[dict[str, Any]] = [
        {"name": "one"}, {"name": "two", "after": ["one"]}, {"name": "three", "after": ["two"]},
        {"name": "four"}, {"name": "five", "after": ["four"]},
    ]  # fmt: skip
    planner = Planner(batch(moves, limits=WIDE))
    assert sorted(names(planner.start())) == ["four", "one"]
    assert planner.ended("four", MoveState.MOVED) == []
    assert names(planner.start()) == ["five"]
    assert planner.ended("one", MoveState.FAILED) == ["two", "three"]
    assert not over(planner)
    assert planner.ended("five", MoveState.MOVED) == []
    assert over(planner)
    assert planner.states["three"] is MoveState.SKIPPED


def test_groups_have_a_limit_and_may_follow_others() -> None:
    moves: list[dict[str, Any]] = [
        {"name": "db1", "group": "db"}, {"name": "db2", "group": "db"},
        {"name": "web1", "group": "web"}, {"name": "web2", "group": "web"},
        {"name": "alone"}, {"name": "last", "after": ["web"]},
    ]  # fmt: skip
    groups = {"db": {"limit": 1}, "web": {"after": ["db"]}}
    planner = Planner(batch(moves, limits=WIDE, groups=groups))
    assert sorted(names(planner.start())) == ["alone", "db1"]
    planner.ended("db1", MoveState.MOVED)
    assert names(planner.start()) == ["db2"]
    planner.ended("db2", MoveState.MOVED)
    assert names(planner.start()) == ["web1", "web2"]
    planner.ended("web1", MoveState.MOVED)
    assert names(planner.start()) == []
    planner.ended("web2", MoveState.MOVED)
    assert names(planner.start()) == ["last"]


def test_stops_after_failures_and_lets_end_what_runs() -> None:
    moves: list[dict[str, Any]] = [{"name": f"m{n}"} for n in range(6)]
    planner = Planner(batch(moves, limits={**WIDE, "total": 3}, stop_after_failures=2))
    assert len(list(planner.start())) == 3
    planner.ended("m0", MoveState.FAILED)
    assert names(planner.start()) == ["m3"]
    planner.ended("m1", MoveState.CANCELLED)  # counts for nothing
    assert names(planner.start()) == ["m4"]
    planner.ended("m2", MoveState.REFUSED)
    assert names(planner.start()) == []
    assert not over(planner)
    planner.ended("m3", MoveState.MOVED)
    planner.ended("m4", MoveState.MOVED)
    assert over(planner)
    assert planner.states["m5"] is MoveState.WAITING


@pytest.mark.parametrize(
    ("order", "first"),
    [
        # Two of one host fill its places; the third waits: others pass it, or nobody does.
        ("given", ["a0", "a1", "b0"]),
        ("strict", ["a0", "a1"]),
        # The host with the most left goes first.
        ("balanced", ["c0", "c1", "a0"]),
    ],
)
def test_order(order: str, first: list[str]) -> None:
    moves = [{"name": f"a{n}", "from": "ssh://a", "to": f"ssh://x{n}"} for n in range(3)]
    moves += [{"name": "b0", "from": "ssh://b", "to": "ssh://y"}]
    moves += [{"name": f"c{n}", "from": "ssh://c", "to": f"ssh://z{n}"} for n in range(6)]
    limits = {"total": 3, "per_source": 2, "per_destination": 9}
    assert names(Planner(batch(moves, limits=limits, order=order)).start()) == first


def test_strict_does_not_pass_one_that_waits_for_another() -> None:
    moves: list[dict[str, Any]] = [
        {"name": "one"},
        {"name": "two", "after": ["one"]},
        {"name": "three"},
    ]
    planner = Planner(batch(moves, limits=WIDE, order="strict"))
    assert names(planner.start()) == ["one"]
    assert not over(planner)
    planner.ended("one", MoveState.MOVED)
    assert names(planner.start()) == ["two", "three"]


def test_what_was_at_its_end_before_is_not_started_again() -> None:
    moves: list[dict[str, Any]] = [
        {"name": "one"}, {"name": "two", "after": ["one"]},
        {"name": "three"}, {"name": "four", "after": ["three"]},
    ]  # fmt: skip
    before = {"one": MoveState.MOVED, "three": MoveState.REFUSED}
    planner = Planner(batch(moves, limits=WIDE), before)
    assert names(planner.start()) == ["two"]
    assert planner.states["four"] is MoveState.SKIPPED


# -- whatever the batch ------------------------------------------------------------------------


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    count = draw(st.integers(1, 25))
    hosts = st.sampled_from(["ssh://a", "ssh://b", "ssh://c", "local:"])
    groups: dict[str, Any] = draw(
        st.dictionaries(
            st.sampled_from(["g", "h"]), st.fixed_dictionaries({"limit": st.integers(1, 3)})
        )
    )
    moves = []
    for number in range(count):
        after = (
            draw(st.lists(st.integers(0, number - 1), max_size=3, unique=True)) if number else []
        )
        moves.append(
            {
                "name": f"m{number}", "target": f"t{number}", "from": draw(hosts),
                "to": draw(hosts), "after": [f"m{each}" for each in after],
                "group": draw(st.sampled_from([None, *groups])),
            }
        )  # fmt: skip
    limit = st.integers(1, 5)
    return batch(
        moves,
        groups=groups,
        limits={"total": draw(limit), "per_source": draw(limit), "per_destination": draw(limit)},
        order=draw(st.sampled_from(["balanced", "given", "strict"])),
    )


def simulate(
    wanted: Batch,
    seconds: Callable[[str], float],
    end: Callable[[str], MoveState] = lambda _: MoveState.MOVED,
    look: Callable[[list[Move]], None] = lambda _: None,
) -> tuple[Planner, float]:
    """The whole batch on a clock of its own; the planner, and when the last move ended."""
    planner = Planner(wanted)
    running: list[tuple[float, str, Move]] = []
    now = 0.0
    while not planner.over:
        for move in planner.start():
            heapq.heappush(running, (now + seconds(move.name), move.name, move))
        assert running, "nothing runs and nothing starts"
        look([each[-1] for each in running])
        now, name, _ = heapq.heappop(running)
        planner.ended(name, end(name))
    return planner, now


@settings(max_examples=200, deadline=None)
@given(batches(), st.randoms(use_true_random=False))
def test_limits_and_order_hold_at_every_moment(wanted: Batch, draw: random.Random) -> None:
    before = predecessors(wanted)
    state: dict[str, MoveState] = {}

    def end(name: str) -> MoveState:
        state[name] = draw.choice([MoveState.MOVED] * 4 + [MoveState.FAILED])
        return state[name]

    def look(running: list[Move]) -> None:
        limits = wanted.limits
        assert len(running) <= limits.total
        assert max(Counter(m.source_host for m in running).values()) <= limits.per_source
        assert max(Counter(m.destination_host for m in running).values()) <= limits.per_destination
        for group, count in Counter(m.group for m in running if m.group).items():
            assert count <= (wanted.groups[group].limit or count)
        for move in running:
            assert all(state.get(each) is MoveState.MOVED for each in before[move.name])

    planner, _ = simulate(wanted, lambda _: draw.uniform(0.1, 2), end, look)
    for name, became in planner.states.items():
        if became is MoveState.SKIPPED:
            assert any(
                planner.states[each] in (MoveState.FAILED, MoveState.SKIPPED)
                for each in before[name]
            )
        else:
            assert became is state[name]


@settings(max_examples=50, deadline=None)
@given(batches(), st.integers(0, 10), st.randoms(use_true_random=False))
def test_one_that_is_taken_up_again_finishes_the_same(
    wanted: Batch, ends: int, draw: random.Random
) -> None:
    planner = Planner(wanted)
    running: list[str] = []
    for _ in range(ends):
        running += names(planner.start())
        if not running:
            break
        planner.ended(running.pop(draw.randrange(len(running))), MoveState.MOVED)
    done = {name: state for name, state in planner.states.items() if state is MoveState.MOVED}
    again = Planner(wanted, done)
    while not again.over:
        for name in names(again.start()):
            assert name not in done
            again.ended(name, MoveState.MOVED)
    assert set(again.states.values()) == {MoveState.MOVED}


def lower_bound(wanted: Batch, seconds: Callable[[str], float]) -> float:
    """No schedule within the limits is shorter."""
    limits = wanted.limits
    work, sources, destinations = 0.0, Counter[str](), Counter[str]()
    for move in wanted.moves:
        work += seconds(move.name)
        sources[move.source_host] += seconds(move.name)  # type: ignore[assignment]
        destinations[move.destination_host] += seconds(move.name)  # type: ignore[assignment]
    return max(
        work / limits.total,
        max(sources.values()) / limits.per_source,
        max(destinations.values()) / limits.per_destination,
    )


@pytest.mark.parametrize("seed", range(6))
def test_a_thousand_moves_take_little_more_than_the_limits_allow(seed: int) -> None:
    draw = random.Random(seed)
    hosts = draw.randint(4, 40)
    # Some hosts have far more to move than others, and they stand last in the file.
    weights = sorted(draw.paretovariate(1.2) for _ in range(hosts))
    moves = []
    for number in range(1000):
        source = draw.choices(range(hosts), weights)[0]
        moves.append(
            {
                "name": f"m{number}", "from": f"ssh://h{source}",
                "to": f"ssh://h{(source + draw.randrange(1, hosts)) % hosts}",
            }
        )  # fmt: skip
    moves.sort(key=lambda move: int(move["from"][7:]))
    limits = {"total": draw.choice([8, 20, 50]), "per_source": 4, "per_destination": 4}
    wanted = batch(moves, limits=limits)
    lengths = {move.name: draw.uniform(0.5, 1.5) for move in wanted.moves}
    _, took = simulate(wanted, lengths.__getitem__)
    ideal = lower_bound(wanted, lengths.__getitem__)
    assert took <= 1.15 * ideal, f"{took:.1f} s, ideal {ideal:.1f} s"
