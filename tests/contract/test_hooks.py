"""Lifecycle hooks in a whole move: which run, where, in which order, and what a veto does."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from phaul_runtime.cutover.cutover import CutOver
from phaul_runtime.cutover.journal import Journal
from phaul_runtime.cutover.states import Role, State, Verdict
from phaul_runtime.errors import CheckFailed, MigrationFailed
from phaul_runtime.events import Checked, Warned
from phaul_runtime.hooks.lifecycle import EVENTS, Hooks
from phaul_runtime.recovery.resolve import Settler
from phaul_runtime.source.migration import Migration
from phaul_runtime.system import proc
from phaul_runtime.testing import Place
from phaul_runtime.testing.bench import NoCriu
from phaul_runtime.testing.fake import FakeSource
from tests.contract.wholemove import WholeMove

ALL_ROLES = ("source", "destination")
ALL = {event: [["sh", "-c", 'echo "$PHAUL_EVENT $PHAUL_ROLE" >> "$OUT"']] for event in EVENTS}


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    return tmp_path / "out"


def test_a_move_that_succeeds(whole: WholeMove, out: Path) -> None:
    whole.here = whole.there = ALL
    report = whole.run()
    assert report.result == "moved"
    assert whole.lives(Place.DESTINATION)
    said = out.read_text().splitlines()
    # What follows the commit runs on both hosts at once.
    assert said[:6] == [
        "pre_check source", "pre_check destination", "pre_freeze source", "frozen source",
        "frozen destination", "post_restore destination",
    ]  # fmt: skip
    assert sorted(said[6:]) == ["committed destination", "committed source"]
    assert 0 < report.freeze["hooks_ms"] <= report.freeze["dump_ms"] + report.freeze["files_ms"]


def test_without_hooks_no_process_is_started_in_the_freeze(
    whole: WholeMove, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(argv: object, **_: object) -> None:
        raise AssertionError(f"{argv} was run")

    monkeypatch.setattr(proc, "run", run)
    report = whole.run()
    assert report.result == "moved"
    assert "hooks_ms" not in report.freeze


@pytest.mark.parametrize(
    ("event", "role"),
    [
        ("pre_check", "source"), ("pre_check", "destination"), ("pre_freeze", "source"),
        ("frozen", "source"), ("frozen", "destination"), ("post_restore", "destination"),
    ],
)  # fmt: skip
def test_a_veto(whole: WholeMove, out: Path, event: str, role: str) -> None:
    no = ["sh", "-c", "echo not now >&2; exit 3"]
    whole.here = whole.there = ALL
    mine = {**ALL, event: [no]}
    if role == "source":
        whole.here = mine
    else:
        whole.there = mine
    error = whole.fail()
    assert f"hook {event}: sh ended with 3" in str(error)
    assert "not now" in str(error)
    assert error.host == ("here" if role == "source" else "there")
    assert whole.lives(Place.SOURCE)
    assert not whole.lives(Place.DESTINATION)
    said = out.read_text().splitlines()
    if event == "pre_check":
        # Nothing was begun: there is nothing to roll back, and no migration at the destination.
        assert isinstance(error, CheckFailed)
        assert error.exit_code == 3
        assert "on_rollback source" not in said
        assert said[-1] == "on_failure source"
        levels = [
            e.level for e in whole.events if isinstance(e, Checked) and e.check == "pre-check"
        ]
        assert levels[-1] == "refused"
    else:
        assert isinstance(error, MigrationFailed)
        assert error.exit_code == 4
        assert said[-4:] == [
            "on_rollback source", "on_rollback destination", "on_failure destination",
            "on_failure source",
        ]  # fmt: skip
    assert not any(line.startswith("committed") for line in said)


def test_a_veto_before_the_checks_can_be_overridden(whole: WholeMove) -> None:
    whole.here = whole.there = {"pre_check": [["false"]]}
    assert whole.run(checks={"ignore": ["pre-check"]}).result == "moved"


def test_what_on_failure_is_told(
    whole: WholeMove, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = f"cat > {tmp_path}/$PHAUL_ROLE.json; env | grep ^PHAUL_ > {tmp_path}/$PHAUL_ROLE.env"
    whole.here = whole.there = {"on_failure": [["sh", "-c", keep], ["sh", "-c", "exit 1"]]}
    whole.refuse_to_hold(monkeypatch)
    assert "no room" in whole.fail().message
    told = {role: json.loads((tmp_path / f"{role}.json").read_text()) for role in ALL_ROLES}
    assert whole.migration is not None
    common = {"schema": 1, "event": "on_failure", "id": whole.migration.id, "engine": "fake",
              "target": whole.target, "pid": None, "result": "failed"}  # fmt: skip
    source = {"role": "source", "peer": "ssh://root@there", "error": "no room"}
    assert told["source"] == {**common, **source}
    there = {
        "role": "destination",
        "peer": os.uname().nodename,
        "error": "the source called it off",
    }
    assert told["destination"] == {**common, **there}
    environment = (tmp_path / "source.env").read_text().splitlines()
    assert "PHAUL_RESULT=failed" in environment
    assert "PHAUL_ERROR=no room" in environment
    assert "PHAUL_PID=" in environment
    # Its own failure changes nothing any more.
    assert any(isinstance(e, Warned) and "hook on_failure: sh" in e.text for e in whole.events)


def test_on_failure_runs_when_the_destination_was_never_reached(
    whole: WholeMove, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object) -> None:
        raise CheckFailed("nobody is there")

    whole.here = ALL
    monkeypatch.setattr(whole, "open", unreachable)
    whole.fail()
    assert out.read_text() == "on_failure source\n"


def test_a_command_that_makes_no_sense_is_no_failed_move(whole: WholeMove, out: Path) -> None:
    whole.here = ALL
    whole.fail(transport={"to": "nowhere"})
    assert not out.exists()


def test_a_dry_run_asks_and_tells_nobody_else(whole: WholeMove, out: Path) -> None:
    whole.here = whole.there = ALL
    Migration(whole.config(), whole.target, wiring=whole.wiring).run(dry_run=True)
    whole.here = {**ALL, "pre_check": [["false"]]}
    with pytest.raises(CheckFailed):
        Migration(whole.config(), whole.target, wiring=whole.wiring).run(dry_run=True)
    assert out.read_text().splitlines() == ["pre_check source", "pre_check destination"]
    refused = Migration(whole.config(), whole.target, wiring=whole.wiring).check()
    assert [found.finding.check for found in refused] == ["pre-check"]


def test_an_event_has_its_own_time(whole: WholeMove) -> None:
    whole.here = {"frozen": [["sleep", "30"]], "timeouts": {"frozen": 0.2}}
    assert "hook frozen: sleep did not end within 0.2 s" in whole.fail().message
    assert whole.lives(Place.SOURCE)


@pytest.mark.parametrize("vetoes", [False, True])
def test_an_engine_that_does_not_tell_when_it_stands_still(
    whole: WholeMove, out: Path, monkeypatch: pytest.MonkeyPatch, vetoes: bool
) -> None:
    monkeypatch.setattr(CutOver, "stopped", lambda _: None)
    if vetoes:
        whole.here = {"frozen": [["false"]]}
        assert "hook frozen: false ended with 1" in whole.fail().message
        assert whole.lives(Place.SOURCE)
        return
    whole.here = ALL
    assert "hooks_ms" in whole.run().freeze
    assert out.read_text().splitlines().count("frozen source") == 1


def test_a_recovery_that_undoes_a_move_tells_of_the_failure(whole: WholeMove, out: Path) -> None:
    # A command that was killed: its journal is all that is left of it.
    state_dir, name = whole.tmp_path / "state", "1f" * 8
    with Journal.create(state_dir, name, Role.SOURCE) as journal:
        source = FakeSource(whole.target)
        source.inspect()
        journal.enter(
            State.ITERATING, engine="fake", target=whole.target, to="ssh://root@there",
            options={}, identity=dict(source.identity()), lost_s=30.0,
        )  # fmt: skip
    settler = Settler(state_dir, whole.tmp_path / "work", NoCriu(), Hooks(ALL), whole.wiring.engine)
    assert settler.settle(name, Role.SOURCE, Verdict.DISCARD).warnings == ()
    assert out.read_text().splitlines() == ["on_rollback source", "on_failure source"]
