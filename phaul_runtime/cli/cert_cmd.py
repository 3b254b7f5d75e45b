"""`phaul-runtime cert`: certificates for tls://."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from phaul_runtime.cli.outlet import show
from phaul_runtime.transport.certs import HOST_DAYS, Host, add_hosts, make_fleet

_Command = TypeVar("_Command", bound=Callable[..., Any])


@click.group("cert")
def cert_group() -> None:
    """Make certificates for a first fleet of hosts that use tls://."""


def _options(command: _Command) -> _Command:
    options = (
        click.argument("directory", type=click.Path(path_type=Path)),
        click.option(
            "--host",
            "hosts",
            multiple=True,
            required=True,
            metavar="NAME[,NAME...]",
            help="A host by the names and addresses in tls://NAME; repeatable.",
        ),
        click.option(
            "--days",
            type=click.IntRange(1, 36500),
            default=HOST_DAYS,
            show_default=True,
            help="How long the hosts' certificates are valid.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@cert_group.command("init")
@_options
def init_command(directory: Path, hosts: tuple[str, ...], days: int) -> None:
    """Make a CA in DIRECTORY, and a directory in it with the files of each host.

    Nothing that exists is overwritten. Keep ca.key: with it everybody can join the fleet, and it is
    needed on no host.
    """
    _tell(make_fleet(directory, [Host.parse(text) for text in hosts], days=days))


@cert_group.command("add")
@_options
def add_command(directory: Path, hosts: tuple[str, ...], days: int) -> None:
    """Make the files of further hosts by the CA in DIRECTORY."""
    _tell(add_hosts(directory, [Host.parse(text) for text in hosts], days=days))


def _tell(places: list[Path]) -> None:
    for place in places:
        show(f"{place}/: copy its files to /etc/phaul-runtime/tls/ on {place.name}")
