"""What of a file is here, and what a sweep finds of it."""

from __future__ import annotations

import ctypes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phaul_runtime.pager.missing_ranges import MissingRanges
from phaul_runtime.pager.network_pages import SWEEP, NetworkPages, Sweep, found_missing
from phaul_runtime.pager.task import Task

P = 4096
BASE = 1 << 40
FLAGS = st.lists(st.booleans(), min_size=1, max_size=40)


def mapped(here: list[bool]) -> tuple[NetworkPages, ctypes.Array[ctypes.c_char]]:
    kept = ctypes.create_string_buffer(bytes(here), len(here))
    return NetworkPages(BASE, ctypes.addressof(kept), len(here), 0), kept


def fill(sweep: Sweep, tasks: list[Task], remote: NetworkPages | None, now: float) -> list[int]:
    """Everything that is found until it rests: addresses of pages."""
    filled: list[int] = []
    while not sweep.rest(now):
        found = sweep.next(tasks, remote, now)
        if found is None:
            continue
        index, start, end, source = found
        if start == end:
            tasks[index].fd = -1
            continue
        end = min(end, start + 2 * P)
        if remote is not None and remote.holds(source):
            assert remote.here(source, end - start) == end - start
        filled += range(start, end, P)
        tasks[index].space.drop(start, end)
    return filled


@given(FLAGS, st.data())
def test_pieces_of_a_map(here: list[bool], data: st.DataObject) -> None:
    remote, _kept = mapped(here)
    first = data.draw(st.integers(0, len(here) - 1))
    count = data.draw(st.integers(1, len(here) - first))
    part = here[first : first + count]
    lacking = part.index(True) if True in part else count
    assert remote.lacking(BASE + first * P, count * P) == lacking * P
    present = part.index(False) if False in part else count
    assert remote.here(BASE + first * P, count * P) == present * P
    assert remote.missing == here.count(False)
    space = MissingRanges([9 * P], [(9 + count) * P], [BASE + first * P])
    want = found_missing(remote, space, 9 * P)
    assert want == (None if part[0] else (first, min(lacking, 32)))
    assert found_missing(remote, space, 8 * P) is None
    assert found_missing(None, space, 9 * P) is None


@given(st.lists(FLAGS, min_size=1, max_size=3), st.lists(st.integers(1, 6), min_size=1))
def test_a_sweep_finds_all_that_is_here_and_nothing_else(
    maps: list[list[bool]], sizes: list[int]
) -> None:
    here = [flag for flags in maps for flag in flags]
    remote, kept = mapped(here)
    tasks, number, expected = [], 0, set()
    for fd, flags in enumerate(maps):
        starts, ends, sources, at, left = [], [], [], 0, len(flags)
        while left:
            count = min(left, sizes[at % len(sizes)])
            # Every third run is not remote at all.
            local = at % 3 == 2
            starts.append((number + at) * P)
            ends.append(starts[-1] + count * P)
            sources.append(number * P if local else BASE + number * P)
            for page in range(count):
                if local or here[number + page]:
                    expected.add(starts[-1] + page * P)
            number, at, left = number + count, at + 1, left - count
        tasks.append(Task(fd, MissingRanges(starts, ends, sources)))
    sweep = Sweep()
    found = fill(sweep, tasks, remote, 100.0)
    # The same address in two tasks may be found in both.
    assert set(found) == expected
    assert sweep.rest(100.0) == pytest.approx(0.05)
    # The rest grows while nothing comes, and is cut short when something does.
    assert fill(sweep, tasks, remote, 101.0) == []
    assert sweep.rest(101.0) > 0.05
    sweep.wake()
    assert sweep.rest(101.0) == pytest.approx(0.05)
    for page in range(len(here)):
        kept[page] = b"\1"
    fill(sweep, tasks, remote, 102.0)
    assert not any(task.space for task in tasks)
    fill(sweep, tasks, remote, 110.0)
    assert all(task.fd < 0 for task in tasks)


def test_very_many_runs_are_looked_at_in_turns() -> None:
    count = 3 * SWEEP
    remote, _kept = mapped([False] * count)
    starts = [number * 2 * P for number in range(count)]
    space = MissingRanges(starts, [at + P for at in starts], [BASE + at // 2 for at in starts])
    sweep, turns, now = Sweep(), 0, 50.0
    while not sweep.rest(now):
        assert sweep.next([Task(1, space)], remote, now) is None
        turns, now = turns + 1, now + 1.0
    assert turns == 4
    # It took 3 seconds: it rests for longer than that.
    assert sweep.rest(now) > 5
