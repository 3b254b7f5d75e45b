"""Damaged journals among others: named and stepped over by all that surveys them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from phaul_runtime.cli.main import cli
from phaul_runtime.config import model as config_module
from phaul_runtime.config.model import load_config
from phaul_runtime.criu.session import Criu
from phaul_runtime.cutover import journal as journal_module
from phaul_runtime.cutover import orphans
from phaul_runtime.cutover.journal import (
    Journal,
    examine,
    forget_old,
    journal_path,
    migration_ids,
    read_records,
)
from phaul_runtime.cutover.journal_format import STEP
from phaul_runtime.cutover.states import Role, State
from phaul_runtime.engine import WARNING, interface
from phaul_runtime.errors import ExitCode, JournalDamaged, NoSuchMigration, PhaulError
from phaul_runtime.preflight.checks import compare_hosts
from phaul_runtime.preflight.host_facts import gather_facts
from phaul_runtime.rpc.codec import from_wire, to_wire
from phaul_runtime.source import idempotent
from tests.movejournals import DEAD, ID, ProcessesEngine, build


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "load_engine", lambda _: ProcessesEngine)
    # The disk is not what this is about.
    monkeypatch.setattr(os, "fdatasync", lambda _: None)
    monkeypatch.setattr(journal_module, "sync_directory", lambda _: None)


GOOD, WAITING, BROKEN = "11" * 8, "22" * 8, "33" * 8


@pytest.fixture(name="state_dir")
def _state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One that is settled, one that waits, one that is damaged."""
    monkeypatch.setattr(config_module, "SYSTEM_CONFIG", tmp_path / "etc.yaml")
    state_dir = tmp_path / "state"
    (tmp_path / "etc.yaml").write_text(
        f"state_dir: {state_dir}\nworkdir: {tmp_path / 'work'}\ntransport: {{to: 'local://'}}\n"
    )
    for migration_id, last in ((GOOD, State.DONE), (BROKEN, State.PREPARED)):
        journal = build(state_dir, Role.SOURCE, last, DEAD)
        journal.close()
        (state_dir / ID).rename(state_dir / migration_id)
    with Journal.create(state_dir, WAITING, Role.SOURCE) as journal:
        journal.enter(State.ITERATING, engine="process", target="9")
    spoil(state_dir)
    return state_dir


def spoil(state_dir: Path) -> Path:
    """A state that there is not, in the middle."""
    path = journal_path(state_dir, BROKEN, Role.SOURCE)
    path.write_bytes(path.read_bytes().replace(b"frozen", b"frozeo"))
    return path


def run(*argv: str) -> Result:
    result = CliRunner().invoke(cli, argv, standalone_mode=False)
    assert result.exception is None or isinstance(result.exception, PhaulError), result.exception
    return result


def rows(*argv: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run(*argv, "--output", "json").stdout.splitlines()]


def test_status_names_it(state_dir: Path) -> None:
    shown = run("status")
    path = journal_path(state_dir, BROKEN, Role.SOURCE)
    assert shown.return_value is None
    (told,) = [line for line in shown.output.splitlines() if line.startswith(f"{BROKEN}: ")]
    assert told.startswith(f"{BROKEN}: {path} is damaged at byte ")
    assert told.endswith(f": phaul-runtime show {BROKEN}")
    found = {row["id"]: row for row in rows("status")}
    assert found.keys() == {WAITING, BROKEN}
    assert (found[BROKEN]["state"], found[BROKEN]["engine"]) == ("damaged", "process")
    assert "damage" not in found[WAITING]
    assert rows("status", BROKEN)[0]["damage"] in told


def test_history_names_it(state_dir: Path) -> None:
    told = run("history").output.splitlines()
    assert len(told) == 5
    assert f"{BROKEN}: {state_dir / BROKEN}/source.journal is damaged at byte" in told[-1]
    assert {row["id"]: row["state"] for row in rows("history")} == {
        GOOD: "done", WAITING: "iterating", BROKEN: "damaged",
    }  # fmt: skip


def test_show_shows_what_can_be_read(state_dir: Path) -> None:
    told = run("show", BROKEN).output.splitlines()
    assert [line.split()[2] for line in told if "  20" in line] == ["iterating", "note", "prepared"]
    assert f"  {state_dir / BROKEN}/source.journal is damaged at byte" in told[3]
    (row,) = rows("show", BROKEN)
    assert [record.get("state") for record in row["source"]] == ["iterating", None]
    assert "is damaged" in row["damage"]["source"]
    assert row["later"]["source"][0]["state"] == "prepared"
    assert "damage" not in rows("show", GOOD)[0]
    with pytest.raises(NoSuchMigration):
        raise run("show", ID).exception or AssertionError


