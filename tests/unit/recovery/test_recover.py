"""A recovery from one host: what it makes of what the other one says, or does not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel

from phaul_runtime.config.model import Config
from phaul_runtime.cutover.freezer import FACT as HOLD
from phaul_runtime.cutover.journal import RUNS, Journal, read_records, replay
from phaul_runtime.cutover.states import Role, Settled, Standing, State, Verdict
from phaul_runtime.engine import interface
from phaul_runtime.errors import (
    DestinationError,
    DestinationUnreachable,
    JournalDamaged,
    MigrationFailed,
    OutcomeUnknown,
    PhaulError,
)
from phaul_runtime.recovery import recover as recovery
from phaul_runtime.recovery import resolve
from phaul_runtime.recovery.recover import Recovery

ID = "ab" * 8


class _Options(BaseModel):
    pass


@dataclass
class Here:
    """The source's host: its tree, the cgroup that may hold it, and what was done to both."""

    state_dir: Path
    alive: bool = True
    held: bool = False
    done: list[str] = field(default_factory=list)

    options_model = _Options

    def source(self, *_: object, **__: object) -> Any:
        return SimpleNamespace(
            recall=lambda _: None,
            gone=lambda: not self.alive,
            end_rest=self._do("end_rest"),
            finish=self._do("finish", []),
            rollback=self._do("rollback"),
        )

    def hold(self, facts: Mapping[str, Any] | None) -> Any:
        if not facts:
            return None
        return SimpleNamespace(
            lives=lambda: self.alive,
            frozen=lambda: self.held,
            cut_loose=lambda: None,
            release=self._do("release"),
        )

    def _do(self, what: str, result: Any = None) -> Callable[[], Any]:
        def do() -> Any:
            # What is not done yet when this process is killed, the next recovery does.
            assert self.state not in (State.DONE, State.ABORTED)
            self.done.append(what)
            return result

        return do

    def journal(self, *states: State, **facts: Any) -> None:
        with Journal.create(self.state_dir, ID, Role.SOURCE) as journal:
            for state in (State.ITERATING, State.FROZEN, State.PREPARED, *states):
                journal.enter(
                    state, engine="x", target="1", options={}, identity={}, to="ssh://b", **facts
                )

    @property
    def state(self) -> State | None:
        return replay(read_records(self.state_dir, ID, Role.SOURCE))[0]


class There:
    """The agent of the destination's host."""

    name = "b"

    def __init__(self, here: Here, state: State | None, settled: Settled | PhaulError) -> None:
        self.here, self.standing, self.settled = here, state, settled
        self.asked: list[tuple[Verdict, State | None]] = []

    def look(self, *_: object) -> dict[Role, Standing]:
        return {} if self.standing is None else {Role.DESTINATION: Standing(self.standing)}

    def settle(self, _id: str, role: Role, verdict: Verdict) -> Settled:
        assert role is Role.DESTINATION
        self.asked.append((verdict, self.here.state))
        if isinstance(self.settled, PhaulError):
            raise self.settled
        return self.settled


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    found = Here(tmp_path / "state")
    for module in (recovery, resolve):
        monkeypatch.setattr(module, "Freezer", SimpleNamespace(recall=found.hold))
        monkeypatch.setattr(module, "announce", lambda *_: found._do("announce", [])())
    monkeypatch.setattr(interface, "load_engine", lambda _: found)
    return found


@pytest.fixture
def recover(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., recovery.Recovered]:
    config = Config.model_validate(
        {
            "state_dir": str(here.state_dir),
            "workdir": str(tmp_path / "work"),
            "hooks": {"directory": "/none"},
        }
    )

    def run(there: There | PhaulError, **named: Any) -> recovery.Recovered:
        @contextlib.contextmanager
        def reach(*_: object) -> Iterator[There]:
            if isinstance(there, PhaulError):
                raise there
            yield there

        monkeypatch.setattr(recovery, "reach", reach)
        return Recovery(config, **named).recover(ID)

    return run


AWAY = DestinationUnreachable("no route to host")
HELD = {HOLD: {"held": True}, "final_dir": "/none"}


