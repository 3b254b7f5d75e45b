"""`tls://host[:port]`: to an agent that is a service, with mutual TLS.

Control and memory travel by the same kind of connection, each authenticated by itself. CRIU's own
TLS is no way: it does not work with `ps.fd`.
"""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

from phaul_runtime.errors import UsageError
from phaul_runtime.transport import Channel, Destination, Transport, link_directory
from phaul_runtime.transport.linkchannel import LinkChannel
from phaul_runtime.transport.mutualtls import Credentials, as_client

if TYPE_CHECKING:
    from phaul_runtime.cancel import Cancellation
    from phaul_runtime.config import Config


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
        channel = LinkChannel(
            destination,
            link_directory(config.workdir, token),
            timeout_s=settings.connect_timeout_s,
            secure=lambda plain, deadline: as_client(
                credentials, plain, destination.host, deadline
            ),
        )
        channel.start(cancellation)
        return channel
