"""`phaul-runtime status`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from phaul_runtime.cli.history_cmd import clock, config_option, echo_table, output_option
from phaul_runtime.cli.outlet import show
from phaul_runtime.config.model import load_config
from phaul_runtime.cutover.journal import (
    damaged,
    examine,
    is_locked,
    journal_path,
    open_ends,
    replay,
)
from phaul_runtime.cutover.journal_format import Contents
from phaul_runtime.cutover.progress import read_progress
from phaul_runtime.cutover.states import Role, State
from phaul_runtime.errors import NoSuchMigration

_DAMAGED = "damaged"


@click.command("status")
@click.argument("migration_id", required=False, metavar="[ID]")
@config_option
@output_option
def status_command(migration_id: str | None, config_path: Path | None, output: str) -> None:
    """List the migrations that are not settled on this host, or only ID.

    Says where each stands and since when, whether somebody works on it now, of post-copy how many
    of its pages are missing at the destination, and what to do where nobody works on it. Of one
    whose journal is damaged: where, and what is wrong with it.

    \b
    Exit codes: 0 whatever there is; 3 there is no migration ID here.
    """
    state_dir = Path(load_config(config_path).state_dir)
    if migration_id is None:
        ids = list(dict.fromkeys(end.id for end in open_ends(state_dir)))
    else:
        ids = [migration_id]
    rows = [row for each in ids for row in _ends(state_dir, each)]
    if migration_id is not None and not rows:
        raise NoSuchMigration(
            f"no migration {migration_id} in {state_dir}", hint="phaul-runtime history lists them"
        )
    open_rows = [row for row in rows if not _is_settled(row)]
    if output == "json":
        # Who names a migration is told of it however it stands.
        for row in open_rows if migration_id is None else rows:
            show(json.dumps(row))
        return
    if open_rows:
        _show(open_rows)
    elif migration_id is None:
        show(f"no migration is under way in {state_dir}")
    else:
        ends = ", ".join(f"{row['state']} at its {row['role']}" for row in rows)
        show(f"{migration_id} is settled: {ends}; phaul-runtime show {migration_id} has more")


def _ends(state_dir: Path, migration_id: str) -> Iterator[dict[str, Any]]:
    """What this host has of a migration, a row an end."""
    for role in Role:
        # In this order: where nobody works on it, it stands as it is read then.
        path = journal_path(state_dir, migration_id, role)
        worked_on = is_locked(path)
        contents = examine(path)
        if contents.damage is not None:
            row = _row(state_dir, migration_id, role, contents, worked_on)
            yield {**row, "state": _DAMAGED, "damage": damaged(path, contents.damage).message}
        elif any("state" in record for record in contents.records):
            yield _row(state_dir, migration_id, role, contents, worked_on)


def _is_settled(row: dict[str, Any]) -> bool:
    return row["state"] != _DAMAGED and State(row["state"]).settled


def _row(
    state_dir: Path, migration_id: str, role: Role, contents: Contents, worked_on: bool
) -> dict[str, Any]:
    entered = [record for record in contents.records if "state" in record]
    state, facts = replay(contents.records)
    row = {
        "id": migration_id,
        "role": role.value,
        "engine": facts.get("engine", ""),
        "target": facts.get("target", ""),
        "peer": facts.get("to") or facts.get("peer", ""),
        "state": state.value if state else "",
        "began": entered[0]["time"] if entered else None,
        "since": entered[-1]["time"] if entered else None,
        "worked_on": worked_on,
        "pages": None,
        "missing": None,
    }
    if contents.damage is not None:
        return {**row, "advice": f"phaul-runtime show {migration_id}"}
    if state is State.POST_COPY:
        told = read_progress(state_dir, migration_id, role)
        row |= {name: told[name] for name in ("pages", "missing") if name in told}
    return {**row, "advice": _advice(row)}


def _advice(row: dict[str, Any]) -> str:
    """What to do; empty where somebody does it, or nothing is left to be done."""
    state = State(row["state"])
    if row["worked_on"] or state.settled:
        return ""
    command = f"phaul-runtime recover {row['id']}"
    if state is State.POST_COPY and row["role"] == Role.DESTINATION.value:
        # Only the source has the pages.
        return f"{command} on the source's host" + (f", {row['peer']}" if row["peer"] else "")
    return command


def _show(rows: list[dict[str, Any]]) -> None:
    echo_table(
        [
            {
                **{name: str(row[name]) for name in ("id", "role", "engine", "target", "peer")},
                "state": row["state"],
                "since": clock(row["since"]),
                "worked_on": "yes" if row["worked_on"] else "no",
                "missing": _missing(row),
            }
            for row in rows
        ]
    )
    for row in rows:
        if row["state"] == _DAMAGED:
            show(f"{row['id']}: {row['damage']}: {row['advice']}")
        elif row["advice"]:
            show(f"{row['id']}: nobody works on it: {row['advice']}")


def _missing(row: dict[str, Any]) -> str:
    if row["missing"] is None:
        return ""
    return f"{row['missing']} of {row['pages']} pages"
