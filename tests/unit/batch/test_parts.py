"""Views, stores, the plan's preflight, and what is missing without the extra."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from phaul_runtime.batch import events as ev
from phaul_runtime.batch.extra import require
from phaul_runtime.batch.model import Batch
from phaul_runtime.batch.outcome import Answer, Attempt
from phaul_runtime.batch.plan import MoveState
from phaul_runtime.batch.preflight import plan, waves
from phaul_runtime.batch.record import BatchRecord
from phaul_runtime.batch.report_html import page
from phaul_runtime.batch.run import summary
from phaul_runtime.batch.store import PostgresStore, SqliteStore, Store, checked_batch_id
from phaul_runtime.batch.view import JsonLines, LiveTable, stage
from phaul_runtime.cli.main import cli
from phaul_runtime.errors import (
    ConfigError,
    NoSuchMigration,
    Refused,
    StillUnderWay,
    UsageError,
)
from phaul_runtime.events import Warned
from phaul_runtime.system.cancel import Cancellation

EVENTS = [
    ev.BatchStarted("b", 4, {"zero": "moved"}),
    ev.MoveStarted("one", "1f", 1, 0, "ssh://a", "ssh://b"),
    ev.MoveStarted("two", "2f", 2, 0, "ssh://a", "ssh://b"),
    ev.MoveTold("one", "1f", {"event": "progress", "number": 2, "bytes": 5 << 20}),
    ev.MoveEnded("two", "failed", "2f", 2, None, "CRIU said no\nmore"),
    ev.MoveEnded("three", "moved", "3f", 1, 12.3, ""),
    ev.MoveRetried("one", "1f", "asked again", "no answer"),
    ev.TakenOver("other", 2),
    Warned("careful"),
    ev.Pausing("asked to stop"),
]


def test_json_lines_leave_out_progress() -> None:
    lines: list[str] = []
    view = JsonLines(lines.append)
    with view:
        for event in EVENTS:
            view(event)
    told = [json.loads(line) for line in lines]
    assert [each["event"] for each in told].count("move_told") == 0
    assert len(told) == len(EVENTS) - 1
    assert told[0]["ended"] == {"zero": "moved"}


def test_the_table_has_what_runs_what_ended_and_the_counts() -> None:
    from rich.console import Console

    view = LiveTable()
    for event in EVENTS:
        view(event)
    console = Console(file=io.StringIO(), width=160)
    console.print(view.table())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "pre-dump 2: 5 MiB" in text
    assert "failed: CRIU said no" in text
    assert "moved, downtime 12 ms" in text
    assert "3 of 4 (1 failed, 2 moved), 1 under way" in text
    assert "asked to stop" in text


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"event": "iteration_started", "number": 1}, "pre-dump 1"),
        (
            {"event": "iteration_done", "number": 1, "expected_freeze_ms": 3.4},
            "pre-dump 1 done, expected freeze 3 ms",
        ),
        ({"event": "filling", "missing": 7}, "runs there, 7 pages to come"),
        ({"event": "serving", "missing": 7}, "runs there, 7 pages still at the source"),
        ({"event": "reconnecting"}, "runs there, waits for its page channel"),
        ({"event": "source_dead"}, "source dead"),
        ({"event": "checked"}, "checks"),
    ],
)
def test_the_stage_of_a_move(told: dict[str, Any], says: str) -> None:
    assert stage(told) == says


def three() -> Batch:
    moves = [
        {"name": "one", "target": "1", "from": "ssh://a", "to": "ssh://b"},
        {"name": "two", "target": "2", "from": "ssh://a", "to": "ssh://b", "after": ["one"]},
        {"name": "<three>".strip("<>"), "target": "<3>", "from": "ssh://b", "to": "ssh://a"},
    ]
    return Batch.from_json({"moves": moves})


def test_the_plan_is_checked_move_by_move() -> None:
    def check(move: Any, told: Any, cancel: Any, timeout_s: float) -> Answer:
        told({"event": "checked", "level": "warning", "host": "b", "check": "kernel", "text": "x"})
        if move.name == "one":
            return Answer(0, {"result": "checked"})
        return Answer(3, {"error": f"no {move.target}"})

    assert [[m.name for m in wave] for wave in waves(three())] == [["one", "three"], ["two"]]
    found = {each.move: each for each in plan(three(), check, Cancellation())}
    assert (found["one"].ok, found["one"].wave, found["one"].problem) == (True, 1, "")
    assert (found["two"].ok, found["two"].depends, found["two"].problem) == (False, True, "no 2")
    assert (found["three"].ok, found["three"].depends) == (False, False)
    assert found["three"].warnings == ["b: kernel: x"]


def test_the_exit_code_tells_whether_all_moved() -> None:
    assert summary("b", {"one": MoveState.MOVED}, 1.0).exit_code == 0
    states = {"one": MoveState.MOVED, "two": MoveState.WAITING}
    assert summary("b", states, 1.0).exit_code == 7


def test_numbers_of_the_next_attempts() -> None:
    attempts = {
        "one": [Attempt("a", 1, 0, state="failed"), Attempt("b", 2, 0, state="failed")],
        "two": [Attempt("c", 1, 0, state="unknown")],
    }
    record = BatchRecord("b", three(), 1, False, {}, attempts=attempts)
    # What became of an unknown one is asked for, before there is another.
    assert record.next_numbers() == {"one": 3, "two": 1}


def test_names_in_the_report_are_text() -> None:
    pytest.importorskip("plotly")
    states = dict.fromkeys(("one", "two", "three"), MoveState.FAILED)
    attempts = {"three": [Attempt("a", 1, 5.0, 6.0, error="<script>x</script>")]}
    text = page(BatchRecord("b", three(), 1, False, states, attempts=attempts, began=4.0))
    assert "<script>x</script>" not in text
    assert "&lt;script&gt;x&lt;/script&gt;" in text
    assert "&lt;3&gt;" in text


# -- stores ------------------------------------------------------------------------------------


def test_which_store_is_meant(tmp_path: Path) -> None:
    store = Store.parse("", tmp_path)
    assert isinstance(store, SqliteStore)
    assert str(store) == f"{tmp_path}/batches"
    assert store.url("b1") == f"sqlite:///{tmp_path}/batches/b1.sqlite"
    assert isinstance(Store.parse("postgres://u@h/d", tmp_path), PostgresStore)
    with pytest.raises(ConfigError, match="neither a directory nor a URL"):
        Store.parse("mysql://x", tmp_path)


def test_a_password_is_not_shown(tmp_path: Path) -> None:
    pytest.importorskip("sqlalchemy")
    assert "secret" not in str(Store.parse("postgresql://u:secret@h/d", tmp_path))


def test_a_file_a_batch_and_one_controller(tmp_path: Path) -> None:
    store = Store.parse(str(tmp_path / "s"), tmp_path)
    assert store.batches() == []
    store.prepare("b2")
    store.prepare("b1")
    assert store.batches() == ["b2", "b1"]
    with pytest.raises(UsageError, match="there is a batch b1 already"):
        store.prepare("b1")
    with pytest.raises(NoSuchMigration):
        store.require("b3")
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o700
    assert not store.is_alive("b1", "x")
    with store.presence("b1", "x"):
        assert store.is_alive("b1", "y")
        with pytest.raises(StillUnderWay), store.presence("b1", "y"):
            pass
        with store.presence("b2", "x"):
            pass
    assert not store.is_alive("b1", "x")


def test_a_store_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="cannot write to"):
        Store.parse(str(tmp_path / "file"), tmp_path).prepare("b")


@pytest.mark.parametrize("text", ["", "../x", "B", "a:b", "-a", "a" * 61])
def test_ids_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        checked_batch_id(text)


# -- the command line --------------------------------------------------------------------------


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "dbos", None)
    with pytest.raises(UsageError) as caught:
        require("dbos")
    assert "pip install 'phaul-runtime[batch]'" in str(caught.value)
    (tmp_path / "m.yaml").write_text("moves: [{target: 1, to: 'local:'}]")
    done = CliRunner().invoke(
        cli, ["batch", "run", str(tmp_path / "m.yaml"), "--store", str(tmp_path / "s")]
    )
    assert isinstance(done.exception, UsageError)
    assert "batches need the Python package dbos" in str(done.exception)


def test_a_plan_needs_no_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "dbos", None)
    monkeypatch.setattr(
        "phaul_runtime.batch.remote_move.MoveRunner.check",
        lambda *_: Answer(3, {"error": "no such process"}),
    )
    (tmp_path / "m.yaml").write_text("moves: [{target: 1, to: 'local:'}]")
    argv = ["batch", "run", str(tmp_path / "m.yaml"), "--dry-run", "--output", "text"]
    done = CliRunner().invoke(cli, argv, standalone_mode=False)
    assert done.return_value == 3
    assert "NO    1: process 1 local: > local:\n" in done.output
    assert "no such process" in done.output


def test_nothing_to_resume(tmp_path: Path) -> None:
    pytest.importorskip("dbos")
    for argv in (["resume"], ["resume", "b7"], ["status", "b7"]):
        done = CliRunner().invoke(cli, ["batch", *argv, "--store", str(tmp_path / "s")])
        assert isinstance(done.exception, NoSuchMigration), done.exception
