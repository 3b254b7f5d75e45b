"""`ssh://[user@]host[:port]`: the system's ssh, its configuration and keys; nothing listens.

ssh starts the agent and forwards its two unix sockets to this host, into a directory of mode 0700.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from phaul_runtime.errors import UsageError
from phaul_runtime.transport.agent_process import AgentProcess
from phaul_runtime.transport.base import Channel, Destination, Transport, socket_directory
from phaul_runtime.transport.preamble import CONTROL, MEMORY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phaul_runtime.config.model import Config, TransportConfig
    from phaul_runtime.system.cancel import Cancellation

# No questions, no shared connection whose life others decide, no waiting for a dead peer.
_OPTIONS = (
    "BatchMode=yes",
    "ControlMaster=no",
    "ControlPath=none",
    "ExitOnForwardFailure=yes",
    "ServerAliveInterval=5",
    "ServerAliveCountMax=3",
    "RequestTTY=no",
)


class SshTransport(Transport):
    """The destination is reached by ssh."""

    def open(
        self, destination: Destination, config: Config, cancellation: Cancellation, token: str
    ) -> Channel:
        if not destination.host:
            raise UsageError(f"{destination.url!r} names no host", hint="write ssh://root@host")
        there = socket_directory(config.workdir, token)
        # Another name on this side: the destination may be this very host.
        here = there.with_name(f"ssh-{token}")
        login = f"{destination.user}@{destination.host}" if destination.user else destination.host
        by_hand = [*config.transport.ssh_command, "-o", "BatchMode=yes", login]
        channel = AgentProcess(
            destination.host,
            self._argv(destination, config, here, there),
            here,
            owned=True,
            by_hand=shlex.join([*by_hand, *config.transport.agent_command, "--version"]),
        )
        channel.start(config.transport.connect_timeout_s, cancellation)
        return channel

    @staticmethod
    def _argv(destination: Destination, config: Config, here: Path, there: Path) -> list[str]:
        agent = [
            "agent",
            "--sockets",
            str(there),
            "--workdir",
            config.workdir,
            "--state-dir",
            config.state_dir,
            "--criu",
            config.criu.binary,
        ]
        forwards = []
        for name in (CONTROL, MEMORY):
            forwards += ["-L", f"{here / name}:{there / name}"]
        return ssh_argv(destination, config.transport, agent, forwards)


def ssh_argv(
    host: Destination, settings: TransportConfig, arguments: list[str], options: Sequence[str] = ()
) -> list[str]:
    """ssh that runs phaul-runtime with `arguments` at `host`; `options` are further ones of ssh."""
    argv = [*settings.ssh_command]
    for option in (*_OPTIONS, f"ConnectTimeout={max(1, round(settings.connect_timeout_s))}"):
        argv += ["-o", option]
    argv += [*settings.ssh_options, *options]
    if host.port is not None:
        argv += ["-p", str(host.port)]
    if host.user:
        argv += ["-l", host.user]
    # ssh hands one string to the remote shell.
    return [*argv, "--", host.host, shlex.join([*settings.agent_command, *arguments])]
