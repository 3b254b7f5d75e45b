"""`phaul-runtime hook`: what runs at the steps of a move, and what a host needs once."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from phaul_runtime.cli.outlet import show
from phaul_runtime.config.model import load_config
from phaul_runtime.errors import Refused
from phaul_runtime.hooks.directory import Effect, Program
from phaul_runtime.hooks.lifecycle import EVENTS
from phaul_runtime.hosthooks import host_hook_names, load_host_hook

_SCHEMA = "phaul-runtime/hooks/1"
_MARKS = {Effect.RUNS: "ok", Effect.SKIPPED: "warn", Effect.FAILS: "NO"}
_EFFECTS = {
    Effect.RUNS: "",
    Effect.SKIPPED: "warning: is skipped: ",
    Effect.FAILS: "fails the event: ",
}


@click.group("hook")
def hook_group() -> None:
    """List this host's hooks, or make it ready for an engine's."""


@hook_group.command("list")
@click.option(
    "--config",
    "config_path",
    type=click.Path(readable=False, path_type=Path),
    metavar="FILE",
    help="Configuration, laid over /etc/phaul-runtime/config.yaml.",
)
@click.option(
    "--output",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="json: one object.",
)
def list_hooks(config_path: Path | None, output: str) -> None:
    """List what runs at each event, in that order, and what can be installed."""
    config = load_config(config_path).hooks
    hooks = config.hooks()
    events = {event: hooks.programs(event) for event in EVENTS}
    host = {name: load_host_hook(name).status() for name in host_hook_names()}
    if output == "json":
        told = {
            "schema": _SCHEMA,
            "directory": config.directory,
            "timeout_s": config.timeout_s,
            "timeouts": config.timeouts,
            "events": {event: [_json(each) for each in found] for event, found in events.items()},
            "host": [
                {"name": name, "installed": status.installed, "lines": list(status.lines)}
                for name, status in host.items()
            ],
        }
        show(json.dumps(told))
        return
    for event, found in events.items():
        show(f"{event}:" if found else f"{event}: nothing")
        for program in found:
            show(f"  {_MARKS[program.effect]:<4} {_text(program)}")
    show("of this host:" if host else "of this host: nothing")
    for name, status in host.items():
        show(f"  {name:<10} {'installed' if status.installed else 'not installed'}")
        for line in status.lines:
            show(f"    {line}")


def _json(program: Program) -> dict[str, Any]:
    return {
        "command": list(program.argv),
        "from": "directory" if program.listed else "configuration",
        "effect": program.effect.value,
        "problem": program.wrong or None,
        "hint": program.hint or None,
    }


def _text(program: Program) -> str:
    text = " ".join(program.argv)
    if program.wrong:
        text += f": {_EFFECTS[program.effect]}{program.wrong}"
    return f"{text} ({program.hint})" if program.hint else text


@hook_group.command("install")
@click.argument("name")
def install_hook(name: str) -> None:
    """Make this host ready for NAME, as docker; once, as root.

    \b
    Exit codes: 0 it is ready, or is once what is printed was done; 2 unknown
    NAME; 3 if it is refused (nothing is changed).
    """
    hook = load_host_hook(name)
    _require_root("install")
    _say(name, hook.install(), "is installed already")


@hook_group.command("remove")
@click.argument("name")
def remove_hook(name: str) -> None:
    """Undo what `hook install NAME` changed, and nothing else; as root."""
    hook = load_host_hook(name)
    _require_root("remove")
    _say(name, hook.remove(), "is not installed")


def _require_root(what: str) -> None:
    if os.geteuid() != 0:
        raise Refused(f"hook {what} changes this host: only root can", hint="run it as root")


def _say(name: str, lines: Sequence[str], nothing: str) -> None:
    if not lines:
        show(f"{name} {nothing}")
    for line in lines:
        show(f"{name}: {line}")
