"""`--log-level` and `--log-format`, which every command has, and the configuration beneath them."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import click

from phaul_runtime.system import logs

if TYPE_CHECKING:
    from phaul_runtime.config.model import Config

_META = "phaul_runtime.logging"


def _remember(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None:
        ctx.meta.setdefault(_META, {})[param.name] = value
        set_up_logs()
    return value


def log_options() -> list[click.Option]:
    """The options that every command has."""
    return [
        click.Option(
            ["--log-level"],
            type=click.Choice(logs.LEVELS),
            expose_value=False,
            callback=_remember,
            help="Log to stderr what is this or worse.  [default: logging.level]",
        ),
        click.Option(
            ["--log-format"],
            type=click.Choice(logs.FORMATS),
            expose_value=False,
            callback=_remember,
            help="How: auto is journal under systemd, else text.  [default: logging.format]",
        ),
    ]


def set_up_logs(config: Config | None = None) -> None:
    """Log as the command line says, where it says nothing as the configuration does."""
    given = _given()
    level = given.get("log_level") or (config.logging.level if config else None)
    style = given.get("log_format") or (config.logging.format if config else "auto")
    logs.set_up(cast(logs.Level, level or "warning"), cast(logs.Format, style))


def _given() -> dict[str, str]:
    context = click.get_current_context(silent=True)
    return dict(context.meta.get(_META, {})) if context else {}


def asked_level() -> str:
    """The level of the command line; empty if it names none."""
    return _given().get("log_level", "")
