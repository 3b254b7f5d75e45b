"""The state table, the journals, and what follows from two of them."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phaul_runtime import leftovers
from phaul_runtime.errors import MigrationFailed, NoSuchMigration, StillUnderWay
from phaul_runtime.journal import (
    Journal,
    forget_old,
    lock_directory,
    migration_ids,
    read_records,
    replay,
    unsettled,
)
from phaul_runtime.states import Role, Standing, State, Verdict, decide, guard

ID = "1f" * 8
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


def test_a_journal_is_read_again_as_it_was_written(tmp_path: Path) -> None:
    with Journal.create(tmp_path, ID, Role.SOURCE) as journal:
        journal.enter(State.ITERATING, engine="process", target="7")
        journal.add("staged", "/a", "/b")
        journal.add("staged", "/ü")
        journal.note(target="8")
        with pytest.raises(StillUnderWay):
            Journal.open(tmp_path, ID, Role.SOURCE, wait_s=0)
        # As after a SIGKILL: the reserve still follows the records.
        assert replay(read_records(tmp_path, ID, Role.SOURCE))[0] is State.ITERATING
        assert unsettled(tmp_path) == []
    assert unsettled(tmp_path) == [(ID, Role.SOURCE, State.ITERATING)]
    with Journal.open(tmp_path, ID, Role.SOURCE) as journal:
        assert journal.state is State.ITERATING
        assert journal.facts["target"] == "8"
        assert journal.facts["staged"] == ["/a", "/b", "/ü"]
        journal.enter(State.FROZEN)
    state, facts = replay(read_records(tmp_path, ID, Role.SOURCE))
    assert (state, facts["engine"]) == (State.FROZEN, "process")
    assert (tmp_path / ID).stat().st_mode & 0o777 == 0o700
    assert (tmp_path / ID / "source.journal").stat().st_mode & 0o777 == 0o600
    with pytest.raises(NoSuchMigration):
        Journal.open(tmp_path, ID, Role.DESTINATION)
    with pytest.raises(MigrationFailed):
        Journal.create(tmp_path, ID, Role.SOURCE)


@given(st.integers(0, 200))
def test_a_record_cut_short_is_as_if_never_written(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    state_dir = tmp_path_factory.mktemp("state")
    with Journal.create(state_dir, ID, Role.SOURCE) as journal:
        journal.enter(State.ITERATING)
        first = journal._end
        journal.enter(State.FROZEN, pid=7)
        end = journal._end
    os.truncate(journal.path, max(first, end - cut))
    with Journal.open(state_dir, ID, Role.SOURCE) as journal:
        # Only the end of line may be missing from a whole record.
        assert journal.state is (State.FROZEN if cut <= 1 else State.ITERATING)
        if cut > 1:
            journal.enter(State.ABORTING)
    assert replay(read_records(state_dir, ID, Role.SOURCE))[0] is not None


def test_the_last_steps_fit_into_a_full_disk(tmp_path: Path) -> None:
    with Journal.create(tmp_path, ID, Role.SOURCE) as journal:
        reserved = journal.path.stat()
        for state in FORWARD:
            journal.enter(state)
        assert journal.path.stat().st_blocks == reserved.st_blocks
        assert reserved.st_blocks * 512 >= 32 << 10


def test_old_settled_migrations_are_forgotten(tmp_path: Path) -> None:
    for number in range(5):
        with Journal.create(tmp_path, f"{number:08x}", Role.SOURCE) as journal:
            journal.enter(State.ITERATING)
            if number:
                journal.enter(State.ABORTING)
                journal.enter(State.ABORTED)
    forget_old(tmp_path, 2)
    assert migration_ids(tmp_path) == ["00000000", "00000003", "00000004"]


def test_leftovers_are_what_nobody_works_in(tmp_path: Path) -> None:
    workdir, state_dir = tmp_path / "work", tmp_path / "state"
    assert leftovers.find(workdir, state_dir) == []
    for name in (f"out-{ID}", f"agent-{ID}", "else"):
        (workdir / name).mkdir(parents=True)
        os.utime(workdir / name, (0, 0))
    lock = lock_directory(workdir / f"agent-{ID}")
    with Journal.create(state_dir, "2e" * 8, Role.DESTINATION) as journal:
        journal.enter(State.ITERATING)
        assert [line.split()[0] for line in leftovers.find(workdir, state_dir)] == [
            f"{workdir}/out-{ID}"
        ]
    assert "phaul-runtime recover 2e2e2e2e" in leftovers.find(workdir, state_dir)[0]
    assert leftovers.sweep(workdir, state_dir) == [workdir / f"out-{ID}"]
    os.close(lock)
    assert leftovers.sweep(workdir, state_dir) == [workdir / f"agent-{ID}"]
    assert [path.name for path in workdir.iterdir()] == ["else"]
