"""The state table, and what follows from two journals."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phaul_runtime.cutover.states import Role, Standing, State, Verdict, decide, guard
from phaul_runtime.errors import MigrationFailed

FORWARD = [State.ITERATING, State.FROZEN, State.PREPARED, State.COMMITTING, State.DONE]
UNDONE = {State.ITERATING, State.FROZEN, State.PREPARED}
LATE = [*FORWARD[:-1], State.POST_COPY, State.DONE]
END = st.none() | st.builds(
    lambda state, how: Standing(state, alive=how == "alive", held=how == "held"),
    st.sampled_from(State),
    st.sampled_from(["dead", "alive", "held"]),
)


def test_the_table_goes_forward_step_by_step_and_back_before_committing() -> None:
    for role in Role:
        for old, new in itertools.product([None, *State], State):
            allowed = (
                (old, new) in itertools.pairwise([None, *FORWARD])
                or (old, new) in itertools.pairwise(LATE)
                or (old in UNDONE and new is State.ABORTING)
                or (old, new) == (State.ABORTING, State.ABORTED)
                or (role, old, new) == (Role.SOURCE, State.COMMITTING, State.ABORTING)
            )
            if allowed:
                guard(role, old, new)
            else:
                with pytest.raises(MigrationFailed):
                    guard(role, old, new)


def histories() -> list[tuple[Standing, Standing]]:
    """Every pair of standings that the order of the cut-over can leave behind."""
    found = []
    for s, d in itertools.product(FORWARD, FORWARD):
        if FORWARD.index(d) > FORWARD.index(State.PREPARED) and s in UNDONE:
            continue  # commit is sent in committing only
        if d in (State.ITERATING, State.FROZEN) and FORWARD.index(s) >= 2:
            continue  # the source went on only after prepared
        if (s, d) == (State.DONE, State.PREPARED):
            continue  # the destination journals before it answers
        for alive in (True, False):
            if alive and (s is State.DONE or FORWARD.index(d) > FORWARD.index(State.PREPARED)):
                continue  # seen dead before
            if not alive and s in UNDONE:
                continue  # CRIU kills only after committing (or it ended by itself)
            found.append((Standing(s, alive), Standing(d)))
    return found


@pytest.mark.parametrize(("source", "destination"), histories())
def test_exactly_one_copy_follows_from_any_two_journals(
    source: Standing, destination: Standing
) -> None:
    decision = decide(source, destination)
    # The source's copy runs if and only if it is alive; the destination's if told to.
    assert decision.verdict is (Verdict.DISCARD if source.alive else Verdict.RUN)


def late_histories() -> list[tuple[Standing, Standing, Verdict]]:
    """The same for post-copy: the source's copy is held from committing on, until all is over."""
    running = (State.COMMITTING, State.POST_COPY, State.DONE)
    found = [
        (Standing(State.COMMITTING, alive=True), Standing(State.PREPARED), Verdict.DISCARD),
        (Standing(State.COMMITTING, held=True), Standing(State.PREPARED), Verdict.DISCARD),
        (Standing(State.DONE), Standing(State.POST_COPY), Verdict.RUN),
        (Standing(State.DONE), Standing(State.DONE), Verdict.RUN),
    ]
    for s, d in itertools.product((State.COMMITTING, State.POST_COPY), running):
        # Or killed by somebody, or gone with its host: the other was told to run all the same.
        found += [(Standing(s, held=held), Standing(d), Verdict.RUN) for held in (True, False)]
    return found


@pytest.mark.parametrize(("source", "destination", "verdict"), late_histories())
def test_exactly_one_copy_in_a_post_copy_move(
    source: Standing, destination: Standing, verdict: Verdict
) -> None:
    assert decide(source, destination).verdict is verdict


def test_a_held_copy_waits_as_long_as_the_other_may_run() -> None:
    for state in (State.COMMITTING, State.POST_COPY):
        assert decide(Standing(state, held=True), None).verdict is Verdict.UNKNOWN
    nowhere = decide(Standing(State.POST_COPY, held=True), Standing(State.PREPARED))
    assert nowhere.verdict is Verdict.UNKNOWN


@given(END, END)
def test_no_two_standings_make_two_copies(
    source: Standing | None, destination: Standing | None
) -> None:
    verdict = decide(source, destination).verdict
    if source is not None and source.alive:
        assert verdict is not Verdict.RUN
    if destination is not None and destination.state in LATE[3:]:
        assert verdict is not Verdict.DISCARD
    if source is not None and source.held and source.state is State.POST_COPY:
        assert verdict is not Verdict.DISCARD
    if verdict is Verdict.RUN:
        assert destination is not None
        assert destination.state not in (State.ITERATING, State.FROZEN, State.ABORTED)


def test_without_the_source_a_prepared_destination_waits() -> None:
    assert decide(None, Standing(State.PREPARED)).verdict is Verdict.UNKNOWN
    assert decide(None, Standing(State.FROZEN)).verdict is Verdict.DISCARD
    assert decide(Standing(State.COMMITTING), None).verdict is Verdict.UNKNOWN
    assert decide(Standing(State.COMMITTING, alive=True), None).verdict is Verdict.DISCARD
