"""`phaul-runtime migrate`."""

from __future__ import annotations

from pathlib import Path

import click

from phaul_runtime.cancel import Cancellation
from phaul_runtime.cli.options import (
    cancel_on_signals,
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
from phaul_runtime.errors import PhaulError
from phaul_runtime.migration import Migration


@click.command("migrate")
@target_arguments
@engine_option
@to_option
@config_option
@click.option(
    "--files",
    type=click.Choice(["refuse", "copy"]),
    help="Files that the target uses and that differ there.  [default: refuse]",
)
@click.option(
    "--max-downtime-ms",
    type=click.IntRange(min=1),
    metavar="N",
    help="Iterate until the expected freeze fits.  [default: 300]",
)
@click.option(
    "--max-iterations",
    type=click.IntRange(min=1),
    metavar="N",
    help="Pre-dump rounds at the most.  [default: 8]",
)
@tcp_option
@ignore_option
@click.option("--dry-run", is_flag=True, help="Check everything, move nothing.")
@output_option
def migrate_command(
    target: str | None,
    target_option: str | None,
    engine: str | None,
    to: str | None,
    config_path: Path | None,
    files: str | None,
    max_downtime_ms: int | None,
    max_iterations: int | None,
    tcp_established: bool,
    ignore: tuple[str, ...],
    dry_run: bool,
    output: str,
) -> int:
    """Move TARGET (with --engine process: a PID) to another host while it runs.

    \b
    Exit codes: 0 moved; 1 internal error; 2 usage or configuration; 3 refused by
    a check; 4 failed, the source still runs; 5 outcome unknown; 6 cancelled.
    """
    name = chosen_target(target, target_option)
    if not name:
        raise click.UsageError("no target: name a PID, as in migrate --engine process PID")
    flags: dict[str, object] = {
        "engine": engine,
        "transport.to": to,
        "filesystem.files": files,
        "policy.max_downtime_ms": max_downtime_ms,
        "policy.max_iterations": max_iterations,
        "engines.process.tcp_established": True if tcp_established else None,
    }
    config = configure(config_path, flags, ignore)
    if not config.transport.to:
        raise click.UsageError("no destination: --to ssh://root@host, or transport.to")
    cancellation = Cancellation()
    view = make_view(output)
    migration = Migration(config, name, view, cancellation)
    with cancel_on_signals(cancellation):
        try:
            with view:
                report = migration.run(dry_run=dry_run)
        except PhaulError as error:
            view.report(migration.failed(error))
            click.echo(f"phaul-runtime: {error}", err=True)
            return int(error.exit_code)
    view.report(report)
    return 0
