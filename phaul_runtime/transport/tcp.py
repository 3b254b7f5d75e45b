"""`tcp://host[:port]`: to an agent that is a service, in the clear and without authentication.

For networks that only the two hosts are on, and for measurements: CRIU writes memory to the TCP
connection itself. Refused unless the configuration says `insecure: true`, on both hosts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from phaul_runtime.errors import Refused, UsageError
from phaul_runtime.transport.base import Channel, Destination, Transport, link_directory
from phaul_runtime.transport.service_channel import ServiceChannel

if TYPE_CHECKING:
    from phaul_runtime.config.model import Config
    from phaul_runtime.system.cancel import Cancellation


class TcpTransport(Transport):
    """The destination's agent listens on a port."""

    def open(
        self, destination: Destination, config: Config, cancellation: Cancellation, token: str
    ) -> Channel:
        """See `Transport`.

        Raises:
            Refused: the configuration does not allow it.
        """
        if not destination.host or destination.user:
            raise UsageError(f"{destination.url!r} is no address", hint="write tcp://host:7007")
        if not config.transport.insecure:
            raise Refused(
                "tcp:// moves memory in the clear, to and from any peer that answers",
                hint="use tls://, or set transport.insecure: true",
            )
        channel = ServiceChannel(
            destination,
            link_directory(config.workdir, token),
            timeout_s=config.transport.connect_timeout_s,
        )
        channel.start(cancellation)
        return channel
