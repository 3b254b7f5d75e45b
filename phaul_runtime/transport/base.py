"""Transports: each opens a control channel and a memory channel to an agent.

Found by entry points (`phaul_runtime.transports`), named by the scheme of the destination.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from phaul_runtime.errors import ChannelError, UsageError
from phaul_runtime.transport.preamble import ID_BYTES

if TYPE_CHECKING:
    import socket

    from phaul_runtime.config.model import Config
    from phaul_runtime.system.cancel import Cancellation

GROUP = "phaul_runtime.transports"


@dataclass(frozen=True)
class Destination:
    """Where to move to: `ssh://[user@]host[:port]`, `tls://host[:port]`, `local:`."""

    url: str
    scheme: str
    host: str = ""
    user: str = ""
    port: int | None = None

    @property
    def name(self) -> str:
        """What messages call that host."""
        return self.host or self.scheme

    @classmethod
    def parse(cls, url: str) -> Destination:
        """Take a destination's URL apart.

        Raises:
            UsageError: it is malformed.
        """
        example = "for example ssh://root@host or local:"
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise UsageError(f"malformed destination {url!r}: {error}", hint=example) from error
        if not parts.scheme:
            raise UsageError(f"destination {url!r} names no transport", hint=example)
        if parts.path.strip("/") or parts.query or parts.fragment or parts.password:
            raise UsageError(f"destination {url!r} has more than user, host and port", hint=example)
        host = parts.hostname or ""
        if host.startswith("-") or (parts.username or "").startswith("-"):
            raise UsageError(f"malformed destination {url!r}", hint=example)
        return cls(url, parts.scheme, host, parts.username or "", port)


class Channel(ABC):
    """An open way to one agent."""

    name: str
    certificate = ""
    """The name of the one that the agent has shown; empty where none is asked for."""

    @abstractmethod
    def control_target(self) -> str:
        """The gRPC target of the control channel."""

    @abstractmethod
    def connect(self) -> socket.socket:
        """A new connection to the agent's memory socket; nothing is sent on it yet.

        Raises:
            ChannelError: it cannot be opened.
        """

    def open_memory(self, migration_id: str) -> socket.socket:
        """A new memory connection, its preamble sent.

        Raises:
            ChannelError: it cannot be opened.
        """
        return self._claim(migration_id)

    def open_stream(self, migration_id: str, name: str) -> socket.socket:
        """A new connection for the tree `name` of a migration, its preamble sent.

        Raises:
            ChannelError: it cannot be opened.
        """
        return self._claim(f"{migration_id} {name}")

    def _claim(self, preamble: str) -> socket.socket:
        padded = preamble.ljust(ID_BYTES).encode("ascii", "replace")
        if len(padded) > ID_BYTES:
            raise ChannelError(f"{preamble[:80]!r} is too long for a channel", host=self.name)
        channel = self.connect()
        try:
            channel.sendall(padded)
        except OSError as error:
            channel.close()
            raise ChannelError(
                f"the memory channel broke: {error.strerror}", host=self.name
            ) from error
        return channel

    @abstractmethod
    def trouble(self) -> str:
        """What the transport itself says of a broken channel; empty if it says nothing."""

    @abstractmethod
    def close(self) -> None:
        """End the channel, and the agent if it was started for it; idempotent."""


class Transport(ABC):
    """A way to reach agents."""

    @abstractmethod
    def open(
        self, destination: Destination, config: Config, cancellation: Cancellation, token: str
    ) -> Channel:
        """Open a channel; `token` names its directories, unused on both hosts.

        Raises:
            DestinationUnreachable: no agent answers there; the message says why.
            UsageError: the destination makes no sense for this transport.
        """


def load_transport(destination: Destination) -> Transport:
    """The transport for a destination's scheme.

    Raises:
        UsageError: there is none; the message names those that there are.
    """
    for entry in entry_points(group=GROUP, name=destination.scheme):
        transport: Transport = entry.load()()
        return transport
    names = ", ".join(sorted(entry.name for entry in entry_points(group=GROUP)))
    raise UsageError(
        f"unknown transport {destination.scheme!r} in {destination.url!r}",
        hint=f"installed transports: {names or 'none'}",
    )


def socket_directory(workdir: str, token: str) -> Path:
    """Where the agent that serves one channel has its sockets."""
    return Path(workdir) / f"agent-{token}"


def link_directory(workdir: str, token: str) -> Path:
    """Where the client of an agent that is a service has its control socket."""
    return Path(workdir) / f"link-{token}"
