"""Names, logs and peers' words that would move a terminal's cursor or forge a line."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from phaul_runtime import events as ev
from phaul_runtime import printable
from phaul_runtime.batch import outcome, view
from phaul_runtime.batch.events import MoveEnded, MoveRetried, MoveTold
from phaul_runtime.batch.model import Batch, Move
from phaul_runtime.batch.outcome import Answer, Attempt
from phaul_runtime.batch.record import BatchRecord
from phaul_runtime.cli import main as cli_main
from phaul_runtime.cli import outlet, views
from phaul_runtime.cutover.states import Role
from phaul_runtime.errors import CriuError, DestinationError, Refused
from phaul_runtime.hooks import lifecycle
from phaul_runtime.hooks.lifecycle import Hooks
from phaul_runtime.report import MigrationReport
from phaul_runtime.rpc import phaul_pb2 as pb
from phaul_runtime.rpc.codec import from_wire, to_wire
from phaul_runtime.source.failure_logs import keep_logs
from phaul_runtime.system import logs

ROOT = Path(__file__).parents[2]
FORGED = "2026-01-01T00:00:00.000Z error phaul_runtime: all is lost"
# A cleared screen, a window's title, a line of its own, a name written backwards, a byte that is no
# text, the control characters of one byte, another kind of line, and markup.
EVIL = f"\x1b[2J\x1b]0;owned\x07\n{FORGED}\r\u202egnp.exe\udcff\x9b31m\u2028\x00[bold]</td><script>"
_SAFE = re.compile(r"[^\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\u2029\ud800-\udfff]*")


def assert_harmless(text: str) -> None:
    """Nothing in it does anything, and no line of it begins as the forged one does."""
    assert _SAFE.fullmatch(text), [hex(ord(each)) for each in _SAFE.sub("", text)]
    assert not [line for line in text.splitlines() if line.startswith("2026-01-01")]


def test_one_line_and_lines() -> None:
    assert printable.one_line("naïve 名前 🙂 a\\b") == "naïve 名前 🙂 a\\b"
    assert printable.one_line("a\nb\t\x1b[0m\udcff\u202e") == r"a\nb\t\x1b[0m\xff\u202e"
    assert printable.lines("a\nb\x1b") == "a\nb\\x1b"
    assert printable.encodable("a\nb\udcff\ud800") == "a\nb\\xff\\ud800"
    assert_harmless(printable.one_line(EVIL))


def test_errors(capfd: pytest.CaptureFixture[str]) -> None:
    error = Refused(f"no process {EVIL}", hint=EVIL, host=f"b{EVIL}", log=[EVIL, "second"])
    assert_harmless(str(error))
    assert len(str(error).splitlines()) == 4
    # What a report has of it is exact.
    assert error.message == f"no process {EVIL}"
    outlet.tell(f"phaul-runtime: {error}")
    assert_harmless(capfd.readouterr().err)


def test_a_command_line(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    evil = EVIL.replace("\x00", "").replace("\udcff", "")
    for argv in (["show", evil], [evil], ["check", "--engine", evil], ["check", f"--{evil}"]):
        monkeypatch.setattr(sys, "argv", ["phaul-runtime", *argv])
        with pytest.raises(SystemExit):
            cli_main.main()
        said = capfd.readouterr()
        assert_harmless(said.out + said.err)


def _every_event() -> list[ev.Event]:
    values: dict[str, Any] = {
        "str": EVIL, "int": 3, "float": 1.5, "bool": True, "float | None": 2.5,
        "dict[str, str]": {EVIL: EVIL}, "dict[str, int]": {EVIL: 1}, "list[str]": [EVIL],
    }  # fmt: skip
    found: list[ev.Event] = []
    for kind in (each for each in ev.Event.__subclasses__() if each.__module__ == ev.__name__):
        fields = {name: values[str(of)] for name, of in kind.__annotations__.items()}
        if kind is ev.Checked:
            fields["level"] = "refused"
        found.append(kind(**fields))
    assert len(found) > 15
    return found


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_is_shown_of_a_move(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = MigrationReport("moved", "i", "process", EVIL, EVIL, EVIL)
    report.error, report.logs = EVIL, EVIL
    with views.PlainView() as plain:
        for event in _every_event():
            plain(event)
        plain.report(report)
    assert_harmless(capfd.readouterr().out)
    with views.JsonView() as exact:
        for event in _every_event():
            exact(event)
    told = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [each["text"] for each in told if each["event"] == "warned"] == [EVIL]

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", screen := _Terminal())
    shown = views.TerminalView()
    with shown:
        for event in _every_event():
            shown(event)
            shown._progress.refresh()
        shown.report(report)
    text = screen.getvalue()
    assert "owned" in text
    # Its own sequences are the terminal's: cursor, colours; no title, no cleared screen.
    assert "\x1b[2J" not in text
    assert "\x1b]" not in text
    for one in "\x07\u202e\x9b\u2028\x00\udcff":
        assert one not in text
    assert not [line for line in text.splitlines() if line.startswith(FORGED)]


def test_what_is_shown_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", screen := _Terminal())
    table = view.LiveTable()
    table(MoveEnded("m", "i", "failed", 1, None, EVIL))
    table(MoveRetried("n", "i", EVIL, EVIL))
    from rich.console import Console

    Console(width=200, file=screen, force_terminal=False).print(table.table())
    text = screen.getvalue()
    assert "owned" in text
    assert_harmless(text)


@pytest.mark.parametrize("style", ["text", "journal", "json"])
def test_log_records(style: logs.Format, capfd: pytest.CaptureFixture[str]) -> None:
    before = logging.getLogger().handlers[:]
    try:
        logs.set_up("info", style)
        log = logging.getLogger("phaul_runtime.test")
        log.warning("process %s of %s: %r, %d, %5.1f", EVIL, Path(EVIL), EVIL, 7, 1.5)
        log.warning("%s", DestinationError(EVIL, log=[EVIL], hint=EVIL))
        log.warning("%s", OSError(2, EVIL))
        log.warning(f"made by somebody else: {EVIL}")
        log.warning("%c and %s", "c", EVIL)
        try:
            raise ValueError(EVIL)
        except ValueError:
            log.exception("it failed")
    finally:
        logging.getLogger().handlers[:] = before
    said = capfd.readouterr().err
    if style == "json":
        told = [json.loads(line)["message"] for line in said.splitlines()]
        assert told[0].startswith(f"process {EVIL} of {EVIL}: ")
        assert said.isascii()
        return
    assert_harmless(said)
    head = re.compile(r"<4>" if style == "journal" else r"\d{4}-\d\d-\d\dT\S+Z (warning|error) ")
    begun = [line for line in said.splitlines() if re.match(rf"(?:{head.pattern})\S", line)]
    wanted = 5 if style == "journal" else 6
    assert len(begun) == wanted, begun
    assert r"\n2026-" in said


def test_kept_logs_of_criu(tmp_path: Path) -> None:
    text = f"(00.000001) Error (x.c:1): {EVIL}\n(00.000002) Dumping\n"
    assert keep_logs(CriuError("no", request="DUMP", log_text=text), tmp_path / "kept", "here")
    (file,) = (tmp_path / "kept").iterdir()
    kept = file.read_text(encoding="utf-8")
    assert _SAFE.fullmatch(kept)
    # A line of the log begins a line: that is what the file is.
    assert kept.startswith("(00.000001) Error (x.c:1): \\x1b[2J")


def test_the_environment_of_hooks(tmp_path: Path) -> None:
    program = tmp_path / "hook"
    program.write_text(f'#!/bin/sh\nenv -0 >"{tmp_path}/env"; cat >"{tmp_path}/in"\n')
    program.chmod(0o755)
    move = lifecycle.Move("ab" * 8, Role.SOURCE, "process", EVIL, EVIL)
    hooks = Hooks({"pre_freeze": [[str(program)]]}, timeout_s=60)
    hooks.run("pre_freeze", move)
    told = dict(
        each.partition("=")[::2]
        for each in os.fsdecode((tmp_path / "env").read_bytes()).split("\0")
    )
    assert told["PHAUL_TARGET"] == printable.one_line(EVIL)
    assert_harmless(told["PHAUL_PEER"])
    assert json.loads((tmp_path / "in").read_text())["target"] == EVIL


def test_what_the_other_side_says() -> None:
    back = from_wire(to_wire(CriuError(EVIL, hint=EVIL, log=[EVIL], log_text=EVIL)), "b")
    assert_harmless(str(back))
    long = pb.Error(kind="CriuError", message="m" * (4 << 20), log=["l" * 10000] * 10000)
    assert len(str(from_wire(long, "b"))) < 200_000
    assert from_wire(pb.Error(kind="SystemExit", message="x"), "b").exit_code == 4


def test_what_a_source_of_a_batch_prints() -> None:
    told: dict[str, Any] = {
        "result": ["moved"], "error": {"a": 1}, "error_kind": [], "warnings": "wwww",
        "downtime_ms": "1", "total_ms": [], "bytes_transferred": float("nan"), "event": ["x"],
        "expected_freeze_ms": "x", "bytes": None, "number": "1",
    }  # fmt: skip
    kept = outcome.as_told(told)
    attempt = Attempt("i", 1, 0.0)
    outcome.follow(Answer(4, kept, "said"), attempt, may_retry=False, lost_for_s=0, reconnect_s=0)
    assert attempt.error == "said"
    for name in ("iteration_done", "progress", "filling"):
        view.stage({**kept, "event": name})
    view.JsonLines(lambda _: None)(MoveTold("m", "i", kept))


def test_the_report_of_a_batch() -> None:
    pytest.importorskip("plotly")
    from phaul_runtime.batch.plan import MoveState
    from phaul_runtime.batch.report_html import page

    move = Move(name="m", target=EVIL, to="ssh://root@b")
    attempt = Attempt("i", 1, 1.0, 2.0, controller=EVIL, state="failed", error=EVIL)
    record = BatchRecord(
        "b", Batch(moves=[move]), 1, False, {"m": MoveState.FAILED}, attempts={"m": [attempt]}
    )
    text = page(record)
    text.encode()
    assert "</td><script>" not in text
    assert "&lt;/td&gt;&lt;script&gt;" in text
    for one in "\x1b\x07\u202e\x9b\udcff\x00":
        assert one not in text


def test_one_place_prints() -> None:
    printing = re.compile(
        r"click\.s?echo\(|click\.secho\(|(?<!\.)\bprint\(|sys\.std(out|err)\.write"
    )
    files = [*(ROOT / "phaul_runtime").rglob("*.py"), *(ROOT / "engines").rglob("*.py")]
    others = [path for path in files if path.name not in ("outlet.py", "fakevictim.py")]
    assert [path for path in others if printing.search(path.read_text(encoding="utf-8"))] == []
