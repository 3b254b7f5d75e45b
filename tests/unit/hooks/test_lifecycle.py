"""Lifecycle hooks: what they are told, and what their failure does."""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from phaul_runtime.config.model import Config
from phaul_runtime.cutover.states import Role
from phaul_runtime.errors import MigrationFailed, PhaulError
from phaul_runtime.hooks.directory import Effect, HookDirectory
from phaul_runtime.hooks.lifecycle import COMMITTED, EVENTS, PRE_FREEZE, Hooks, Move
from phaul_runtime.system import proc

EXAMPLE = Path(__file__).resolve().parents[3] / "hooks/examples/pre_freeze.d/10-not-at-noon"
MOVE = Move("1f1f1f1f", Role.SOURCE, "runc", "web", "ssh://root@b")


def test_they_are_told_what_it_is_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PHAUL_LAB", raising=False)  # whoever runs the tests may have it
    out = tmp_path / "out"
    script = f"env | grep ^PHAUL_ | sort > {out}"
    Hooks({PRE_FREEZE: [["sh", "-c", script]]}).run(PRE_FREEZE, MOVE, 7)
    assert out.read_text().split() == [
        "PHAUL_ENGINE=runc", "PHAUL_EVENT=pre_freeze", "PHAUL_ID=1f1f1f1f",
        "PHAUL_PEER=ssh://root@b", "PHAUL_PID=7", "PHAUL_ROLE=source", "PHAUL_TARGET=web",
    ]  # fmt: skip


def test_the_first_failure_ends_it_with_its_words(tmp_path: Path) -> None:
    after = ["touch", str(tmp_path / "after")]
    hooks = Hooks({PRE_FREEZE: [["sh", "-c", "echo no luck >&2; exit 3"], after]})
    with pytest.raises(MigrationFailed, match="hook pre_freeze: sh ended with 3") as caught:
        hooks.run(PRE_FREEZE, MOVE)
    assert caught.value.log == ("no luck",)
    assert not (tmp_path / "after").exists()
    hooks.run(COMMITTED, MOVE)  # there is none


def test_where_it_is_too_late_a_failure_is_a_warning() -> None:
    hooks = Hooks({COMMITTED: [["no-such-program-here"]]})
    (warning,) = hooks.try_to(COMMITTED, MOVE)
    assert "no-such-program-here" in warning


def test_a_hook_has_its_time() -> None:
    with pytest.raises(MigrationFailed, match="did not end within"):
        Hooks({PRE_FREEZE: [["sleep", "30"]]}, timeout_s=0.2).run(PRE_FREEZE, MOVE)


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file; what is started has its time from when it has put a line there."""
    file = tmp_path / "told"
    spawn = proc.spawn

    def spawn_and_wait(*args: Any, **options: Any) -> proc.Process:
        process = spawn(*args, **options)
        deadline = time.monotonic() + 60
        while not (file.exists() and file.read_text().endswith("\n")):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return process

    monkeypatch.setattr(proc, "spawn", spawn_and_wait)
    return file


def test_one_over_time_is_ended_with_what_it_started(told: Path) -> None:
    script = f"sleep 600 & echo slow >&2; echo $! > {told}; wait"
    with pytest.raises(MigrationFailed, match=r"sh did not end within 0\.1 s") as caught:
        Hooks({PRE_FREEZE: [["sh", "-c", script]]}, timeout_s=0.1).run(PRE_FREEZE, MOVE)
    assert caught.value.log == ("slow",)
    assert ended(int(told.read_text()))


def test_so_is_what_outlives_it_and_keeps_its_output(told: Path) -> None:
    with pytest.raises(PhaulError, match="did not end within"):
        proc.run(["sh", "-c", f"sleep 600 & echo $! > {told}"], timeout_s=0.1)
    assert ended(int(told.read_text()))


def ended(pid: int) -> bool:
    """Whether it is gone, or soon is: nobody may have waited for it yet."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state in "ZX":
            return True
        time.sleep(0.02)
    return False


def test_input_need_not_be_read() -> None:
    assert proc.run(["cat"], timeout_s=10, input="a\u00e9").stdout == "a\u00e9"
    assert proc.run(["true"], timeout_s=10, input="x" * (1 << 20)).returncode == 0
    assert proc.run(["cat"], timeout_s=10).stdout == ""


