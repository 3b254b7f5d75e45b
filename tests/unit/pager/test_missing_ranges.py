"""Missing pages against a model that knows each page by itself."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from phaul_runtime.pager.missing_ranges import MissingRanges

P = 4096
SPAN = 64
places = st.integers(0, SPAN)
sizes = st.integers(0, SPAN // 2)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("drop"), places, sizes, st.just(0)),
        st.tuples(st.just("move"), places, sizes, places),
    ),
    max_size=12,
)


def build(pages: set[int]) -> tuple[MissingRanges, dict[int, int]]:
    model = {page: 1000 + page for page in pages}
    runs: list[list[int]] = []
    for page in sorted(pages):
        # Every eighth begins a run anew: neighbours need not be one run.
        if runs and runs[-1][1] == page and page % 8:
            runs[-1][1] += 1
        else:
            runs.append([page, page + 1])
    space = MissingRanges(
        [run[0] * P for run in runs],
        [run[1] * P for run in runs],
        [(1000 + run[0]) * P for run in runs],
    )
    return space, model


def as_pages(space: MissingRanges) -> dict[int, int]:
    pages = {}
    before = -1
    for start, end, source in space.runs():
        assert before <= start < end
        before = end
        for at in range(0, end - start, P):
            pages[(start + at) // P] = (source + at) // P
    return pages


@given(st.sets(st.integers(0, SPAN)), steps)
def test_as_the_model(pages: set[int], steps: list[tuple[str, int, int, int]]) -> None:
    space, model = build(pages)
    for kind, start, size, to in steps:
        child, before = space.copy(), dict(model)
        moved = {page: model.pop(page) for page in range(start, start + size) if page in model}
        if kind == "drop":
            assert space.drop(start * P, (start + size) * P) == len(moved) * P
        elif to + size <= start or start + size <= to:
            gone = space.move(start * P, to * P, size * P)
            assert gone == P * len(model.keys() & range(to, to + size))
            for page in range(to, to + size):
                model.pop(page, None)
            model.update((page + to - start, source) for page, source in moved.items())
        else:
            model.update(moved)
        assert as_pages(space) == model
        assert as_pages(child) == before
        assert space.missing == len(model) * P
        assert bool(space) == bool(model)
    for page in range(2 * SPAN):
        found = space.find(page * P)
        assert (found is not None) == (page in model)
        if found is not None:
            assert found[1] == model[page] * P


@given(st.sets(st.integers(0, SPAN)), places, sizes)
@example({0, 1}, 1, 0)
def test_what_is_missing_between(pages: set[int], start: int, size: int) -> None:
    space, model = build(pages)
    inside = sorted(model.keys() & range(start, start + size))
    first = space.first(start * P, (start + size) * P)
    assert first == (inside[0] * P if inside else None)
    found = [
        page
        for low, high in space.between(start * P, (start + size) * P)
        for page in range(low // P, high // P)
    ]
    assert found == inside
