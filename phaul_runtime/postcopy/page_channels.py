"""An agent for something that is not a migration from its beginning."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from phaul_runtime.rpc.client import RemoteAgent
from phaul_runtime.system.cancel import Cancellation
from phaul_runtime.transport.base import Destination, load_transport

if TYPE_CHECKING:
    from phaul_runtime.config.model import Config


@contextmanager
def reach(config: Config, url: str, cancellation: Cancellation) -> Iterator[RemoteAgent]:
    """A channel of its own to the agent at `url`, for as long as the block lasts.

    Raises:
        DestinationUnreachable: no agent answers there.
    """
    destination = Destination.parse(url)
    timeouts = config.timeouts
    channel = load_transport(destination).open(
        destination, config, cancellation, secrets.token_hex(8)
    )
    try:
        agent = RemoteAgent(
            channel,
            call_s=timeouts.call_s,
            prepare_s=timeouts.prepare_s,
            commit_s=timeouts.commit_s,
            cancellation=cancellation,
        )
        try:
            yield agent
        finally:
            agent.close()
    finally:
        channel.close()
