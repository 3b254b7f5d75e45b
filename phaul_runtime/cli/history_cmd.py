"""`phaul-runtime history` and `phaul-runtime show`; what all that read journals have in common."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from phaul_runtime.cli.outlet import show
from phaul_runtime.config.model import load_config
from phaul_runtime.cutover.journal import (
    damaged,
    examine,
    journal_path,
    migration_ids,
    read_report,
    replay,
)
from phaul_runtime.cutover.journal_format import Record
from phaul_runtime.cutover.states import Role
from phaul_runtime.errors import NoSuchMigration

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
    rows.sort(key=lambda row: row["began"] or 0)
    if output == "json":
        for row in rows:
            show(json.dumps(row))
        return
    if not rows:
        show(f"no migrations in {state_dir}")
        return
    columns = [name for name in rows[0] if name != "damage"]
    echo_table([{name: _cell(name, row[name]) for name in columns} for row in rows])
    for row in rows:
        if "damage" in row:
            show(f"{row['id']}: {row['damage']}: phaul-runtime show {row['id']}")


def echo_table(rows: Sequence[Mapping[str, str]]) -> None:
    """Print rows, of which there is at least one, below the names of their columns."""
    head = {name: name.replace("_", " ") for name in rows[0]}
    table = [head, *rows]
    widths = {name: max(len(line[name]) for line in table) for name in head}
    for line in table:
        show("  ".join(line[name].ljust(widths[name]) for name in head).rstrip())


def _row(state_dir: Path, migration_id: str, role: Role) -> dict[str, Any] | None:
    path = journal_path(state_dir, migration_id, role)
    contents = examine(path)
    records = contents.records
    if not records and contents.damage is None:
        return None
    state, facts = replay(records)
    row = {
        "id": migration_id,
        "began": records[0]["time"] if records else None,
        "role": role.value,
        "engine": facts.get("engine", ""),
        "target": facts.get("target", ""),
        "peer": facts.get("to") or facts.get("peer", ""),
        "state": state.value if state else "",
        "downtime_ms": facts.get("downtime_ms"),
    }
    if contents.damage is not None:
        row |= {"state": "damaged", "damage": damaged(path, contents.damage).message}
    return row


def _cell(name: str, value: Any) -> str:
    if name == "began":
        return clock(value)
    if name == "downtime_ms" and isinstance(value, int | float):
        return f"{value:.0f}"
    return "" if value is None else str(value)


def clock(seconds: float | None) -> str:
    """A time of a journal for people; empty for none."""
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


@click.command("show")
@click.argument("migration_id", metavar="ID")
@config_option
@output_option
def show_command(migration_id: str, config_path: Path | None, output: str) -> None:
    """Show what this host did in migration ID, step by step, and its report.

    Of a damaged journal it shows what can be read, and what is wrong.
    """
    state_dir = Path(load_config(config_path).state_dir)
    paths = {role.value: journal_path(state_dir, migration_id, role) for role in Role}
    found = {role: examine(path) for role, path in paths.items()}
    ends = {role: each for role, each in found.items() if each.records or each.damage}
    damage = {
        role: damaged(paths[role], each.damage).message
        for role, each in ends.items()
        if each.damage is not None
    }
    report = read_report(state_dir, migration_id)
    if not ends:
        raise NoSuchMigration(
            f"no migration {migration_id} in {state_dir}",
            hint="phaul-runtime history lists them",
        )
    if output == "json":
        told = {role: each.records for role, each in ends.items()} | {"report": report}
        if damage:
            told |= {"damage": damage, "later": {role: ends[role].later for role in damage}}
        show(json.dumps({"id": migration_id, **told}))
        return
    for role, each in ends.items():
        show(f"{role}:")
        _echo_steps(each.records)
        if role in damage:
            show(f"  {damage[role]}")
            if each.later:
                show("  beyond that can be read, and may be wrong:")
                _echo_steps(each.later)
    if report is not None:
        show("report:")
        for name, value in report.items():
            if value not in ("", None, [], {}):
                show(f"  {name:<20} {json.dumps(value)}")


def _echo_steps(records: Sequence[Record]) -> None:
    for record in records:
        facts = ", ".join(f"{k} {v}" for k, v in record.items() if k not in _LONG)
        step = record.get("state") or "note"
        if record.get("add"):
            facts = ", ".join(f"{len(v)} {k}" for k, v in record["add"].items())
        show(f"  {clock(record['time'])}  {step:<11} {facts}".rstrip())
