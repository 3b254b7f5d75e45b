"""`phaul-runtime agent`: the destination's side, started by a transport or as a service."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import click

from phaul_runtime import __version__
from phaul_runtime.agent.server import Agent
from phaul_runtime.agent.service import Service, notify
from phaul_runtime.cli.agentmetrics import agent_hooks
from phaul_runtime.cli.logoptions import set_up_logs
from phaul_runtime.cli.outlet import show
from phaul_runtime.config.model import Config, load_config
from phaul_runtime.criu.session import Criu
from phaul_runtime.rpc.protocol import PROTOCOL
from phaul_runtime.system.poll import readable
from phaul_runtime.system.threads import report_deaths

_READ = 4096
_READY = f"phaul-runtime agent ready {PROTOCOL} {__version__}"


@click.command("agent")
@click.option(
    "--sockets",
    type=click.Path(readable=False, path_type=Path),
    metavar="DIR",
    help="Serve one connection: directory to be created for the control and the memory socket.",
)
@click.option(
    "--listen",
    metavar="URL",
    help="Serve as long as it runs: tls://address:port, or tcp:// with --insecure.",
)
@click.option("--insecure", is_flag=True, help="Allow tcp://: a peer that reaches it is root here.")
@click.option(
    "--workdir",
    type=click.Path(readable=False, path_type=Path),
    metavar="DIR",
    help="Private directory for images; best on tmpfs.  [default: of the configuration]",
)
@click.option(
    "--state-dir",
    type=click.Path(readable=False, path_type=Path),
    metavar="DIR",
    help="Directory of the journals; not on tmpfs.  [default: of the configuration]",
)
@click.option(
    "--criu",
    "criu_binary",
    metavar="PROGRAM",
    help="CRIU's binary.  [default: of the configuration]",
)
@click.option(
    "--config",
    "config_path",
    type=click.Path(readable=False, path_type=Path),
    metavar="FILE",
    help="Configuration, laid over /etc/phaul-runtime/config.yaml.",
)
def agent_command(sockets: Path | None, config_path: Path | None, **given: Any) -> None:
    """Serve as the destination of migrations.

    Without --sockets it is a service with a port (--listen, or agent.listen in the configuration)
    until SIGTERM. With --sockets it serves one connection: transports start it so, and it ends with
    its standard input, or when its client gives no sign of life.

    What it has restored and been told to run outlives it.
    """
    config = _configure(config_path, given)
    set_up_logs(config)
    report_deaths()
    if sockets is None:
        _serve(config)
    elif given["listen"]:
        raise click.UsageError("--sockets and --listen exclude each other")
    else:
        _serve_one(sockets, config)


def _configure(path: Path | None, given: dict[str, Any]) -> Config:
    overrides = {
        "workdir": given["workdir"] and str(given["workdir"].absolute()),
        "state_dir": given["state_dir"] and str(given["state_dir"].absolute()),
        "criu.binary": given["criu_binary"],
        "agent.listen": given["listen"],
        "agent.insecure": given["insecure"] or None,
    }
    return load_config(path, {key: value for key, value in overrides.items() if value is not None})


def _wake_on_signals() -> tuple[int, int]:
    """A pipe that becomes readable once a signal asks to end, and its other end."""
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def stop(_number: int, _frame: FrameType | None) -> None:
        """The pipe has it already."""

    # By the C handler, whichever thread the kernel gives the signal to: Python's own runs in the
    # main thread alone, which may be waiting.
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    return wake_read, wake_write


def _serve_one(sockets: Path, config: Config) -> None:
    wake_read, wake_write = _wake_on_signals()
    agent = Agent(
        sockets,
        Path(config.workdir),
        Path(config.state_dir),
        Criu(config.criu.binary),
        on_lost=lambda: os.write(wake_write, b"x"),
        hooks=agent_hooks(config),
        history=config.history,
    )
    agent.start()
    try:
        show(_READY)
        while True:
            ready = readable(0, wake_read)
            if wake_read in ready or not os.read(0, _READ):
                break
    finally:
        agent.stop()


def _serve(config: Config) -> None:
    wake_read, _ = _wake_on_signals()
    service = Service(
        config.agent,
        Path(config.workdir),
        Path(config.state_dir),
        Criu(config.criu.binary),
        agent_hooks(config),
        history=config.history,
    )
    try:
        show(f"{_READY} {service.start()}")
        notify("READY=1")
        readable(wake_read)
        notify("STOPPING=1")
    finally:
        service.stop()
