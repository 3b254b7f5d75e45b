"""`phaul-runtime recover`."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import click

from phaul_runtime.cli.logoptions import set_up_logs
from phaul_runtime.cli.outlet import echo, tell
from phaul_runtime.cli.views import Aside, move_view
from phaul_runtime.config.model import load_config
from phaul_runtime.cutover.states import Verdict
from phaul_runtime.errors import ExitCode, OutcomeUnknown, PhaulError
from phaul_runtime.events import nobody
from phaul_runtime.recovery.recover import Recovered, Recovery


@click.command("recover")
@click.argument("migration_id", required=False, metavar="[ID]")
@click.option(
    "--to",
    metavar="URL",
    help="The other host, where it is not the destination that the journal names.",
)
@click.option(
    "--config",
    "config_path",
    type=click.Path(readable=False, path_type=Path),
    metavar="FILE",
    help="Configuration, laid over /etc/phaul-runtime/config.yaml.",
)
@click.option(
    "--source-is-dead",
    is_flag=True,
    help="At the destination: run its copy, since the source's host will never come back.",
)
@click.option(
    "--output",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="json: one object a migration.",
)
def recover_command(
    migration_id: str | None,
    to: str | None,
    config_path: Path | None,
    source_is_dead: bool,
    output: str,
) -> int:
    """Finish or undo migration ID, or all that are not settled on this host.

    Reads the journals of both hosts: either the source's copy runs and the destination is
    cleaned, or the destination's runs. May be repeated, and run on either host.

    \b
    Exit codes: 0 settled (or nothing to do); 3 refused, as while a migration is
    still under way; 5 not to be settled now: the message says what is missing, or
    which journal is damaged.
    """
    if source_is_dead and migration_id is None:
        raise click.UsageError("--source-is-dead is about one migration: name its ID")
    config = load_config(config_path, {"transport.to": to} if to else None)
    set_up_logs(config)
    # Its session may drop: what it does is the same without anybody who looks on.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with move_view("text") as view:
        listener = view if output == "text" else nobody
        recovery = Recovery(config, source_is_dead=source_is_dead, listener=listener)
        if migration_id is None:
            return _all(recovery, view, output)
        recovered = recovery.recover(migration_id)
        view.flush()
        _show(recovered, output)
    return 0


def _all(recovery: Recovery, view: Aside, output: str) -> int:
    """Each that is not settled; returns the exit code."""
    worst = 0
    damaged = recovery.damaged()
    for each, damage in damaged:
        tell(f"phaul-runtime: {each}: {damage}")
        worst = int(ExitCode.UNKNOWN)
    waiting = [each for each in recovery.waiting() if each not in dict(damaged)]
    for each in waiting:
        try:
            recovered = recovery.recover(each)
            view.flush()
            _show(recovered, output)
        except PhaulError as error:
            tell(f"phaul-runtime: {each}: {error}")
            unknown = isinstance(error, OutcomeUnknown)
            worst = max(worst, int(ExitCode.UNKNOWN if unknown else error.exit_code))
    swept = recovery.sweep()
    if output == "text":
        for path in swept:
            echo(f"removed {path}")
        if not waiting and not swept and not damaged:
            echo("nothing to recover")
    return worst


def _show(recovered: Recovered, output: str) -> None:
    if output == "json":
        echo(
            json.dumps(
                {
                    "id": recovered.id,
                    "verdict": recovered.verdict.value,
                    "reason": recovered.reason,
                    "restored_pid": recovered.pid or None,
                    "warnings": list(recovered.warnings),
                }
            )
        )
        return
    if recovered.verdict is Verdict.RUN:
        what = "the destination's copy is the one"
        what += f", pid {recovered.pid}" if recovered.pid else ""
    else:
        what = "the source's copy is the one; the destination's is discarded"
    echo(f"{recovered.id}: {what} ({recovered.reason})")
    for warning in recovered.warnings:
        echo(f"  warning: {warning}")
