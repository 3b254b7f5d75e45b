"""Options that several commands share, and the configuration made of them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import click

from phaul_runtime.cli.logoptions import set_up_logs
from phaul_runtime.cli.outlet import tell
from phaul_runtime.config.model import Config, load_config
from phaul_runtime.engine.interface import engine_names
from phaul_runtime.system.cancel import Cancellation

_Command = TypeVar("_Command", bound=Callable[..., Any])


def move_options(command: _Command) -> _Command:
    """What every command about a move takes: target, engine, destination, configuration, checks."""
    options = (
        click.argument("target", required=False),
        click.option(
            "--target",
            "target_option",
            metavar="TARGET",
            help="The target, instead of the argument.",
        ),
        click.option(
            "--engine",
            metavar="NAME",
            shell_complete=lambda *given: [n for n in engine_names() if n.startswith(given[2])],
            help="Engine of the target.  [default: process]",
        ),
        click.option(
            "--to",
            metavar="URL",
            help="Destination: ssh://[user@]host[:port], tls://host[:port] or local:.",
        ),
        click.option(
            "--config",
            "config_path",
            type=click.Path(readable=False, path_type=Path),
            metavar="FILE",
            help="Configuration, laid over /etc/phaul-runtime/config.yaml.",
        ),
        click.option(
            "--files",
            type=click.Choice(["refuse", "copy"]),
            help="Files that the target uses and that differ there.  [default: refuse]",
        ),
        click.option(
            "--restore",
            type=click.Choice(["auto", "lazy", "full"]),
            help="lazy: the copy runs at once, a pager there fills in its memory.  [default: auto]",
        ),
        click.option(
            "--mode",
            type=click.Choice(["pre-copy", "post-copy", "hybrid"]),
            help="post-copy, hybrid: the copy runs there before all of its memory has come; if "
            "either host dies before the last page, the process is lost.  [default: pre-copy]",
        ),
        click.option(
            "--tcp-established",
            is_flag=True,
            help="Carry established TCP connections; their address has to move too.",
        ),
        click.option(
            "--ignore",
            multiple=True,
            metavar="CHECK",
            help="Override one check by its name; repeatable.",
        ),
        click.option(
            "--output",
            type=click.Choice(["text", "json"]),
            default="text",
            show_default=True,
            help="json: one event a line, the report last.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def chosen_target(given: Mapping[str, Any]) -> str:
    """The one target that was named; empty if none was.

    Raises:
        click.UsageError: two different ones were.
    """
    target, option = given["target"], given["target_option"]
    if target and option and target != option:
        raise click.UsageError(f"two targets: {target} and --target {option}")
    return target or option or ""


def configure(given: Mapping[str, Any], **flags: object) -> Config:
    """The configuration with what was given on the command line laid over it.

    Args:
        given: the values of `move_options`.
        flags: further keys, with `__` for the dot.

    Raises:
        ConfigError: a value or the file is wrong.
        click.UsageError: there is no destination.
    """
    overrides: dict[str, object] = {
        "engine": given["engine"],
        "transport.to": given["to"],
        "filesystem.files": given["files"],
        "restore": given["restore"],
        "mode": given["mode"],
        **{name.replace("__", "."): value for name, value in flags.items()},
    }
    overrides = {key: value for key, value in overrides.items() if value is not None}
    config = load_config(given["config_path"], overrides)
    if given["tcp_established"]:
        overrides[f"engines.{config.engine}.tcp_established"] = True
        config = load_config(given["config_path"], overrides)
    if given["ignore"]:
        overrides["checks.ignore"] = [*config.checks.ignore, *given["ignore"]]
        config = load_config(given["config_path"], overrides)
    set_up_logs(config)
    if not config.transport.to:
        raise click.UsageError("no destination: --to ssh://root@host, or transport.to")
    return config


def cancel_on_stdin(cancellation: Cancellation) -> None:
    """From now on a line `cancel` on standard input asks to cancel; its end means nothing.

    A command behind ssh gets no signals.
    """

    def read() -> None:
        said = b""
        # Not by sys.stdin, whose lock a blocked reader would hold when the interpreter ends.
        while data := os.read(0, 4096):
            *lines, said = (said + data).split(b"\n")
            if b"cancel" in (line.strip() for line in lines):
                _ask(cancellation)

    threading.Thread(target=read, name="stdin", daemon=True).start()


def _ask(cancellation: Cancellation) -> None:
    if cancellation.request():
        tell("phaul-runtime: cancelling; the source runs on")
    else:
        tell("phaul-runtime: too late to cancel; finishing")


@contextmanager
def cancel_on_signals(cancellation: Cancellation) -> Iterator[None]:
    """While in here, the signals of `on_signals` ask to cancel; past the point of no return they
    mean nothing.
    """

    def ask(_number: int, _frame: FrameType | None) -> None:
        _ask(cancellation)

    with on_signals(ask):
        yield


@contextmanager
def on_signals(ask: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """While in here, SIGINT, SIGTERM and SIGHUP (the terminal is gone) call `ask`.

    A SIGHUP that is ignored from the start stays so: `nohup` asks for it.
    """
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
