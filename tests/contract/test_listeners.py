"""Telling never stops or undoes a move: listeners that raise, full disks, SIGHUP."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import click
import pytest

from phaul_runtime import events as ev
from phaul_runtime.cli import main as entry
from phaul_runtime.cli import outlet
from phaul_runtime.cli.options import cancel_on_signals
from phaul_runtime.cli.views import Aside, JsonView, PlainView, TerminalView, View, move_view
from phaul_runtime.errors import Cancelled, MigrationFailed
from phaul_runtime.recovery.recover import Recovery
from phaul_runtime.report import MigrationReport
from phaul_runtime.source.migration import Migration
from phaul_runtime.system.cancel import Cancellation
from phaul_runtime.testing import Place
from tests import commandline
from tests.contract.wholemove import WholeMove

# Of a move of the fake engine, in their order; a second of the same name is one more moment.
MOMENTS = (
    "migration_started", "checked", "pre_copy_skipped", "frozen", "prepared",
    "source_dead", "committed",
)  # fmt: skip
LATE = ("source_dead", "committed")


def moved(whole: WholeMove, listener: ev.Listener, stop: Cancellation | None = None) -> Any:
    whole.migration = Migration(
        whole.config(), whole.target, listener, stop or Cancellation(), wiring=whole.wiring
    )
    return whole.migration.run()


def runs_there(whole: WholeMove) -> None:
    assert whole.lives(Place.DESTINATION)
    assert not whole.lives(Place.SOURCE)


def test_the_moments_are_those_of_a_move(whole: WholeMove) -> None:
    whole.run()
    assert list(dict.fromkeys(whole.names())) == list(MOMENTS)


@pytest.mark.parametrize("moment", [*MOMENTS, "all"])
def test_a_listener_that_raises(
    whole: WholeMove, caplog: pytest.LogCaptureFixture, moment: str
) -> None:
    def listener(event: ev.Event) -> None:
        if moment in (event.name, "all"):
            raise OSError(28, "No space left on device")

    report = moved(whole, listener)
    assert (report.result, report.warnings) == ("moved", [])
    runs_there(whole)
    # Once an error, however often it fails.
    said = [r for r in caplog.records if r.name == "phaul_runtime.events"]
    assert len(said) == 1


def test_one_guard_is_enough() -> None:
    once = ev.guarded(print)
    assert ev.guarded(once) is once
    assert ev.guarded(ev.nobody) is ev.nobody


@pytest.fixture
def session() -> Iterator[None]:
    """SIGHUP means what it does by default, however these tests were started."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("session")
@pytest.mark.parametrize("moment", MOMENTS)
def test_the_end_of_the_session_at(whole: WholeMove, moment: str) -> None:
    """SIGHUP: as SIGTERM before the point of no return, nothing after it."""
    stop = Cancellation()

    def listener(event: ev.Event) -> None:
        if event.name == moment:
            signal.raise_signal(signal.SIGHUP)

    with cancel_on_signals(stop):
        if moment in LATE:
            assert moved(whole, listener, stop).result == "moved"
            runs_there(whole)
            return
        with pytest.raises(Cancelled):
            moved(whole, listener, stop)
    assert whole.lives(Place.SOURCE)
    assert not whole.lives(Place.DESTINATION)


def test_nohup_is_heeded(whole: WholeMove) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with cancel_on_signals(Cancellation()):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# -- where it is shown -------------------------------------------------------------------------


