"""`local:` moves within one host: an agent of its own, as a child, over unix sockets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phaul_runtime.errors import UsageError
from phaul_runtime.system import proc
from phaul_runtime.transport.agent_process import AgentProcess
from phaul_runtime.transport.base import Channel, Destination, Transport, socket_directory

if TYPE_CHECKING:
    from phaul_runtime.config.model import Config
    from phaul_runtime.system.cancel import Cancellation


class LocalTransport(Transport):
    """The destination is this host."""

    def open(
        self, destination: Destination, config: Config, cancellation: Cancellation, token: str
    ) -> Channel:
        if destination.host or destination.user or destination.port:
            raise UsageError(f"{destination.url!r}: local: takes no host", hint="write local:")
        sockets = socket_directory(config.workdir, token)
        argv = proc.interpreter(
            "phaul_runtime",
            "agent",
            "--sockets",
            str(sockets),
            "--workdir",
            config.workdir,
            "--state-dir",
            config.state_dir,
            "--criu",
            config.criu.binary,
        )
        channel = AgentProcess(
            "local", argv, sockets, owned=False, by_hand="phaul-runtime agent --help"
        )
        channel.start(config.transport.connect_timeout_s, cancellation)
        return channel
