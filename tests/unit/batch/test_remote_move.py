"""One attempt: the command at its source, and what is made of what it says."""

from __future__ import annotations

import shlex
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from phaul_runtime.batch.model import Move
from phaul_runtime.batch.remote_move import MoveRunner
from phaul_runtime.config.model import load_config
from phaul_runtime.system.cancel import Cancellation

ID = "0123456789abcdef"


def move(**keys: Any) -> Move:
    return Move.model_validate(
        {"name": "web", "target": "w b", "engine": "runc", "to": "ssh://root@b", **keys}
    )


def runner(script: str) -> MoveRunner:
    """A runner whose phaul-runtime on this host is a script."""
    return MoveRunner(load_config(), [sys.executable, "-c", script])


def ask(script: str, timeout_s: float = 60, cancel: Cancellation | None = None) -> Any:
    told: list[dict[str, Any]] = []
    answer = runner(script).ask(move(), ID, told.append, cancel or Cancellation(), timeout_s)
    return answer, told


def test_the_command_of_a_local_move() -> None:
    argv = runner("x").argv(move(), "--id", ID)
    assert argv[2:] == [
        "x", "migrate", "--engine", "runc", "--to", "ssh://root@b", "--target", "w b",
        "--output", "json", "--id", ID,
    ]  # fmt: skip


def test_the_command_over_ssh_is_one_word_for_the_shell_there(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("transport: {ssh_options: [-i, key], agent_command: [/opt/phaul runtime]}")
    wanted = move(
        **{"from": "ssh://root@a:2222"}, config="/etc/x y.yaml", files="copy", restore="lazy",
        mode="hybrid", max_downtime_ms=50, max_iterations=3, tcp_established=True,
        ignore=["kernel", "cpu"],
    )  # fmt: skip
    argv = MoveRunner(load_config(config)).argv(wanted, "--id", ID)
    assert argv[0] == "ssh"
    assert "BatchMode=yes" in argv
    assert argv[argv.index("-p") + 1] == "2222"
    assert argv[argv.index("-l") + 1] == "root"
    assert argv[-3:-1] == ["--", "a"]
    assert shlex.split(argv[-1]) == [
        "/opt/phaul runtime", "migrate", "--engine", "runc", "--to", "ssh://root@b",
        "--config", "/etc/x y.yaml", "--files", "copy", "--restore", "lazy", "--mode", "hybrid",
        "--max-downtime-ms", "50", "--max-iterations", "3", "--tcp-established",
        "--ignore", "kernel", "--ignore", "cpu", "--target", "w b", "--output", "json", "--id", ID,
    ]  # fmt: skip


def test_events_are_told_and_the_report_is_the_answer() -> None:
    answer, told = ask(
        'print(\'{"event": "frozen"}\\nno json\\n[1]\\n{"schema": "s", "result": "moved"}\')'
    )
    assert told == [{"event": "frozen"}]
    assert (answer.code, answer.report) == (0, {"schema": "s", "result": "moved"})


def test_the_last_words_of_a_command_that_failed() -> None:
    answer, _ = ask("import sys; print('x' * 9000, file=sys.stderr); sys.exit('no such thing')")
    assert (answer.code, answer.report) == (1, None)
    assert answer.said.endswith("no such thing")
    assert len(answer.said) < 5000


@pytest.mark.parametrize(
    "script",
    ["import os; os.kill(os.getpid(), 9)", "import sys; sys.exit(255)"],
    ids=["killed", "ssh's own failure"],
)
def test_an_answer_that_is_lost(script: str) -> None:
    answer, _ = ask(f'print(\'{{"schema": "s"}}\', flush=True); {script}')
    assert answer.code is None


def test_a_command_that_does_not_end_is_ended_and_lost() -> None:
    answer, _ = ask("import time; time.sleep(600)", timeout_s=0.5)
    assert answer.code is None


def test_a_program_that_is_missing_is_refused() -> None:
    answer = MoveRunner(load_config(), ["/no/such/program"]).ask(
        move(), ID, lambda _: None, Cancellation(), 5
    )
    assert answer.code == 3
    assert "cannot start /no/such/program" in answer.said


def test_cancelling_is_passed_on_by_standard_input() -> None:
    cancel = Cancellation()
    ready = threading.Event()
    script = (
        'import sys; print(\'{"event": "ready"}\', flush=True);'
        "sys.exit(6 if sys.stdin.readline() == 'cancel\\n' else 1)"
    )

    def told(_: dict[str, Any]) -> None:
        ready.set()

    threading.Thread(target=lambda: ready.wait(60) and cancel.request()).start()
    answer = runner(script).ask(move(), ID, told, cancel, 60)
    assert answer.code == 6
    # And nothing is begun afterwards.
    assert runner("print(1)").ask(move(), ID, told, cancel, 60).code is None