@pytest.fixture
def standard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Have stdout and stderr be another file, which says what can be written to it."""
    opened: list[IO[str]] = []

    def be(path: str) -> None:
        for name in ("stdout", "stderr"):
            file = open(os.open(path, os.O_WRONLY), "w")  # noqa: PTH123, SIM115
            opened.append(file)
            monkeypatch.setattr(f"sys.{name}", file)

    yield be
    for file in opened:
        file.close()


@pytest.mark.parametrize("view", [JsonView, PlainView])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_full_disk_under_stdout_from(
    whole: WholeMove, standard: Any, moment: str, view: type[View]
) -> None:
    shown = Aside(view())
    full: list[str] = []

    def listener(event: ev.Event) -> None:
        if event.name == moment and not full:
            full.append(moment)
            standard("/dev/full")
        shown(event)

    with shown:
        report = moved(whole, listener)
    shown.report(report)
    assert report.result == "moved"
    runs_there(whole)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_terminal_that_is_gone_from(
    whole: WholeMove, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    master, slave = os.openpty()
    terminal = open(slave, "w")  # noqa: PTH123, SIM115
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(f"sys.{name}", terminal)
    shown = Aside(TerminalView())
    gone: list[str] = []

    def listener(event: ev.Event) -> None:
        if event.name == moment and not gone:
            os.close(master)
            gone.append(moment)
        shown(event)

    with shown:
        report = moved(whole, listener)
    shown.report(report)
    assert gone
    with pytest.raises(OSError, match="Input/output error"):
        os.write(slave, b"x")
    outlet.flush()
    terminal.close()
    assert report.result == "moved"
    runs_there(whole)


def test_a_pipe_that_nobody_reads_holds_up_no_move(
    whole: WholeMove, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`migrate | less`, and a terminal that was stopped by Ctrl-S."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    try:
        while True:
            os.write(write, b"x" * 4096)
    except BlockingIOError:
        pass
    os.set_blocking(write, True)
    pipe = open(write, "w")  # noqa: PTH123, SIM115
    monkeypatch.setattr("sys.stdout", pipe)
    shown = Aside(JsonView())
    with shown:
        report = moved(whole, shown)
    runs_there(whole)
    assert shown._thread.is_alive()
    # Now somebody reads it all, to its end.
    size, said = os.fstat(read).st_size, b""
    assert size == 0
    while b'"committed"' not in said:
        said = said[-4096:] + os.read(read, 65536)
    shown.report(report)
    os.set_blocking(read, False)
    assert b'"result": "moved"' in os.read(read, 65536)
    pipe.close()
    os.close(read)


def test_what_is_shown_is_in_order_and_whole(capsys: pytest.CaptureFixture[str]) -> None:
    with Aside(PlainView()) as view:
        for number in range(50):
            view(ev.Warned(str(number)))
    view.report(MigrationReport("moved"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:50] == [f"warning: {number}" for number in range(50)]
    assert lines[50].split() == ["result", "moved"]


def test_mere_progress_is_left_out_where_it_would_pile_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("phaul_runtime.cli.views._MOST_WAITING", 3)
    view = Aside(PlainView())
    for number in range(10):
        view(ev.Progress(1, number))
    view(ev.Warned("x"))
    assert view._events.qsize() == 4


def test_stdout_that_fails_is_said_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, standard: Any
) -> None:
    told: list[str] = []
    monkeypatch.setattr(outlet, "tell", told.append)
    standard("/dev/full")
    for _ in range(3):
        outlet.echo("x")
    assert told == ["phaul-runtime: warning: stdout cannot be written: No space left on device"]


def test_stderr_that_fails_is_nobodys_trouble(standard: Any) -> None:
    standard("/dev/full")
    outlet.tell("x")
    outlet.tell("y")
    click.echo("z", err=True)


def test_standard_descriptors_are_there() -> None:
    """`phaul-runtime migrate ... >&-`: a socket would become its stdout."""
    pid = os.fork()
    if pid == 0:
        os.close(1)
        outlet.open_standard()
        os._exit(0 if os.readlink("/proc/self/fd/1") == os.devnull else 1)
    assert os.waitpid(pid, 0)[1] == 0


# -- the commands themselves -------------------------------------------------------------------


class Hangup(PlainView):
    """The session ends at a moment of the move, and only then."""

    def __init__(self, moment: str) -> None:
        super().__init__()
        self.moment = moment
        self.heard = 0

    def __call__(self, event: ev.Event) -> None:
        if event.name == self.moment:
            self.heard += 1
            signal.raise_signal(signal.SIGHUP)


@pytest.fixture
def hangups() -> Iterator[list[int]]:
    """What of SIGHUP nobody else has taken: by default it would end the process."""
    taken: list[int] = []
    before = signal.signal(signal.SIGHUP, lambda number, _: taken.append(number))
    yield taken
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("moment", "code"), [("prepared", 6), ("source_dead", 0)])
def test_migrate_takes_the_end_of_its_session(
    whole: WholeMove,
    monkeypatch: pytest.MonkeyPatch,
    hangups: list[int],
    moment: str,
    code: int,
) -> None:
    shown = Hangup(moment)
    monkeypatch.setattr("phaul_runtime.cli.migrate_cmd.move_view", lambda _: shown)
    file = whole.tmp_path / "config.yaml"
    keys = {"engine", "workdir", "state_dir", "log_dir", "restore", "transport"}
    config = {**whole.config().model_dump(include=keys), "hooks": {"directory": "/none"}}
    file.write_text(json.dumps(config))
    done = commandline.run("migrate", whole.target, "--config", str(file))
    assert (done.returncode, shown.heard, hangups) == (code, 1, [])
    assert whole.lives(Place.SOURCE) is (code != 0)
    assert whole.lives(Place.DESTINATION) is (code == 0)
    said = "too late to cancel" if code == 0 else "cancelling; the source runs on"
    assert said in done.stderr


@pytest.mark.parametrize("argv", [["recover"], ["recover", "1f" * 8]])
def test_recover_outlives_its_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hangups: list[int], argv: list[str]
) -> None:
    def ends(*_: object) -> Any:
        signal.raise_signal(signal.SIGHUP)
        raise MigrationFailed("it came to its end")

    monkeypatch.setattr(Recovery, "damaged", ends)
    monkeypatch.setattr(Recovery, "recover", ends)
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({"state_dir": str(tmp_path / "s"), "workdir": str(tmp_path / "w")}))
    done = commandline.run(*argv, "--config", str(file))
    assert (done.returncode, hangups) == (4, [])
    assert "it came to its end" in done.stderr


def test_a_move_is_shown_aside() -> None:
    """Else a terminal that was stopped (Ctrl-S) holds up the freeze."""
    for output in ("json", "text"):
        assert isinstance(move_view(output), Aside)


def in_a_child(program: Callable[[], object]) -> int:
    """The exit code of `main` around it, in a process whose descriptors may be spoilt."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code: object = 99
    try:
        program()
    except SystemExit as ended:
        code = ended.code
    finally:
        os._exit(int(str(code)))


def test_a_program_has_standard_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what it opens first, a socket say, would be its stdout."""

    def command() -> int:
        return int(any(os.readlink(f"/proc/self/fd/{fd}") != os.devnull for fd in (0, 1, 2)))

    def program() -> None:
        for fd in (0, 1, 2):
            os.close(fd)
        entry.main()

    monkeypatch.setattr(entry, "_main", command)
    assert in_a_child(program) == 0


def test_what_is_left_to_write_changes_no_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter would end with 120 of its own."""

    def command() -> int:
        sys.stdout.write("the report")
        return 6

    def program() -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        try:
            entry.main()
        finally:
            sys.stdout.flush()

    monkeypatch.setattr(entry, "_main", command)
    assert in_a_child(program) == 6