class Directory:
    """An operator's directory, and the hooks of a host that has it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.out = path / "out"
        for event in EVENTS:
            (path / f"{event}.d").mkdir(parents=True)
            (path / f"{event}.d").chmod(0o755)

    def add(
        self, name: str, script: str = "", *, event: str = PRE_FREEZE, mode: int = 0o755
    ) -> Path:
        """A script that tells its name, then does what `script` says."""
        path = self.path / f"{event}.d" / name
        path.write_text(f"#!/bin/sh\necho '{name}' >> {self.out}\n{script}\n")
        path.chmod(mode)
        return path

    def hooks(self, **commands: list[list[str]]) -> Hooks:
        return Hooks(commands, 30, HookDirectory(self.path, os.getuid()))

    def ran(self) -> list[str]:
        return self.out.read_text().splitlines() if self.out.exists() else []


@pytest.fixture
def directory(tmp_path: Path) -> Directory:
    return Directory(tmp_path / "hooks")


def test_a_directory_runs_after_the_commands_in_cs_order(directory: Directory) -> None:
    for name in ("b", "10-x", "9-x", "B", "\u00e9", "a"):
        directory.add(name)
    command = ["sh", "-c", f"echo command >> {directory.out}"]
    directory.hooks(pre_freeze=[command]).run(PRE_FREEZE, MOVE)
    assert directory.ran() == ["command", "10-x", "9-x", "B", "a", "b", "\u00e9"]
    directory.hooks().run(COMMITTED, MOVE)  # nothing lies there
    assert len(directory.ran()) == 7


def test_copies_directories_and_what_is_not_executable_are_skipped(directory: Directory) -> None:
    names = (
        ".hidden", "x~", "x.bak", "x.dpkg-old", "x.dpkg-dist", "x.rpmnew", "x.rpmsave",
    )  # fmt: skip
    for name in names:
        directory.add(name, "exit 1")
    directory.add("20-plain", "exit 1", mode=0o644)
    (directory.path / "pre_freeze.d" / "30-directory").mkdir()
    (directory.path / "pre_freeze.d" / "40-nowhere").symlink_to("/no/such/file")
    directory.add("x.bakery")
    hooks = directory.hooks()
    hooks.run(PRE_FREEZE, MOVE)
    assert directory.ran() == ["x.bakery"]
    plain, nowhere, bakery = hooks.programs(PRE_FREEZE)
    assert (plain.effect, plain.wrong) == (Effect.SKIPPED, "is not executable")
    assert plain.hint == f"chmod +x {directory.path}/pre_freeze.d/20-plain"
    assert nowhere.effect is Effect.SKIPPED
    assert "No such file" in nowhere.wrong
    assert (bakery.effect, bakery.wrong) == (Effect.RUNS, "")


def test_a_file_has_arguments_environment_and_json(directory: Directory) -> None:
    told, given = directory.path / "told", directory.path / "in"
    script = rf'printf "%s\n" "$#" "$@" "$PHAUL_ID" > {told}; cat > {given}'
    directory.add("10-tell", script)
    directory.hooks().run(PRE_FREEZE, MOVE, 7)
    assert told.read_text().split() == ["3", "web", "pre_freeze", "source", "1f1f1f1f"]
    facts = {
        "schema": 1, "event": "pre_freeze", "role": "source", "id": "1f1f1f1f", "engine": "runc",
        "target": "web", "peer": "ssh://root@b", "pid": 7,
    }  # fmt: skip
    assert json.loads(given.read_text()) == facts
    directory.hooks().run(PRE_FREEZE, MOVE)
    assert json.loads(given.read_text()) == {**facts, "pid": None}


def test_a_command_has_the_json_and_its_own_arguments(tmp_path: Path) -> None:
    script = f'echo "$#" > {tmp_path}/count; cat > {tmp_path}/in'
    Hooks({PRE_FREEZE: [["sh", "-c", script]]}).run(PRE_FREEZE, MOVE)
    assert (tmp_path / "count").read_text() == "0\n"
    assert json.loads((tmp_path / "in").read_text())["target"] == "web"


def test_a_file_vetoes_and_those_after_it_do_not_run(directory: Directory) -> None:
    lines = "; ".join(f"echo {number} >&2" for number in range(6))
    path = directory.add("10-no", f"{lines}; exit 9")
    directory.add("20-after")
    with pytest.raises(MigrationFailed) as caught:
        directory.hooks().run(PRE_FREEZE, MOVE)
    assert caught.value.message == f"hook pre_freeze: {path} ended with 9"
    assert caught.value.log == ("2", "3", "4", "5")
    assert directory.ran() == ["10-no"]


def test_a_signal_is_named(directory: Directory) -> None:
    directory.add("10-dies", "kill -9 $$")
    with pytest.raises(MigrationFailed, match="10-dies was killed by SIGKILL"):
        directory.hooks().run(PRE_FREEZE, MOVE)


def test_where_it_is_too_late_all_run_and_each_failure_is_a_warning(directory: Directory) -> None:
    first = directory.add("10-no", "echo alas >&2; exit 1", event=COMMITTED)
    directory.add("20-yes", event=COMMITTED)
    last = directory.add("30-no", "exit 2", event=COMMITTED)
    warnings = directory.hooks(committed=[["false"]]).try_to(COMMITTED, MOVE)
    assert warnings == [
        "hook committed: false ended with 1",
        f"hook committed: {first} ended with 1; alas",
        f"hook committed: {last} ended with 2",
    ]
    assert directory.ran() == ["10-no", "20-yes", "30-no"]


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777])
def test_a_file_that_others_can_write_fails_its_event(directory: Directory, mode: int) -> None:
    directory.add("10-mine")
    path = directory.add("20-anyones", mode=mode)
    with pytest.raises(MigrationFailed, match="20-anyones is writable by others") as caught:
        directory.hooks().run(PRE_FREEZE, MOVE)
    assert caught.value.hint == f"chmod go-w {path}"
    assert directory.ran() == []


def test_so_does_a_directory_at_any_height(directory: Directory) -> None:
    directory.add("10-mine")
    for place in (directory.path / "pre_freeze.d", directory.path):
        place.chmod(0o775)
        with pytest.raises(MigrationFailed) as caught:
            directory.hooks().run(PRE_FREEZE, MOVE)
        assert f"{place} is writable by others" in caught.value.message
        place.chmod(0o755)
    # As /tmp: others may add to it, but neither rename nor replace what is root's.
    directory.path.chmod(0o777 | stat.S_ISVTX)
    directory.hooks().run(PRE_FREEZE, MOVE)
    assert directory.ran() == ["10-mine"]
    (directory.path / "pre_freeze.d").chmod(0o777 | stat.S_ISVTX)
    with pytest.raises(MigrationFailed, match="writable by others"):
        directory.hooks().run(PRE_FREEZE, MOVE)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_so_does_what_is_not_roots(directory: Directory, tmp_path: Path) -> None:
    path = directory.add("10-nobodys")
    os.chown(path, 65534, 0)
    with pytest.raises(MigrationFailed, match=f"{path} belongs to uid 65534") as caught:
        directory.hooks().run(PRE_FREEZE, MOVE)
    assert caught.value.hint == f"chown root {path}"
    os.chown(path, 0, 0)
    # A link of root's to where somebody else can exchange what it leads to.
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, 65534, 0)
    path.rename(theirs / "hook")
    path.symlink_to(theirs / "hook")
    with pytest.raises(MigrationFailed, match=f"{theirs} belongs to uid 65534"):
        directory.hooks().run(PRE_FREEZE, MOVE)
    assert directory.ran() == []


def test_what_cannot_be_started_fails_before_anything_ran(directory: Directory) -> None:
    directory.add("10-first")
    path = directory.add("20-alien")
    path.write_text("#!/no/such/interpreter -x\n")
    with pytest.raises(MigrationFailed, match=r"interpreter of .*20-alien is missing: /no/such"):
        directory.hooks().run(PRE_FREEZE, MOVE)
    assert directory.ran() == []
    path.write_text("echo neither script nor program\n")
    with pytest.raises(MigrationFailed, match="20-alien: Exec format error") as caught:
        directory.hooks().run(PRE_FREEZE, MOVE)
    assert "first line" in caught.value.hint


def test_no_directory_is_no_hooks_and_a_file_in_its_place_fails(tmp_path: Path) -> None:
    hooks = Hooks({}, 30, HookDirectory(tmp_path / "none"))
    hooks.run(PRE_FREEZE, MOVE)
    (tmp_path / "pre_freeze.d").write_text("")
    with pytest.raises(MigrationFailed, match=r"cannot read .*pre_freeze.d: Not a directory"):
        Hooks({}, 30, HookDirectory(tmp_path)).run(PRE_FREEZE, MOVE)


@pytest.mark.parametrize(("hour", "vetoes"), [("11", False), ("12", True), ("13", False)])
def test_the_example_vetoes_at_noon(
    directory: Directory, monkeypatch: pytest.MonkeyPatch, hour: str, vetoes: bool
) -> None:
    clock = directory.path / "date"
    clock.write_text(f"#!/bin/sh\necho {hour}\n")
    clock.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory.path}:{os.environ['PATH']}")
    directory.add("10-not-at-noon").write_text(EXAMPLE.read_text())
    assert EXAMPLE.stat().st_mode & stat.S_IXUSR
    if not vetoes:
        directory.hooks().run(PRE_FREEZE, MOVE)
        return
    with pytest.raises(MigrationFailed, match="10-not-at-noon ended with 1") as caught:
        directory.hooks().run(PRE_FREEZE, MOVE)
    assert caught.value.log == ("web is not moved between 12:00 and 13:00",)


def test_what_came_with_phaul_runtime_is_found_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path / "venv/phaul-shipped"
    shipped.parent.mkdir()
    shipped.write_text('#!/bin/sh\necho "$@" >&2; exit 3\n')
    shipped.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "venv/python"))
    with pytest.raises(MigrationFailed, match=f"{shipped} ended with 3") as caught:
        Hooks({PRE_FREEZE: [["phaul-shipped", "a", "b"]]}).run(PRE_FREEZE, MOVE)
    assert caught.value.log == ("a b",)


def test_the_configuration_names_the_directory() -> None:
    hooks = Config.model_validate(
        {
            "hooks": {
                "directory": "/srv/hooks",
                "timeout_s": 5.0,
                "committed": [["true"]],
                "timeouts": {"frozen": 0.5},
            }
        }
    ).hooks.hooks()
    assert hooks.directory == HookDirectory(Path("/srv/hooks"))
    assert hooks.timeout_s == 5
    assert hooks.timeouts == {"frozen": 0.5}
    assert hooks.commands == {**{event: [] for event in EVENTS}, "committed": [["true"]]}