@pytest.mark.parametrize("held", [False, True])
def test_a_destination_that_cannot_discard_keeps_no_source_waiting(
    here: Here, recover: Callable[..., recovery.Recovered], held: bool
) -> None:
    """Its disk refuses, say: it was never told to run, and nobody else can tell it."""
    here.held = held
    here.journal(State.COMMITTING, **(HELD if held else {}))
    there = There(here, State.PREPARED, DestinationError("cannot write: Input/output error"))
    found = recover(there)
    assert found.verdict is Verdict.DISCARD
    assert there.asked == [(Verdict.DISCARD, State.COMMITTING)]
    assert here.done == (["release"] if held else []) + ["rollback"]
    assert here.state is State.ABORTED
    assert f"recover {ID} there does it" in found.warnings[0]


@pytest.mark.parametrize(
    "error", [OutcomeUnknown("it may run"), JournalDamaged("destination.journal is damaged")]
)
def test_one_that_does_not_know_keeps_it_waiting(
    here: Here, recover: Callable[..., recovery.Recovered], error: PhaulError
) -> None:
    here.held = True
    here.journal(State.COMMITTING, **HELD)
    with pytest.raises(OutcomeUnknown):
        recover(There(here, State.PREPARED, error))
    assert here.done == []
    assert here.state is State.COMMITTING


@pytest.mark.parametrize(
    ("alive", "held", "facts", "says"),
    [
        (True, True, HELD, "the source's copy is frozen and the destination does not answer"),
        (False, False, {}, "the source's copy is dead and the destination does not answer"),
    ],
)
def test_a_source_that_was_given_up_waits_for_a_destination_that_is_away(
    here: Here,
    recover: Callable[..., recovery.Recovered],
    alive: bool,
    held: bool,
    facts: Mapping[str, Any],
    says: str,
) -> None:
    here.alive, here.held = alive, held
    here.journal(State.COMMITTING, **facts)
    with pytest.raises(OutcomeUnknown, match=says):
        recover(AWAY)
    assert here.done == ([] if alive else ["end_rest"])
    assert here.state is State.COMMITTING


def test_one_that_was_not_given_up_waits_for_nobody(
    here: Here, recover: Callable[..., recovery.Recovered]
) -> None:
    here.journal()
    found = recover(AWAY)
    assert found.verdict is Verdict.DISCARD
    assert here.done == ["rollback"]
    assert here.state is State.ABORTED
    assert "the destination was not reached" in found.warnings[0]


def test_one_whose_copy_was_confirmed_needs_no_destination(
    here: Here, recover: Callable[..., recovery.Recovered]
) -> None:
    here.alive = False
    here.journal(State.COMMITTING, **{RUNS: True}, pid=7)
    found = recover(AWAY)
    assert (found.verdict, found.pid) == (Verdict.RUN, 7)
    # An address leaves this host before CRIU's lock on its connections does.
    assert here.done == ["end_rest", "announce", "finish"]
    assert here.state is State.DONE


def test_the_destination_is_settled_first(
    here: Here, recover: Callable[..., recovery.Recovered]
) -> None:
    """Killed in between, a recovery finds the source as it was, and asks again."""
    here.alive = False
    here.journal(State.COMMITTING)
    there = There(here, State.PREPARED, Settled(7))
    assert recover(there).pid == 7
    assert there.asked == [(Verdict.RUN, State.COMMITTING)]
    assert here.state is State.DONE


class Served:
    """The pages of a frozen tree; the last of them comes with `run`."""

    def __init__(self, here: Here, journal: Journal) -> None:
        self.here, self.journal = here, journal

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begin(self, _agent: object) -> None:
        self.here.done.append("begin")

    def run(self) -> None:
        assert self.journal.state is State.POST_COPY
        self.here.done.append("run")

    def stop(self) -> None:
        self.here.done.append("stop")

    def conclude(self, _half: object) -> list[str]:
        self.here.done.append("conclude")
        self.here.alive = False
        self.journal.enter(State.DONE)
        return []


