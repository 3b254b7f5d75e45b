"""`phaul-runtime agent`: what transports start at the destination."""

from __future__ import annotations

import logging
import os
import select
import signal
from pathlib import Path
from types import FrameType

import click

from phaul_runtime import __version__
from phaul_runtime.agent import Agent
from phaul_runtime.config import load_config
from phaul_runtime.criu import Criu
from phaul_runtime.hostfacts import PROTOCOL

_READ = 4096


@click.command("agent")
@click.option(
    "--sockets",
    required=True,
    type=click.Path(readable=False, path_type=Path),
    metavar="DIR",
    help="Directory to be created for the control and the memory socket.",
)
@click.option(
    "--workdir",
    default="/run/phaul",
    show_default=True,
    type=click.Path(readable=False, path_type=Path),
    metavar="DIR",
    help="Private directory for images; best on tmpfs.",
)
@click.option(
    "--state-dir",
    default="/var/lib/phaul-runtime",
    show_default=True,
    type=click.Path(readable=False, path_type=Path),
    metavar="DIR",
    help="Directory of the journals; not on tmpfs.",
)
@click.option(
    "--criu",
    "criu_binary",
    default="criu",
    show_default=True,
    metavar="PROGRAM",
    help="CRIU's binary.",
)
def agent_command(sockets: Path, workdir: Path, state_dir: Path, criu_binary: str) -> None:
    """Serve one connection as the destination; ends with its standard input.

    Transports start it; there is no need to run it by hand. It also ends when its client gives no
    sign of life. What it has restored and been told to run outlives it.
    """
    logging.basicConfig(
        format="phaul-runtime agent: %(levelname)s: %(message)s", level=logging.WARNING
    )
    wake_read, wake_write = os.pipe()

    def stop(_number: int, _frame: FrameType | None) -> None:
        os.write(wake_write, b"x")

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    agent = Agent(
        sockets,
        workdir,
        state_dir,
        Criu(criu_binary),
        on_lost=lambda: os.write(wake_write, b"x"),
        hooks=load_config().hooks.hooks(),
    )
    agent.start()
    try:
        click.echo(f"phaul-runtime agent ready {PROTOCOL} {__version__}")
        while True:
            readable, _, _ = select.select([0, wake_read], [], [])
            if wake_read in readable or not os.read(0, _READ):
                break
    finally:
        agent.stop()
