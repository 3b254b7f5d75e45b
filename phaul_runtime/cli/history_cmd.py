"""`phaul-runtime history` and `phaul-runtime show`; what all that read journals have in common."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from phaul_runtime.config import load_config
from phaul_runtime.errors import NoSuchMigration
from phaul_runtime.journal import migration_ids, read_records, read_report, replay
from phaul_runtime.states import Role

config_option = click.option(
    "--config",
    "config_path",
    type=click.Path(readable=False, path_type=Path),
    metavar="FILE",
    help="Configuration, laid over /etc/phaul-runtime/config.yaml.",
)
output_option = click.option(
    "--output",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="json: one object a line.",
)
# Too long for a table; `--output json` has them.
_LONG = frozenset({"time", "state", "manifest", "options", "identity", "add"})


@click.command("history")
@config_option
@output_option
def history_command(config_path: Path | None, output: str) -> None:
    """List the migrations that this host took part in, oldest first."""
    state_dir = Path(load_config(config_path).state_dir)
    rows = [
        row
        for migration_id in migration_ids(state_dir)
        for role in Role
        if (row := _row(state_dir, migration_id, role))
    ]
    rows.sort(key=lambda row: row["began"])
    if output == "json":
        for row in rows:
            click.echo(json.dumps(row))
        return
    if not rows:
        click.echo(f"no migrations in {state_dir}")
        return
    echo_table([{name: _cell(name, row[name]) for name in row} for row in rows])


def echo_table(rows: Sequence[Mapping[str, str]]) -> None:
    """Print rows, of which there is at least one, below the names of their columns."""
    head = {name: name.replace("_", " ") for name in rows[0]}
    table = [head, *rows]
    widths = {name: max(len(line[name]) for line in table) for name in head}
    for line in table:
        click.echo("  ".join(line[name].ljust(widths[name]) for name in head).rstrip())


def _row(state_dir: Path, migration_id: str, role: Role) -> dict[str, Any] | None:
    records = read_records(state_dir, migration_id, role)
    if not records:
        return None
    state, facts = replay(records)
    return {
        "id": migration_id,
        "began": records[0]["time"],
        "role": role.value,
        "engine": facts.get("engine", ""),
        "target": facts.get("target", ""),
        "peer": facts.get("to") or facts.get("peer", ""),
        "state": state.value if state else "",
        "downtime_ms": facts.get("downtime_ms"),
    }


def _cell(name: str, value: Any) -> str:
    if name == "began":
        return clock(value)
    if name == "downtime_ms":
        return "" if value is None else f"{value:.0f}"
    return str(value)


def clock(seconds: float) -> str:
    """A time of a journal for people."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


@click.command("show")
@click.argument("migration_id", metavar="ID")
@config_option
@output_option
def show_command(migration_id: str, config_path: Path | None, output: str) -> None:
    """Show what this host did in migration ID, step by step, and its report."""
    state_dir = Path(load_config(config_path).state_dir)
    ends = {role: read_records(state_dir, migration_id, role) for role in Role}
    report = read_report(state_dir, migration_id)
    if not any(ends.values()):
        raise NoSuchMigration(
            f"no migration {migration_id} in {state_dir}",
            hint="phaul-runtime history lists them",
        )
    if output == "json":
        journals = {role.value: records for role, records in ends.items() if records}
        click.echo(json.dumps({"id": migration_id, **journals, "report": report}))
        return
    for role, records in ends.items():
        if not records:
            continue
        click.echo(f"{role.value}:")
        for record in records:
            facts = ", ".join(f"{k} {v}" for k, v in record.items() if k not in _LONG)
            step = record.get("state") or "note"
            if record.get("add"):
                facts = ", ".join(f"{len(v)} {k}" for k, v in record["add"].items())
            click.echo(f"  {clock(record['time'])}  {step:<11} {facts}".rstrip())
    if report is not None:
        click.echo("report:")
        for name, value in report.items():
            if value not in ("", None, [], {}):
                click.echo(f"  {name:<20} {json.dumps(value)}")
