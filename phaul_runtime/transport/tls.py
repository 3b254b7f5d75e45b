"""`tls://host[:port]`: to an agent that is a service, with mutual TLS.

Control and memory travel by the same kind of connection, each authenticated by itself. CRIU's own
TLS is no way: it does not work with `ps.fd`.
"""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

from phaul_runtime.errors import UsageError
from phaul_runtime.transport.base import Channel, Destination, Transport, link_directory
from phaul_runtime.transport.mutual_tls import Credentials, as_client
from phaul_runtime.transport.service_channel import ServiceChannel

if TYPE_CHECKING:
    from phaul_runtime.config.model import Config
    from phaul_runtime.system.cancel import Cancellation


class TlsTransport(Transport):
    """The destination's agent listens on a port, and both hosts have certificates."""

    def open(
        self, destination: Destination, config: Config, cancellation: Cancellation, token: str
    ) -> Channel:
        """See `Transport`.

        Raises:
            Refused: this host's certificates cannot be read.
        """
        if not destination.host or destination.user:
            raise UsageError(f"{destination.url!r} is no address", hint="write tls://host:7007")
        settings = config.transport
        credentials = Credentials(settings.ca, settings.cert, settings.key)
        credentials.load(ssl.PROTOCOL_TLS_CLIENT)
        channel = ServiceChannel(
            destination,
            link_directory(config.workdir, token),
            timeout_s=settings.connect_timeout_s,
            secure=lambda plain, deadline: as_client(
                credentials, plain, destination.host, deadline
            ),
        )
        channel.start(cancellation)
        return channel
