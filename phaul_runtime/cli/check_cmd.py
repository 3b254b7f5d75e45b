"""`phaul-runtime check`."""

from __future__ import annotations

from pathlib import Path

import click

from phaul_runtime.cli.options import (
    chosen_target,
    config_option,
    configure,
    engine_option,
    ignore_option,
    output_option,
    target_arguments,
    tcp_option,
    to_option,
)
from phaul_runtime.cli.views import make_view
from phaul_runtime.errors import ExitCode
from phaul_runtime.migration import Migration


@click.command("check")
@target_arguments
@engine_option
@to_option
@config_option
@click.option(
    "--files",
    type=click.Choice(["refuse", "copy"]),
    help="Files that the target uses and that differ there.  [default: refuse]",
)
@tcp_option
@ignore_option
@output_option
def check_command(
    target: str | None,
    target_option: str | None,
    engine: str | None,
    to: str | None,
    config_path: Path | None,
    files: str | None,
    tcp_established: bool,
    ignore: tuple[str, ...],
    output: str,
) -> int:
    """Report on both hosts, and on TARGET if one is named; changes nothing.

    \b
    Exit codes: 0 a move may be tried; 3 something refuses.
    """
    flags: dict[str, object] = {
        "engine": engine,
        "transport.to": to,
        "filesystem.files": files,
        "engines.process.tcp_established": True if tcp_established else None,
    }
    config = configure(config_path, flags, ignore)
    if not config.transport.to:
        raise click.UsageError("no destination: --to ssh://root@host, or transport.to")
    view = make_view(output)
    refused = Migration(config, chosen_target(target, target_option), view).check()
    if not refused:
        return 0
    click.echo(
        f"phaul-runtime: {len(refused)} checks refuse: "
        + ", ".join(sorted({f.finding.check for f in refused})),
        err=True,
    )
    return int(ExitCode.REFUSED)
