"""Ways to an agent: a channel by the destination's transport, and the agent's calls over it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from phaul_runtime.rpc.client import RemoteAgent
from phaul_runtime.system.cancel import Cancellation
from phaul_runtime.transport.base import Channel, Destination, Transport, load_transport

if TYPE_CHECKING:
    from phaul_runtime.config.model import Config


def agent_on(channel: Channel, config: Config, cancellation: Cancellation) -> RemoteAgent:
    """The calls of the agent at the other end of a channel, with the configured deadlines."""
    timeouts = config.timeouts
    return RemoteAgent(
        channel,
        call_s=timeouts.call_s,
        prepare_s=timeouts.prepare_s,
        commit_s=timeouts.commit_s,
        cancellation=cancellation,
    )


Transports = Callable[[Destination], Transport]


@contextmanager
def reach(
    config: Config, url: str, cancellation: Cancellation, transports: Transports = load_transport
) -> Iterator[RemoteAgent]:
    """The agent at `url` by a channel of its own, for as long as the block lasts.

    Raises:
        DestinationUnreachable: no agent answers there.
    """
    destination = Destination.parse(url)
    channel = transports(destination).open(destination, config, cancellation, secrets.token_hex(8))
    try:
        agent = agent_on(channel, config, cancellation)
        try:
            yield agent
        finally:
            agent.close()
    finally:
        channel.close()