def test_recover_settles_the_others(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def recover(_: object, migration_id: str) -> Any:
        asked.append(migration_id)
        raise JournalDamaged("as if")

    workdir = state_dir.parent / "work"
    for name in (BROKEN, f"out-{BROKEN}", f"out-{GOOD}"):
        (workdir / name).mkdir(parents=True)
    with monkeypatch.context() as patched:
        patched.setattr("phaul_runtime.recovery.recover.Recovery.recover", recover)
        result = run("recover")
    assert result.return_value == ExitCode.UNKNOWN
    assert asked == [WAITING]
    assert f"{BROKEN}: {state_dir / BROKEN}/source.journal is damaged at byte" in result.stderr
    assert f"phaul-runtime show {BROKEN}" in result.stderr
    # Its images may be all that is left.
    assert sorted(path.name for path in workdir.iterdir()) == [BROKEN, f"out-{BROKEN}"]
    found = run("recover", BROKEN).exception
    assert isinstance(found, JournalDamaged)
    assert found.exit_code == ExitCode.UNKNOWN


def test_hello_and_check_name_it(state_dir: Path) -> None:
    workdir = state_dir.parent / "work"
    (line, _) = sorted(orphans.find(workdir, state_dir), key=lambda line: BROKEN not in line)
    facts = gather_facts(str(workdir), str(state_dir), Criu("no-such-criu"))
    assert line in facts.leftovers
    findings = compare_hosts(facts, facts, ("here", "there"))
    texts = [each.finding for each in findings if each.finding.text == line]
    assert [finding.level for finding in texts] == [WARNING, WARNING]


def test_it_is_never_forgotten(state_dir: Path) -> None:
    for _ in range(2):
        forget_old(state_dir, 1)
        assert set(migration_ids(state_dir)) >= {WAITING, BROKEN}


def test_a_move_asked_for_again_is_not_made_again(state_dir: Path) -> None:
    config = load_config(None, {"engine": "process"})
    asked = {"engine": "process", "target": "1", "to": "ssh://root@b"}
    path = journal_path(state_dir, BROKEN, Role.SOURCE)
    with idempotent.claimed(state_dir, BROKEN, wait_s=0), pytest.raises(JournalDamaged):
        idempotent.settled_before(config, BROKEN, asked)
    assert path.exists()
    # A journal that lost all that it said, beside a report of what was done.
    (state_dir / GOOD / "report.json").write_text('{"result": "moved"}')
    path = journal_path(state_dir, GOOD, Role.SOURCE)
    for spoiled in (b"", bytes(STEP), None):
        if spoiled is None:
            path.unlink()
        else:
            path.write_bytes(spoiled)
        with (
            idempotent.claimed(state_dir, GOOD, wait_s=0),
            pytest.raises(JournalDamaged, match="the report beside it says moved"),
        ):
            idempotent.settled_before(config, GOOD, asked)


@pytest.mark.parametrize("data", [b"\xff\xfe", b"[" * 100_000, b"[1]", b'{"iterations": 7}', b""])
def test_wrong_bytes_beside_a_journal(state_dir: Path, data: bytes) -> None:
    (state_dir / GOOD / "report.json").write_bytes(data)
    (state_dir / WAITING / "source.progress").write_bytes(data)
    for argv in (["status"], ["history"], ["show", GOOD], ["status", WAITING]):
        assert run(*argv).exception is None
    config = load_config(None, {"engine": "process"})
    (state_dir / GOOD / "report.json").write_bytes(b'{"result": "moved", "iterations": [7]}')
    report = idempotent.settled_before(
        config, GOOD, {"engine": "process", "target": "1", "to": "ssh://root@b"}
    )
    assert report is not None
    assert report.restored_pid == 4711


def test_one_that_the_disk_does_not_give(state_dir: Path) -> None:
    path = journal_path(state_dir, BROKEN, Role.SOURCE)
    path.unlink()
    path.mkdir()
    with pytest.raises(JournalDamaged, match="cannot be read: Is a directory"):
        read_records(state_dir, BROKEN, Role.SOURCE)
    with pytest.raises(JournalDamaged, match="cannot be read: Is a directory"):
        Journal.open(state_dir, BROKEN, Role.SOURCE)
    assert len(rows("status")) == 2


def test_one_that_is_being_written_is_read_again(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = journal_path(state_dir, WAITING, Role.SOURCE)
    good = path.read_bytes()
    seen = iter([good[:-5], good])
    monkeypatch.setattr(Path, "read_bytes", lambda _: next(seen))
    assert examine(path).damage is None


def test_damage_arrives_from_the_other_host_as_such() -> None:
    error = from_wire(to_wire(JournalDamaged("f is damaged", hint="look")), "b")
    assert isinstance(error, JournalDamaged)
    assert str(error) == "b: f is damaged\n    hint: look"
