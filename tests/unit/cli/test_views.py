"""The command line without another host: usage, configuration, and how errors end it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from phaul_runtime import events as ev
from phaul_runtime.cli.main import cli
from phaul_runtime.cli.observe import _level
from phaul_runtime.cli.views import JsonView, PlainView, TerminalView, describe
from phaul_runtime.report import Iteration, MigrationReport
from tests.commandline import run


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["migrate"], "no target"),
        (["migrate", "5"], "no destination"),
        (["migrate", "5", "--target", "6", "--to", "local:"], "two targets"),
        (["migrate", "5", "--to", "local:", "--engine", "jail"], "unknown engine 'jail'"),
        (["migrate", "5", "--to", "warp:"], "unknown transport 'warp'"),
        (["migrate", "5", "--to", "somewhere"], "names no transport"),
        (["migrate", "5", "--to", "ssh://"], "names no host"),
        (["migrate", "5", "--to", "ssh://-oProxyCommand=x"], "malformed destination"),
        (["migrate", "five", "--to", "local:", "--config", "OWN"], "'five' is not a pid"),
        (["migrate", "0", "--to", "local:", "--config", "OWN"], "'0' is not a pid"),
        (["migrate", "5", "--to", "local:", "--max-downtime-ms", "-1"], "--max-downtime-ms"),
        (["migrate", "5", "--to", "local:", "--file", "copy"], "--file"),
        (["migrate", "5", "--to", "local:", "--mode", "postcopy"], "--mode"),
        (
            ["migrate", "5", "--to", "local:", "--mode", "hybrid", "--restore", "full"],
            "command line: mode: input should be 'pre-copy' where restore is full",
        ),
        (["check"], "no destination"),
        (["migrat"], "migrat"),
        (["config", "check", "/none.yaml"], "/none.yaml: No such file"),
    ],
)
def test_usage_errors_end_with_2_and_one_clear_line(root: Path, argv: list[str], says: str) -> None:
    own = root / "own.yaml"  # the defaults are this host's directories, no test's
    own.write_text(f"workdir: {root}/work\nstate_dir: {root}/state\n")
    done = run(*(str(own) if word == "OWN" else word for word in argv))
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_it_is_a_program_that_ends_with_the_code() -> None:
    argv = [sys.executable, "-m", "phaul_runtime", "migrate", "5"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Error: no destination" in done.stderr
    assert "Traceback" not in done.stderr


def test_version_and_help() -> None:
    assert run("--version").stdout.startswith("phaul-runtime, version ")
    done = run("migrate", "--help")
    assert done.returncode == 0
    assert "Exit codes: 0 moved" in done.stdout


def test_config_check_and_schema(tmp_path: Path) -> None:
    example = Path(__file__).resolve().parents[3] / "config.example.yaml"
    done = CliRunner().invoke(cli, ["config", "check", str(example)])
    assert done.output == f"{example}: ok\n"
    bad = tmp_path / "bad.yaml"
    bad.write_text("engines:\n  process:\n    ghost_limit_mib: lots\n")
    ended = run("config", "check", str(bad))
    assert ended.returncode == 2
    assert f"{bad}:3: engines.process.ghost_limit_mib" in ended.stderr
    schema = json.loads(CliRunner().invoke(cli, ["config", "schema"]).output)
    options = schema["properties"]["engines"]["properties"]["process"]["properties"]
    assert "tcp_established" in options


EVENTS: list[ev.Event] = [
    ev.MigrationStarted("1f", "process", "7", "ssh://b"),
    ev.Checked("cpu", "refused", "b", "text", "hint"),
    ev.FilesCopied(1, 2, final=False),
    ev.TreeSynced("rootfs", 1, 2, 3.0, final=True),
    ev.Staging("image"),
    ev.TreeProgress("image", 100),
    ev.IterationStarted(1),
    ev.Progress(1, 100),
    ev.IterationDone(1, 10, 0, 40960, 12.0, None, True, "why"),
    ev.PreCopySkipped("no tracking"),
    ev.Frozen(),
    ev.Prepared(7),
    ev.SourceDead(),
    ev.Committed(7, 12.3),
    ev.Filling(10, 5),
    ev.Filled(10, 2, 30.0),
    ev.Serving(10, 5),
    ev.Reconnecting("cut"),
    ev.Served(10, 2, 30.0, 1.5),
    ev.Recovering("why"),
    ev.RolledBack("why", True),
    ev.OutcomeRecorded("1f", "moved"),
    ev.Warned("careful"),
]


def test_every_event_has_its_json_line_and_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    # Those of a batch have views of their own.
    of_a_move = {each for each in ev.Event.__subclasses__() if each.__module__ == ev.__name__}
    assert {type(event) for event in EVENTS} == of_a_move
    for event in EVENTS:
        JsonView()(event)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in lines] == [event.name for event in EVENTS]
    silent = (ev.Filling, ev.TreeProgress, ev.IterationStarted, ev.Progress, ev.SourceDead)
    assert all(bool(describe(event)) != isinstance(event, silent) for event in EVENTS)


def test_the_report_in_json_and_in_text(capsys: pytest.CaptureFixture[str]) -> None:
    report = MigrationReport("moved", id="1f", downtime_ms=12.34567, restored_pid=7)
    report.iterations.append(Iteration(10, 0, 40960, 12.0))
    JsonView().report(report)
    shown = json.loads(capsys.readouterr().out)
    assert next(iter(shown)) == "schema"
    assert shown["schema"] == "phaul-runtime/report/1"
    assert shown["downtime_ms"] == 12.346
    PlainView().report(report)
    assert "downtime       12 ms" in capsys.readouterr().out


def test_the_report_of_post_copy(capsys: pytest.CaptureFixture[str]) -> None:
    report = MigrationReport("moved", mode="hybrid", restore="lazy")
    report.post_copy = {"pages": 10, "faults": 2, "worst_fault_ms": 30.12345, "seconds": 1.5}
    PlainView().report(report)
    shown = capsys.readouterr().out
    assert "hybrid         10 pages within 1.5 s, 2 faults, the longest 30 ms" in shown
    told = json.loads(json.dumps(report.to_json()))
    assert told["mode"] == "hybrid"
    assert told["post_copy"]["worst_fault_ms"] == 30.123
    assert MigrationReport.from_json(told).to_json() == told
    # One that a recovery finished, and one from before there were modes.
    report.post_copy = {}
    PlainView().report(report)
    assert "hybrid         how much came once the copy ran is not known" in capsys.readouterr().out
    old = MigrationReport.from_json({"result": "moved", "iterations": []})
    assert (old.mode, old.post_copy) == ("pre-copy", {})
    PlainView().report(old)
    assert "post-copy" not in capsys.readouterr().out


def test_plain_lines_of_post_copy_are_few(capsys: pytest.CaptureFixture[str]) -> None:
    view = PlainView()
    for missing in range(1000, -1, -1):
        view(ev.Serving(1000, missing))
    view(ev.Served(1000, 2, 30.0, 1.5))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("post-copy: 1000 of 1000 pages are still here")
    assert len(lines) == 1 + 10 + 1
    assert lines[-1] == (
        "post-copy: the last of 1000 pages is over after 1.5 s, 2 faults, the longest 30 ms; "
        "the source's frozen copy is killed"
    )
    PlainView()(ev.Serving(0, 0))


def test_the_terminal_shows_post_copy(capsys: pytest.CaptureFixture[str]) -> None:
    view = TerminalView()

    def shown(event: ev.Event) -> list[tuple[str, float, float | None]]:
        view(event)
        return [(t.description, t.completed, t.total) for t in view._progress.tasks]

    assert shown(ev.Committed(7, 12.3)) == []
    runs = "runs there; memory from the source, whose copy is frozen"
    assert shown(ev.Serving(4, 4)) == [(runs, 0, 16384)]
    assert shown(ev.Serving(4, 1)) == [(runs, 12288, 16384)]
    assert shown(ev.Reconnecting("cut")) == [("page channel broken, opened anew", 12288, 16384)]
    assert shown(ev.Serving(4, 1)) == [(runs, 12288, 16384)]
    assert shown(ev.Served(4, 2, 30.0, 1.5)) == []
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("pages are still here") == 1
    assert "opened anew; the copy waits for its pages: cut" in text


def test_the_terminal_shows_what_is_under_way(capsys: pytest.CaptureFixture[str]) -> None:
    view = TerminalView()

    def shown(event: ev.Event) -> list[tuple[str, float]]:
        view(event)
        return [(task.description, task.completed) for task in view._progress.tasks]

    assert shown(ev.Staging("image")) == [("preparing image", 0)]
    # Of memory nothing is under way yet, whatever the heartbeats say.
    assert shown(ev.Progress(1, 0)) == [("preparing image", 0)]
    assert shown(ev.TreeProgress("image", 5)) == [("tree image", 5)]
    synced = ev.TreeSynced("image", 1, 2, 3.0, final=False)
    assert shown(synced) == [("image is there, being taken in", 0)]
    assert shown(ev.TreeProgress("rootfs", 5)) == [("tree rootfs", 5)]
    assert shown(ev.TreeProgress("data", 2)) == [("tree data, rootfs", 7)]
    assert shown(ev.TreeProgress("rootfs", 6)) == [("tree data, rootfs", 8)]
    assert shown(ev.TreeSynced("rootfs", 1, 2, 3.0, final=False)) == []
    assert shown(ev.IterationStarted(1)) == [("pre-dump 1", 0)]
    assert shown(ev.Progress(1, 8192)) == [("pre-dump 1: 2 pages", 8192)]
    # The last pass before the freeze.
    assert shown(ev.TreeProgress("rootfs", 3)) == [("tree rootfs", 3)]
    assert shown(ev.Progress(2, 4096)) == [("tree rootfs", 3)]
    frozen = [("frozen: final dump, restore", 0)]
    assert shown(ev.Frozen()) == frozen
    assert shown(ev.TreeProgress("rootfs", 5)) == frozen
    assert shown(ev.TreeSynced("rootfs", 1, 2, 3.0, final=True)) == frozen
    assert shown(ev.RolledBack("why", True)) == []
    assert "preparing image" in capsys.readouterr().out


def test_what_is_logged_of_post_copy() -> None:
    levels = {type(event): _level(event) for event in EVENTS}
    assert levels[ev.Serving] == levels[ev.Filling] == logging.DEBUG
    assert levels[ev.Reconnecting] == levels[ev.Recovering] == logging.WARNING
    assert levels[ev.Served] == levels[ev.Filled] == logging.INFO
