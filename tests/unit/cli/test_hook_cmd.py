"""`phaul-runtime hook`: what it lists, and how it installs and removes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from phaul_hooks.docker_host import DockerHost

from phaul_runtime import hosthooks
from phaul_runtime.cli.main import cli, main
from phaul_runtime.config import model as config_module
from phaul_runtime.errors import Refused
from phaul_runtime.hosthooks import HostHook, Status, load_host_hook


class Fake(HostHook):
    """A host hook that remembers nothing but whether it is installed."""

    installed = False

    def install(self) -> Sequence[str]:
        done = [] if Fake.installed else ["a file was made", "to do: restart it"]
        Fake.installed = True
        return done

    def remove(self) -> Sequence[str]:
        if not Fake.installed:
            return []
        Fake.installed = False
        return ["a file was removed"]

    def status(self) -> Status:
        return Status(Fake.installed, ("not restarted since",) if Fake.installed else ())


class Refusing(Fake):
    def install(self) -> Sequence[str]:
        raise Refused("daemon.json is malformed", hint="mend it")


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its configuration, its host hooks, and root as its user."""
    monkeypatch.setattr(config_module, "SYSTEM_CONFIG", tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_text(f"hooks: {{directory: {tmp_path}/hooks}}\n")
    monkeypatch.setattr(Fake, "installed", False)
    found = {"fake": Fake, "refusing": Refusing}

    def entry_points(*, group: str, name: str | None = None) -> list[EntryPoint]:
        assert group == "phaul_runtime.hooks"
        names = found if name is None else [name] if name in found else []
        return [EntryPoint(each, f"{__name__}:{found[each].__name__}", group) for each in names]

    monkeypatch.setattr(hosthooks, "entry_points", entry_points)
    monkeypatch.setattr(EntryPoint, "load", lambda entry: found[entry.name])
    monkeypatch.setattr(os, "geteuid", lambda: 0)


def run(*argv: str) -> Result:
    return CliRunner().invoke(cli, ["hook", *argv], catch_exceptions=False)


def ends(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    """The exit code of the whole command."""
    monkeypatch.setattr("sys.argv", ["phaul-runtime", "hook", *argv])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_the_shipped_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert isinstance(load_host_hook("docker"), DockerHost)


@pytest.fixture
def hooks(tmp_path: Path) -> Path:
    """Two commands and three files at pre_freeze."""
    (tmp_path / "config.yaml").write_text(
        f"hooks:\n  directory: {tmp_path}/hooks\n  pre_freeze: [[sh, -c, 'exit 1'], [no-such]]\n"
        "  timeouts: {frozen: 2}\n"
    )
    directory = tmp_path / "hooks" / "pre_freeze.d"
    directory.mkdir(parents=True)
    for name, mode in (("30-open", 0o777), ("10-good", 0o755), ("20-plain", 0o644)):
        (directory / name).write_text("#!/bin/sh\n")
        (directory / name).chmod(mode)
    for path in (directory, directory.parent):
        path.chmod(0o755)
    return directory


roots_files = pytest.mark.skipif(os.getuid() != 0, reason="files have to be root's")


@roots_files
def test_a_list_in_the_order_in_which_it_runs_with_what_is_wrong(hooks: Path) -> None:
    assert run("list").output.splitlines() == [
        "pre_check: nothing",
        "pre_freeze:",
        "  ok   sh -c exit 1",
        "  NO   no-such: fails the event: cannot start no-such: no such program"
        " (install no-such or put it on PATH)",
        f"  ok   {hooks}/10-good",
        f"  warn {hooks}/20-plain: warning: is skipped: is not executable"
        f" (chmod +x {hooks}/20-plain)",
        f"  NO   {hooks}/30-open: fails the event: {hooks}/30-open is writable by others than root"
        f" (chmod go-w {hooks}/30-open)",
        "frozen: nothing",
        "post_restore: nothing",
        "committed: nothing",
        "on_rollback: nothing",
        "on_failure: nothing",
        "of this host:",
        "  fake       not installed",
        "  refusing   not installed",
    ]


@roots_files
def test_the_list_in_json(hooks: Path) -> None:
    told = json.loads(run("list", "--output", "json").output)
    assert told["schema"] == "phaul-runtime/hooks/1"
    assert (told["directory"], told["timeout_s"]) == (str(hooks.parent), 30)
    assert list(told["events"]) == [
        "pre_check", "pre_freeze", "frozen", "post_restore", "committed", "on_rollback",
        "on_failure",
    ]  # fmt: skip
    assert told["timeouts"] == {"frozen": 2}

    def short(each: dict[str, Any]) -> tuple[str, str, str, bool]:
        return each["command"][0], each["from"], each["effect"], each["problem"] is None

    assert [short(each) for each in told["events"]["pre_freeze"]] == [
        ("sh", "configuration", "runs", True),
        ("no-such", "configuration", "fails", False),
        (f"{hooks}/10-good", "directory", "runs", True),
        (f"{hooks}/20-plain", "directory", "skipped", False),
        (f"{hooks}/30-open", "directory", "fails", False),
    ]
    assert told["events"]["committed"] == []
    assert told["host"][0] == {"name": "fake", "installed": False, "lines": []}


def test_installed_and_removed_twice() -> None:
    assert run("install", "fake").output == "fake: a file was made\nfake: to do: restart it\n"
    done = run("install", "fake")
    assert (done.output, done.exit_code) == ("fake is installed already\n", 0)
    assert "  fake       installed\n    not restarted since\n" in run("list").output
    assert run("remove", "fake").output == "fake: a file was removed\n"
    done = run("remove", "fake")
    assert (done.output, done.exit_code) == ("fake is not installed\n", 0)


@pytest.mark.parametrize("what", ["install", "remove"])
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    assert ends(monkeypatch, what, "podman") == 2
    assert "unknown hook 'podman'\n    hint: there are: fake, refusing" in capsys.readouterr().err
    assert ends(monkeypatch, what, "fake") == 0
    assert ends(monkeypatch, "install", "refusing") == 3
    assert "daemon.json is malformed" in capsys.readouterr().err
    Fake.installed = what == "remove"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert ends(monkeypatch, what, "fake") == 3
    assert "only root can" in capsys.readouterr().err
    assert Fake.installed == (what == "remove")
