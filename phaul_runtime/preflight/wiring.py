"""What moves and agents are made with: engines, transports, CRIU, the facts of this host.

The command line uses `Wiring()`; a test or a program of another kind gives its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from phaul_runtime.criu.session import Criu
from phaul_runtime.engine import interface
from phaul_runtime.engine.interface import Engine
from phaul_runtime.preflight.host_facts import gather_facts
from phaul_runtime.rpc import phaul_pb2 as pb
from phaul_runtime.transport.base import Destination, Transport, load_transport


def _installed(name: str) -> Engine:
    """The engine that is installed under a name."""
    return interface.load_engine(name)


@dataclass(frozen=True)
class Wiring:
    """How the parts are found that are not the core's.

    Attributes:
        engine: an engine by its name; raises `UsageError` where there is none.
        transport: a transport by the destination; raises `UsageError` where there is none.
        criu: makes a session factory, with the arguments of `Criu`.
        facts: of this host: its working directory, its state directory, its CRIU.
    """

    engine: Callable[[str], Engine] = _installed
    transport: Callable[[Destination], Transport] = load_transport
    criu: Callable[..., Criu] = Criu
    facts: Callable[[str, str, Criu], pb.HostFacts] = gather_facts


STANDARD = Wiring()
