"""Every command explains itself, and shells complete it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator

import click
import pytest

from phaul_runtime.cli.main import cli
from tests.commandline import run


def commands() -> Iterator[tuple[str, click.Command]]:
    """All of them, by what is typed."""

    def below(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
        context = click.Context(group)
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            assert command is not None
            yield f"{path}{name}", command
            if isinstance(command, click.Group):
                yield from below(command, f"{path}{name} ")

    yield "", cli
    yield from below(cli, "")


ALL = dict(commands())


@pytest.mark.parametrize("path", ALL)
def test_it_has_help_and_so_has_each_option(path: str) -> None:
    command = ALL[path]
    text = command.help or ""
    # Whole sentences, of which the first stands in the list of commands.
    assert text.split("\n\n")[0].strip().endswith((".", ";")), text
    assert "..." not in command.get_short_help_str(limit=100)
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert (parameter.help or "").endswith((".", "]")), parameter.opts
        else:
            word = (parameter.metavar or parameter.name or "").strip("[]").upper()
            assert word in text, f"{word} is not explained"


@pytest.mark.parametrize("path", ALL)
def test_it_can_be_asked(path: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*path.split(), "--help"], prog_name="phaul-runtime")
    assert caught.value.code == 0


@pytest.mark.parametrize("path", [path for path in ALL if not isinstance(ALL[path], click.Group)])
def test_it_has_a_log_level(path: str) -> None:
    assert {"log_level", "log_format"} <= {option.name for option in ALL[path].params}


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch) -> Callable[..., set[str]]:
    def offered(*words: str) -> set[str]:
        """What click offers after `words`, as its script for bash asks."""
        monkeypatch.setenv("_PHAUL_RUNTIME_COMPLETE", "bash_complete")
        monkeypatch.setenv("COMP_WORDS", " ".join(["phaul-runtime", *words]))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        done = run()
        assert done.returncode == 0
        return {line.partition(",")[2] for line in done.stdout.splitlines()}

    return offered


def test_commands_options_and_engines_are_completed(complete: Callable[..., set[str]]) -> None:
    assert complete("mi") == {"migrate"}
    assert complete("config", "") == {"check", "schema"}
    assert "--max-downtime-ms" in complete("migrate", "--max-d")
    assert {"runc", "crun", "docker", "process"} <= complete("migrate", "--engine", "")
    assert complete("migrate", "--engine", "doc") == {"docker"}
    assert complete("migrate", "--mode", "") == {"pre-copy", "post-copy", "hybrid"}
    assert complete("migrate", "--log-format", "j") == {"json", "journal"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_what_is_printed_is_the_shells(shell: str) -> None:
    done = run("completion", shell)
    assert done.returncode == 0
    assert f"_PHAUL_RUNTIME_COMPLETE={shell}_complete" in done.stdout
    assert "phaul-runtime" in done.stdout
    if shutil.which(shell) is None:
        return  # its syntax is the shell's to know
    checked = subprocess.run([shell, "-n"], input=done.stdout, text=True, timeout=60, check=False)
    assert checked.returncode == 0


def test_no_other_shell() -> None:
    done = run("completion", "tcsh")
    assert done.returncode == 2
    assert "tcsh" in done.stderr
