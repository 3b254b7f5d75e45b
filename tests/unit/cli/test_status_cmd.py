"""`phaul-runtime status`: what is under way on this host, who works on it, and what to do."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from phaul_runtime.cli.main import cli
from phaul_runtime.config import model as config_module
from phaul_runtime.cutover.journal import Journal
from phaul_runtime.cutover.progress import progress_path, write_progress
from phaul_runtime.cutover.states import Role, State
from phaul_runtime.errors import NoSuchMigration, UsageError

ID = "1f" * 8
OTHER = "2e" * 8
FACTS = {"engine": "runc", "target": "web"}


@pytest.fixture(autouse=True)
def no_system_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "SYSTEM_CONFIG", tmp_path / "etc.yaml")


@pytest.fixture(name="state_dir")
def _state_dir(tmp_path: Path) -> Path:
    (tmp_path / "etc.yaml").write_text(f"state_dir: {tmp_path / 'state'}\n")
    return tmp_path / "state"


def status(*argv: str) -> Result:
    return CliRunner().invoke(cli, ["status", *argv])


def rows(*argv: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in status(*argv, "--output", "json").output.splitlines()]


def begun(state_dir: Path, migration_id: str, role: Role, *states: State) -> Journal:
    journal = Journal.create(state_dir, migration_id, role)
    peer = {"to": "ssh://root@b"} if role is Role.SOURCE else {"peer": "a"}
    journal.enter(State.ITERATING, **FACTS, **peer)
    for state in states:
        journal.enter(state)
    return journal


def post_copy(state_dir: Path, migration_id: str, role: Role) -> Journal:
    """One whose dump is done and whose pages are on their way."""
    late = (State.FROZEN, State.PREPARED, State.COMMITTING, State.POST_COPY)
    return begun(state_dir, migration_id, role, *late)


def test_nothing_is_under_way(state_dir: Path) -> None:
    assert status().output == f"no migration is under way in {state_dir}\n"
    assert status("--output", "json").output == ""
    begun(state_dir, ID, Role.SOURCE, State.ABORTING, State.ABORTED).close()
    assert status().output == f"no migration is under way in {state_dir}\n"
    # One that was made a moment ago, and has not begun.
    Journal.create(state_dir, OTHER, Role.SOURCE).close()
    assert status().output == f"no migration is under way in {state_dir}\n"


def test_one_that_somebody_works_on(state_dir: Path) -> None:
    with begun(state_dir, ID, Role.SOURCE, State.FROZEN) as journal:
        shown = status()
        head, line = shown.output.splitlines()
        assert shown.exit_code == 0
        assert head.split() == [
            "id", "role", "engine", "target", "peer", "state", "since", "worked", "on", "missing",
        ]  # fmt: skip
        words = line.split()
        assert words[:6] == [ID, "source", "runc", "web", "ssh://root@b", "frozen"]
        assert words[8:] == ["yes"]
        (row,) = rows()
        assert row == {
            "id": ID, "role": "source", **FACTS, "peer": "ssh://root@b", "state": "frozen",
            "began": journal.records[0]["time"], "since": journal.records[1]["time"],
            "worked_on": True, "pages": None, "missing": None, "advice": "",
        }  # fmt: skip
        # A note is no step.
        journal.note(pid=7)
        assert rows()[0]["since"] == row["since"]
        # Whoever looks leaves the lock alone.
        assert rows() == [row]


@pytest.mark.parametrize("role", Role)
def test_one_that_nobody_works_on(state_dir: Path, role: Role) -> None:
    begun(state_dir, ID, role, State.FROZEN).close()
    lines = status().output.splitlines()
    assert lines[1].split()[-1] == "no"
    assert lines[2:] == [f"{ID}: nobody works on it: phaul-runtime recover {ID}"]
    (row,) = rows(ID)
    assert (row["worked_on"], row["advice"]) == (False, f"phaul-runtime recover {ID}")


@pytest.mark.parametrize(
    ("role", "advice"),
    [
        (Role.SOURCE, f"phaul-runtime recover {ID}"),
        (Role.DESTINATION, f"phaul-runtime recover {ID} on the source's host, a"),
    ],
)
def test_post_copy(state_dir: Path, role: Role, advice: str) -> None:
    with post_copy(state_dir, ID, role):
        # Nothing was said yet.
        assert status().output.splitlines()[1].split()[-1] == "yes"
        assert rows()[0]["missing"] is None
        write_progress(state_dir, ID, role, pages=32768, missing=1200)
        (line,) = status().output.splitlines()[1:]
        assert line.endswith("yes        1200 of 32768 pages")
        (row,) = rows()
        assert (row["state"], row["pages"], row["missing"]) == ("post-copy", 32768, 1200)
        assert row["advice"] == ""
    *_, line, last = status(ID).output.splitlines()
    assert line.endswith("no         1200 of 32768 pages")
    assert last == f"{ID}: nobody works on it: {advice}"
    assert rows(ID)[0]["advice"] == advice
    # Whatever lies there.
    progress_path(state_dir, ID, role).write_text('{"pages": "x"}')
    assert status().exit_code == 0
    progress_path(state_dir, ID, role).write_text("{")
    assert rows()[0]["pages"] is None


def test_progress_counts_for_post_copy_alone(state_dir: Path) -> None:
    with begun(state_dir, ID, Role.SOURCE):
        write_progress(state_dir, ID, Role.SOURCE, pages=5, missing=2)
        assert rows()[0]["pages"] is None


def test_both_ends_and_several(state_dir: Path) -> None:
    with begun(state_dir, ID, Role.SOURCE), begun(state_dir, ID, Role.DESTINATION):
        begun(state_dir, OTHER, Role.DESTINATION).close()
        found = {(row["id"], row["role"]): row["worked_on"] for row in rows()}
        assert found == {
            (ID, "source"): True, (ID, "destination"): True, (OTHER, "destination"): False,
        }  # fmt: skip
        assert [row["id"] for row in rows(OTHER)] == [OTHER]
        assert len(status(ID).output.splitlines()) == 3


def test_one_that_is_settled(state_dir: Path) -> None:
    end = (State.FROZEN, State.PREPARED, State.COMMITTING, State.DONE)
    begun(state_dir, ID, Role.SOURCE, *end).close()
    shown = status(ID)
    assert shown.exit_code == 0
    assert shown.output == (
        f"{ID} is settled: done at its source; phaul-runtime show {ID} has more\n"
    )
    (row,) = rows(ID)
    assert (row["state"], row["advice"]) == ("done", "")
    assert rows() == []
    # One end of two is not.
    begun(state_dir, ID, Role.DESTINATION).close()
    assert len(status(ID).output.splitlines()) == 3
    assert [row["state"] for row in rows(ID)] == ["done", "iterating"]
    assert [row["state"] for row in rows()] == ["iterating"]


def test_one_that_there_is_not(state_dir: Path) -> None:
    found = status(ID).exception
    assert isinstance(found, NoSuchMigration)
    assert str(state_dir) in str(found)
    assert isinstance(status("../x").exception, UsageError)


def test_history_is_by_beginning_whatever_was_touched_last(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = itertools.count(1_000_000)
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    for each in (OTHER, ID):
        begun(state_dir, each, Role.SOURCE).close()
    write_progress(state_dir, OTHER, Role.SOURCE, pages=1, missing=1)
    shown = CliRunner().invoke(cli, ["history", "--output", "json"]).output.splitlines()
    assert [json.loads(line)["id"] for line in shown] == [OTHER, ID]