@pytest.mark.parametrize("state", [State.COMMITTING, State.POST_COPY])
@pytest.mark.parametrize("missing", [0, 3])
def test_a_frozen_source_serves_its_pages_before_it_is_ended(
    here: Here,
    recover: Callable[..., recovery.Recovered],
    monkeypatch: pytest.MonkeyPatch,
    state: State,
    missing: int,
) -> None:
    monkeypatch.setattr(recovery, "attend", lambda *_: None)
    monkeypatch.setattr(recovery, "Transfer", lambda _, journal, *__, **___: Served(here, journal))
    here.held = True
    here.journal(State.COMMITTING, *([state] if state is State.POST_COPY else []), **HELD)
    there = There(here, State.COMMITTING, Settled(7, missing=missing))
    found = recover(there)
    assert (found.verdict, found.pid) == (Verdict.RUN, 7)
    assert there.asked == [(Verdict.RUN, state)]
    run = ["run"] if missing else []
    assert here.done == ["begin", "announce", *run, "stop", "conclude"]
    assert here.state is State.DONE


def settler_of(here: Here, tmp_path: Path) -> resolve.Settler:
    nothing: Any = None
    engine: Any = here
    return resolve.Settler(here.state_dir, tmp_path / "work", nothing, engines=lambda _: engine)


def test_a_tree_that_lives_is_not_done_by_a_verdict_alone(here: Here, tmp_path: Path) -> None:
    """Whoever settles it: pages that are missing there, or a copy that was never given up."""
    settler = settler_of(here, tmp_path)
    here.journal(State.COMMITTING, **HELD)
    with pytest.raises(OutcomeUnknown, match="are still here"):
        settler.settle(ID, Role.SOURCE, Verdict.RUN)
    assert (here.state, here.done) == (State.COMMITTING, [])


@pytest.mark.parametrize(
    ("states", "facts", "alive", "verdict", "says"),
    [
        ([State.COMMITTING], {}, True, Verdict.RUN, "was not given up"),
        ([], {}, False, Verdict.RUN, "was not given up"),
        ([State.COMMITTING], {}, False, Verdict.DISCARD, "is dead"),
        ([State.COMMITTING, State.POST_COPY], HELD, True, Verdict.DISCARD, "was told to run"),
    ],
)
def test_a_verdict_that_does_not_fit_what_is_here(
    here: Here,
    tmp_path: Path,
    states: list[State],
    facts: Mapping[str, Any],
    alive: bool,
    verdict: Verdict,
    says: str,
) -> None:
    """An agent may be asked for anything."""
    settler = settler_of(here, tmp_path)
    here.alive = alive
    here.journal(*states, **facts)
    before = here.state
    with pytest.raises(MigrationFailed, match=says):
        settler.settle(ID, Role.SOURCE, verdict)
    assert (here.state, here.done) == (before, [])


def test_pages_that_are_lost_are_told_of(
    here: Here, recover: Callable[..., recovery.Recovered]
) -> None:
    here.alive = False
    here.journal(State.COMMITTING, State.POST_COPY, **HELD)
    found = recover(There(here, State.POST_COPY, Settled(7, missing=3)))
    assert "3 pages of the destination's copy are lost" in found.warnings[0]


def test_a_copy_that_runs_beside_its_source_is_nobodys_to_settle(
    here: Here, recover: Callable[..., recovery.Recovered]
) -> None:
    here.journal(State.COMMITTING)
    there = There(here, State.COMMITTING, Settled(7))
    with pytest.raises(OutcomeUnknown, match="told to run, yet the source's copy lives"):
        recover(there)
    assert (there.asked, here.done) == ([], [])


@pytest.mark.parametrize(("post_copy", "verdict"), [(False, Verdict.RUN), (True, Verdict.DISCARD)])
def test_an_operators_word_that_the_source_is_dead(
    here: Here,
    recover: Callable[..., recovery.Recovered],
    monkeypatch: pytest.MonkeyPatch,
    post_copy: bool,
    verdict: Verdict,
) -> None:
    """A copy that misses pages which nobody has any more would wait for them for ever."""
    with Journal.create(here.state_dir, ID, Role.DESTINATION) as journal:
        for state in (State.ITERATING, State.FROZEN, State.PREPARED):
            journal.enter(state, post_copy=post_copy, workdir="/none", lost_s=-15.0)
    said: list[Verdict] = []

    def settled(_self: object, _id: str, _role: Role, verdict: Verdict) -> Settled:
        said.append(verdict)
        return Settled()

    monkeypatch.setattr(resolve.Settler, "settle", settled)
    with pytest.raises(OutcomeUnknown, match="only the source's host knows"):
        recover(AWAY)
    assert said == []
    assert recover(AWAY, source_is_dead=True).verdict is verdict
    assert said == [verdict]
