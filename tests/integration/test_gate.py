"""The gate and its script: it fails closed, whatever is missing at the other end."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from phaul_hooks.gate import ASK, CONFIG, SECONDS, Gate, GateEvent

from phaul_runtime.errors import MigrationFailed


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    found = Gate(tmp_path / "gate", deadline_s=20, options=["ps-socket 7"])
    found.open()
    yield found
    found.close()


def script(gate: Gate, action: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [gate.directory / ASK],
        env={**os.environ, "CRTOOLS_SCRIPT_ACTION": action, "CRTOOLS_INIT_PID": "77"},
    )


def ask(gate: Gate, process: subprocess.Popen[bytes], within_s: float = 20) -> GateEvent | None:
    handle = os.pidfd_open(process.pid)
    try:
        return gate.next(time.monotonic() + within_s, handle)
    finally:
        os.close(handle)


def test_criu_never_serves_pages_itself(gate: Gate) -> None:
    assert script(gate, "status-ready").wait(20) == 1


@pytest.mark.parametrize("action", ["pre-dump", "post-dump", "post-restore"])
@pytest.mark.parametrize("yes", [True, False])
def test_it_goes_on_only_on_a_yes(gate: Gate, action: str, yes: bool) -> None:
    process = script(gate, action)
    event = ask(gate, process)
    assert event == GateEvent(action, 77)
    assert process.poll() is None
    gate.answer(event, yes=yes)
    assert process.wait(20) == (0 if yes else 1)


@pytest.mark.parametrize("yes", [True, False])
def test_asked_twice_it_gives_the_same_answer_and_is_heard_once(gate: Gate, yes: bool) -> None:
    first = script(gate, "post-restore")
    event = ask(gate, first)
    assert event is not None
    gate.answer(event, yes=yes)
    assert first.wait(20) == (0 if yes else 1)
    again = script(gate, "post-restore")
    assert ask(gate, again) is None
    assert again.wait(20) == (0 if yes else 1)


def test_it_asks_before_a_restore_only_where_it_is_told_to(gate: Gate, tmp_path: Path) -> None:
    assert script(gate, "pre-restore").wait(20) == 0
    early = Gate(tmp_path / "early", deadline_s=20, early=True)
    early.open()
    process = script(early, "pre-restore")
    assert ask(early, process) == GateEvent("pre-restore", 77)
    early.close()
    assert process.wait(20) == 1


def test_nobody_at_the_other_end_is_a_no(gate: Gate) -> None:
    gate.close()
    assert script(gate, "post-dump").wait(20) == 1


def test_an_end_without_an_answer_is_a_no(gate: Gate) -> None:
    process = script(gate, "post-restore")
    assert ask(gate, process) is not None
    gate.close()
    assert process.wait(20) == 1


def test_no_gate_at_all_is_a_no(gate: Gate) -> None:
    process = script(gate, "post-dump")
    assert ask(gate, process) is not None
    gate.close()
    assert process.wait(20) == 1
    for path in gate.directory.iterdir():
        if path.name != ASK:
            path.unlink()
    assert script(gate, "post-dump").wait(20) == 1


def test_no_answer_in_time_is_a_no(gate: Gate) -> None:
    (gate.directory / SECONDS).write_text("1\n")
    process = script(gate, "post-dump")
    assert ask(gate, process) is not None
    assert process.wait(20) == 1


def test_an_answer_to_another_question_is_a_no(gate: Gate) -> None:
    gate.answer(GateEvent("pre-dump", 0), yes=True)
    process = script(gate, "post-dump")
    assert process.wait(20) == 1


def test_what_is_only_told_does_not_wait(gate: Gate) -> None:
    process = script(gate, "post-resume")
    assert ask(gate, process) == GateEvent("post-resume", 77)
    assert ask(gate, process) is None
    assert process.wait(20) == 0
    for action in ("network-lock", "setup-namespaces", "pre-resume"):
        assert script(gate, action).wait(20) == 0
    gate.close()
    assert script(gate, "post-resume").wait(20) == 0


def test_its_configuration_and_rights(gate: Gate) -> None:
    text = (gate.directory / CONFIG).read_text()
    assert text == f"action-script {gate.directory / ASK}\nps-socket 7\n"
    assert gate.directory.stat().st_mode & 0o777 == 0o700
    with pytest.raises(MigrationFailed, match="cannot make"):
        Gate(gate.directory, deadline_s=1).open()
