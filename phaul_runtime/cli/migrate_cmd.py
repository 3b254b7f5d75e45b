"""`phaul-runtime migrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from phaul_runtime.cli.observe import Observer
from phaul_runtime.cli.options import (
    cancel_on_signals,
    cancel_on_stdin,
    chosen_target,
    configure,
    move_options,
)
from phaul_runtime.cli.outlet import tell
from phaul_runtime.cli.views import move_view
from phaul_runtime.cutover.journal import checked_id
from phaul_runtime.errors import PhaulError
from phaul_runtime.source.idempotent import migrate_once
from phaul_runtime.source.migration import Migration
from phaul_runtime.system.cancel import Cancellation


@click.command("migrate")
@move_options
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
@click.option(
    "--id",
    "migration_id",
    metavar="HEX",
    help="Name the migration; asked again with the same, it reports the outcome and moves "
    "nothing twice.",
)
@click.option(
    "--stdin",
    "stdin_cancels",
    is_flag=True,
    help="Read standard input: a line `cancel` is what Ctrl-C is.",
)
@click.option(
    "--metrics-file",
    type=click.Path(readable=False, path_type=Path),
    metavar="FILE",
    help="Add to the metrics in FILE, NAME.prom.  [default: metrics.textfile]",
)
@click.option("--dry-run", is_flag=True, help="Check everything, move nothing.")
def migrate_command(
    *,
    max_downtime_ms: int | None,
    max_iterations: int | None,
    migration_id: str | None,
    stdin_cancels: bool,
    metrics_file: Path | None,
    dry_run: bool,
    **given: Any,
) -> int:
    """Move TARGET to another host while it runs.

    TARGET is a PID with --engine process, a container's name with --engine runc
    or crun.

    \b
    Exit codes: 0 moved; 1 internal error; 2 usage or configuration; 3 refused by
    a check; 4 failed, the source still runs; 5 outcome unknown: run recover;
    6 cancelled.
    """
    name = chosen_target(given)
    if not name:
        raise click.UsageError("no target: a PID, or with --engine runc a container's name")
    config = configure(
        given, policy__max_downtime_ms=max_downtime_ms, policy__max_iterations=max_iterations
    )
    cancellation = Cancellation()
    view = move_view(given["output"])
    observer = Observer(config, view, metrics_file)
    migration = Migration(config, name, observer, cancellation)
    if migration_id is not None:
        migration.id = checked_id(migration_id)
    if stdin_cancels:
        cancel_on_stdin(cancellation)
    try:
        with cancel_on_signals(cancellation), view:
            if migration_id is not None and not dry_run:
                report = migrate_once(migration)
            else:
                report = migration.run(dry_run=dry_run)
    except PhaulError as error:
        report = migration.failed(error)
        said = str(error)
    else:
        said = report.error
    # What was measured is kept, whatever becomes of the display.
    observer.report(report)
    view.report(report)
    if report.exit_code:
        tell(f"phaul-runtime: {said}")
    return report.exit_code
