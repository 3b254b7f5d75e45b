"""`phaul-runtime`: the entry point, and how errors end it."""

from __future__ import annotations

import errno
import io
import sys
from importlib import import_module

import click

from phaul_runtime import __version__
from phaul_runtime.cli.logoptions import log_options
from phaul_runtime.cli.outlet import flush, open_standard, tell
from phaul_runtime.errors import ExitCode, PhaulError

PROGRAM = "phaul-runtime"
# Of a command whose output is what it is for; a move goes on without (`outlet.echo`).
_UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
# Loaded when used: an agent starts without what only the client needs.
_COMMANDS = {
    "migrate": ("phaul_runtime.cli.migrate_cmd", "migrate_command"),
    "check": ("phaul_runtime.cli.check_cmd", "check_command"),
    "recover": ("phaul_runtime.cli.recover_cmd", "recover_command"),
    "status": ("phaul_runtime.cli.status_cmd", "status_command"),
    "history": ("phaul_runtime.cli.history_cmd", "history_command"),
    "show": ("phaul_runtime.cli.history_cmd", "show_command"),
    "batch": ("phaul_runtime.cli.batch_cmd", "batch_group"),
    "agent": ("phaul_runtime.cli.agent_cmd", "agent_command"),
    "cert": ("phaul_runtime.cli.cert_cmd", "cert_group"),
    "hook": ("phaul_runtime.cli.hook_cmd", "hook_group"),
    "config": ("phaul_runtime.cli.config_cmd", "config_group"),
    "completion": ("phaul_runtime.cli.completion_cmd", "completion_command"),
}


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, attribute = _COMMANDS[cmd_name]
        command: click.Command = getattr(import_module(module), attribute)
        _add_log_options(command)
        return command


def _add_log_options(command: click.Command) -> None:
    """Give a command, and those below it, what all of them have."""
    if isinstance(command, click.Group):
        for each in command.commands.values():
            _add_log_options(each)
    elif not any(option.name == "log_level" for option in command.params):
        command.params.extend(log_options())


@click.command(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name=PROGRAM)
def cli() -> None:
    """Move running processes and containers between Linux hosts with CRIU."""


def main() -> None:
    """Run the command line and end with the exit code of errors.py."""
    open_standard()
    try:
        code = _main()
    finally:
        flush()
    sys.exit(code)


def _main() -> int:
    try:
        code = cli.main(prog_name=PROGRAM, standalone_mode=False)
    except click.exceptions.Abort:
        tell("phaul-runtime: cancelled")
        return ExitCode.CANCELLED
    except click.ClickException as error:
        said = io.StringIO()
        error.show(said)
        tell(said.getvalue().rstrip())
        return ExitCode.USAGE
    except PhaulError as error:
        tell(f"phaul-runtime: {error}")
        return error.exit_code
    except BrokenPipeError:
        return ExitCode.INTERNAL
    except OSError as error:
        if error.errno not in _UNWRITTEN:
            raise
        tell(f"phaul-runtime: the output cannot be written: {error.strerror}")
        return ExitCode.INTERNAL
    return code if isinstance(code, int) else 0
