"""The durable workflows by themselves: a controller in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("dbos")

from phaul_runtime.batch import flow, run
from phaul_runtime.batch.events import MoveRetried
from phaul_runtime.batch.model import Batch, Move, attempt_id
from phaul_runtime.batch.outcome import Answer
from phaul_runtime.batch.record import client, read
from phaul_runtime.batch.run import Controller, Pace
from phaul_runtime.batch.store import Store
from phaul_runtime.errors import PhaulError, Refused
from phaul_runtime.events import Event
from phaul_runtime.system.cancel import Cancellation

MOVED = Answer(0, {"result": "moved", "downtime_ms": 1.0})
FAILED = Answer(4, {"result": "failed", "error": "no", "error_kind": "CriuError"})
UNKNOWN = Answer(5, {"result": "unknown", "error": "lost"})
LOST = Answer(None, said="broken pipe")


def moves(count: int, **keys: Any) -> Batch:
    listed = [
        {"name": f"m{n}", "target": f"t{n}", "from": "ssh://a", "to": "ssh://b"}
        for n in range(count)
    ]
    return Batch.from_json({"moves": listed, "retry_pause_s": 0.0, **keys})


def controller(
    tmp_path: Path, ask: Callable[[Move, str], Answer], told: list[Event] | None = None
) -> Controller:
    store = Store.parse(str(tmp_path / "store"), tmp_path)

    def asked(move: Move, migration_id: str, _: Cancellation, timeout_s: float) -> Answer:
        del timeout_s
        return ask(move, migration_id)

    listener = (lambda _: None) if told is None else told.append
    return Controller(store, "b", asked, listener, pace=Pace(0.05, 0.02))


def test_the_same_id_until_it_is_known_and_a_new_one_for_a_retry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow, "_ASK_PAUSE_S", 0.01)
    answers = [LOST, UNKNOWN, FAILED, LOST, MOVED]
    asked: list[str] = []
    told: list[Event] = []

    def ask(_: Move, migration_id: str) -> Answer:
        asked.append(migration_id)
        return answers[len(asked) - 1]

    ended = controller(tmp_path, ask, told).run(moves(1, retries=1))
    assert ended.states == {"moved": 1}
    record = read(Store.parse(str(tmp_path / "store"), tmp_path), "b")
    first, second = (attempt_id(f"b{record.batch.nonce}", "m0", number) for number in (1, 2))
    assert asked == [first] * 3 + [second] * 2
    whats = [event.what for event in told if isinstance(event, MoveRetried)]
    assert whats == ["asked again", "asked again", "another attempt", "asked again"]
    assert [(a.state, a.asks) for a in record.attempts["m0"]] == [("failed", 3), ("moved", 2)]


def test_another_store_may_have_a_batch_of_the_same_id(tmp_path: Path) -> None:
    # The hosts know the attempts of the first: by the same ids nothing would move.
    asked: list[str] = []

    def ask(_: Move, migration_id: str) -> Answer:
        asked.append(migration_id)
        return MOVED

    for name in ("one", "two"):
        controller(tmp_path / name, ask).run(moves(1))
    assert len(set(asked)) == 2


def test_an_error_of_this_program_is_the_moves_and_not_the_batchs(tmp_path: Path) -> None:
    def ask(move: Move, _: str) -> Answer:
        if move.name == "m0":
            raise PhaulError("no idea")
        return MOVED

    ended = controller(tmp_path, ask).run(moves(2))
    assert ended.states == {"error": 1, "moved": 1}
    assert ended.exit_code == 7


def test_a_move_whose_workflow_was_ended_from_outside_does_not_hold_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow, "_LOOK_S", 0.2)
    asked, go_on = threading.Event(), threading.Event()

    def ask(move: Move, _: str) -> Answer:
        if move.name == "m0":
            asked.set()
            go_on.wait(60)
        return MOVED

    runner = controller(tmp_path, ask)

    def cancel() -> None:
        if asked.wait(60):
            with client(runner.store, "b") as found:
                found.cancel_workflow("b:1:m0")

    canceller = threading.Thread(target=cancel)
    canceller.start()
    try:
        ended = runner.run(moves(2))
    finally:
        go_on.set()
        canceller.join(60)
    assert ended.states == {"error": 1, "moved": 1}


def test_a_batch_of_another_version_is_not_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: Any) -> Answer:
        assert runner.stop()
        assert runner.stop()
        assert not runner.stop()
        return LOST

    monkeypatch.setattr(run, "_ENDS_S", 0.3)
    runner = controller(tmp_path, ask)
    with pytest.raises(PhaulError, match="left batch b before its end"):
        runner.run(moves(1))
    monkeypatch.setattr("phaul_runtime.batch.record.VERSION", "phaul-batch-0")
    with pytest.raises(Refused, match="was begun by a program of another version"):
        controller(tmp_path, lambda *_: MOVED).resume()
    monkeypatch.undo()
    assert controller(tmp_path, lambda *_: MOVED).resume().states == {"moved": 1}
