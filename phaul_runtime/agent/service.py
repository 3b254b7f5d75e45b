"""The agent as a service: one port, many migrations, until it is told to stop.

What it has restored and been told to run outlives it: each restored tree, and each pager that still
fills one, has a cgroup of its own (`cgroup`), and the unit ends only the service's main process.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import socket
import ssl
from collections.abc import Mapping
from pathlib import Path

from phaul_runtime.agent.server import Agent
from phaul_runtime.config.model import AgentConfig
from phaul_runtime.criu.session import Criu
from phaul_runtime.cutover import orphans
from phaul_runtime.cutover.journal import KEPT, is_locked
from phaul_runtime.errors import Refused, UsageError
from phaul_runtime.hooks.lifecycle import Hooks
from phaul_runtime.memory.image_dirs import remove_tree
from phaul_runtime.preflight.wiring import STANDARD, Wiring
from phaul_runtime.transport.base import socket_directory
from phaul_runtime.transport.handshake import parse_listen
from phaul_runtime.transport.listener import PortListener, Secure
from phaul_runtime.transport.mutual_tls import Credentials, as_server
from phaul_runtime.transport.preamble import CONTROL

# For hooks, and for the pagers of copies that have just begun to run.
_SETTLE_S = 30.0


class Service:
    """An `Agent` behind a port.

    Args:
        config: its `listen` has the address.
        workdir: private directory for images and the agent's sockets.
        state_dir: of the journals.
        criu: a session factory.
        hooks: of this host.
        history: how many settled migrations are remembered.

    Raises:
        UsageError: the address is malformed.
        Refused: `tcp://` without `insecure`, or `tls://` without certificates.
    """

    def __init__(
        self,
        config: AgentConfig,
        workdir: Path,
        state_dir: Path,
        criu: Criu,
        hooks: Hooks,
        *,
        history: int = KEPT,
        wiring: Wiring = STANDARD,
    ) -> None:
        if config.listen is None:
            raise UsageError("no address to listen on", hint="--listen tls://0.0.0.0:7007")
        self._workdir, self._state_dir = workdir, state_dir
        self._scheme, self._host, self._port = parse_listen(config.listen)
        if self._scheme == "tcp" and not config.insecure:
            raise Refused(
                "tcp:// lets every peer that reaches the port restore processes as root",
                hint="use tls://, or set agent.insecure: true",
            )
        # By its address, so that the next one finds what this one could not put away.
        token = hashlib.sha256(config.listen.encode()).hexdigest()[:16]
        self._sockets = socket_directory(str(workdir), token)
        allowed = config.allowed()
        if config.allow is not None and self._scheme == "tcp":
            raise Refused(
                "agent.allow is about certificates, and tcp:// has none", hint="use tls://"
            )
        self._agent = Agent(
            self._sockets,
            workdir,
            state_dir,
            criu,
            hooks=hooks,
            history=history,
            allowed=allowed,
            wiring=wiring,
        )
        secure: Secure | None = None
        if self._scheme == "tls":
            credentials = Credentials(config.ca, config.cert, config.key)
            credentials.load(ssl.PROTOCOL_TLS_SERVER)
            secure = functools.partial(as_server, credentials)
        self._front = PortListener(
            self._sockets / CONTROL,
            self._agent.callers,
            self._agent.take_stream,
            allowed.enter,
            secure,
        )

    def start(self) -> str:
        """Listen; returns the address with the port that it has.

        Raises:
            Refused: another one does, or something cannot be made.
        """
        # What an agent left that was killed, or that left a pager at work: a pager has what it
        # needs open.
        orphans.sweep(self._workdir, self._state_dir)
        if self._sockets.exists():
            if is_locked(self._sockets):
                raise Refused("another agent serves this address", hint=f"it has {self._sockets}")
            remove_tree(self._sockets)
        self._agent.start()
        try:
            port = self._front.start(self._host, self._port)
        except Refused:
            self._agent.stop()
            raise
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{self._scheme}://{host}:{port}"

    def stop(self) -> None:
        """Discard what was not committed, and go; what was committed runs on. Idempotent."""
        self._front.stop()
        self._agent.stop(settle_within_s=_SETTLE_S)


def notify(state: str, environment: Mapping[str, str] = os.environ) -> None:
    """Tell systemd, if it asked to be told: `READY=1`, `STOPPING=1`."""
    address = environment.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel, contextlib.suppress(OSError):
        channel.sendto(state.encode(), address)
