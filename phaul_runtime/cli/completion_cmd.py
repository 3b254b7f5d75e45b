"""`phaul-runtime completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from phaul_runtime.cli.outlet import show

PROGRAM = "phaul-runtime"
# What click looks for in the environment of the program that is completed.
VARIABLE = "_PHAUL_RUNTIME_COMPLETE"


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion_command(ctx: click.Context, shell: str) -> None:
    """Print what completes phaul-runtime's commands and options in SHELL.

    \b
    bash  phaul-runtime completion bash > /etc/bash_completion.d/phaul-runtime
    zsh   phaul-runtime completion zsh > /usr/local/share/zsh/site-functions/_phaul-runtime
    fish  phaul-runtime completion fish > /etc/fish/completions/phaul-runtime.fish
    """
    found = get_completion_class(shell)
    if found is None:  # pragma: no cover - the choice above has only shells that click knows
        raise click.UsageError(f"unknown shell {shell}")
    show(found(ctx.find_root().command, {}, PROGRAM, VARIABLE).source(), lines=True)
