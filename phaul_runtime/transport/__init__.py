"""Ways to an agent: a control channel and a memory channel, over ssh, TLS, TCP or a local socket.

A third party's transport imports from here alone; the rest of the core imports the modules below.
Read `base` first.
"""

from __future__ import annotations

from phaul_runtime.transport.base import Channel, Destination, Transport, load_transport

__all__ = ["Channel", "Destination", "Transport", "load_transport"]
