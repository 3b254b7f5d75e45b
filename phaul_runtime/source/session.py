"""Channel, agent and working directory of one migration, from the source's side."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phaul_runtime.cutover.journal import lock_directory
from phaul_runtime.errors import DestinationUnreachable, OutcomeUnknown, PhaulError, Refused
from phaul_runtime.memory.image_dirs import remove_tree
from phaul_runtime.rpc.client import RemoteAgent
from phaul_runtime.rpc.connect import Transports, agent_on
from phaul_runtime.system.cancel import Cancellation
from phaul_runtime.transport.base import Channel, Destination, load_transport
from phaul_runtime.transport.image_proxy import ImageProxy, ProxiedChannel

if TYPE_CHECKING:
    from phaul_runtime.config.model import Config


class Session:
    """Channel, agent and working directory of one migration, and their clean-up.

    Args:
        config: as loaded.
        destination: to be reached.
        migration_id: of the migration.
        cancellation: ends the waits.
        roll_back: called where the block ends with an error that is no `OutcomeUnknown`, with the
            channel still open.
        token: names the channel's directories; the id by default.
        transports: find one by a destination.
    """

    def __init__(
        self,
        config: Config,
        destination: Destination,
        migration_id: str,
        cancellation: Cancellation,
        roll_back: Callable[[Session, BaseException], object],
        *,
        token: str = "",
        transports: Transports = load_transport,
    ) -> None:
        self._transports = transports
        self._config = config
        self._destination = destination
        self._id = migration_id
        self._cancellation = cancellation
        self._roll_back = roll_back
        self._proxy: ImageProxy | None = None
        self._token = token or migration_id
        self._channel: Channel | None = None
        self._memory: socket.socket | None = None
        self._workdir: Path | None = None
        self._workdir_lock = -1
        self.agent: RemoteAgent

    def __enter__(self) -> Session:
        self._proxy = ImageProxy.of(self._config.transport)
        self._channel = self._transports(self._destination).open(
            self._destination, self._config, self._cancellation, self._token
        )
        try:
            if self._proxy is not None:
                self._channel = ProxiedChannel(self._channel, self._proxy)
            self.agent = agent_on(self._channel, self._config, self._cancellation)
        except BaseException:
            self._channel.close()
            raise
        return self

    @property
    def certificate(self) -> str:
        """The name of the agent's; see `Channel`."""
        return "" if self._channel is None else self._channel.certificate

    @property
    def link_bytes(self) -> int | None:
        """What memory and trees were on the link, if an image proxy counted it."""
        return None if self._proxy is None else self._proxy.counts.sent

    def make_workdir(self) -> Path:
        """Make the directory for this side's images, removed at the end.

        Raises:
            Refused: it cannot be made.
        """
        self._workdir = Path(self._config.workdir) / f"out-{self._id}"
        try:
            self._workdir.mkdir(mode=0o700, parents=True)
        except OSError as error:
            raise Refused(f"cannot create {self._workdir}: {error.strerror}") from error
        self._workdir_lock = lock_directory(self._workdir)
        return self._workdir

    def open_memory(self) -> socket.socket:
        """The memory channel, closed at the end."""
        if self._channel is None:
            raise DestinationUnreachable("the channel is closed")
        self._memory = self._channel.open_memory(self._id)
        return self._memory

    def cut_memory(self, _why: PhaulError) -> None:
        """The agent is lost: CRIU gives up on this, and lets the tree run."""
        if self._memory is not None:
            with contextlib.suppress(OSError):
                self._memory.shutdown(socket.SHUT_RDWR)

    def __exit__(self, kind: Any, value: BaseException | None, trace: Any) -> None:
        unknown = isinstance(value, OutcomeUnknown)
        if value is not None and not unknown:
            self._roll_back(self, value)
        if self._memory is not None:
            self._memory.close()
        self.agent.close()
        if self._channel is not None:
            self._channel.close()
        # After an unknown outcome it is the recovery that puts away.
        if self._workdir is not None and not unknown:
            remove_tree(self._workdir)
        if self._workdir_lock >= 0:
            os.close(self._workdir_lock)
