"""Options that several commands share, and the configuration made of them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import click

from phaul_runtime.cancel import Cancellation
from phaul_runtime.config import Config, load_config

_Command = TypeVar("_Command", bound=Callable[..., Any])

config_option = click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Configuration, laid over /etc/phaul-runtime/config.yaml.",
)
to_option = click.option("--to", metavar="URL", help="Destination: ssh://[user@]host or local:.")
engine_option = click.option("--engine", metavar="NAME", help="Engine of the target: process.")
ignore_option = click.option(
    "--ignore", multiple=True, metavar="CHECK", help="Override one check by its name; repeatable."
)
tcp_option = click.option(
    "--tcp-established",
    is_flag=True,
    help="Carry established TCP connections; their address has to move too.",
)
output_option = click.option(
    "--output",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="json: one event a line, the report last.",
)


def target_arguments(command: _Command) -> _Command:
    """The target: an argument, or `--target`."""
    command = click.option(
        "--target", "target_option", metavar="TARGET", help="The target, instead of the argument."
    )(command)
    return click.argument("target", required=False)(command)


def chosen_target(target: str | None, option: str | None) -> str:
    """The one target that was named; empty if none was.

    Raises:
        click.UsageError: two different ones were.
    """
    if target and option and target != option:
        raise click.UsageError(f"two targets: {target} and --target {option}")
    return target or option or ""


def configure(path: Path | None, flags: dict[str, object], ignore: tuple[str, ...]) -> Config:
    """The configuration with the flags that were given laid over it."""
    overrides = {key: value for key, value in flags.items() if value is not None}
    config = load_config(path, overrides)
    if ignore:
        names = [*config.checks.ignore, *ignore]
        config = load_config(path, {**overrides, "checks.ignore": names})
    return config


@contextmanager
def cancel_on_signals(cancellation: Cancellation) -> Iterator[None]:
    """While in here, SIGINT and SIGTERM ask to cancel; past the point of no return they wait."""

    def ask(_number: int, _frame: FrameType | None) -> None:
        if cancellation.request():
            click.echo("phaul-runtime: cancelling; the source runs on", err=True)
        else:
            click.echo("phaul-runtime: too late to cancel; finishing", err=True)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
