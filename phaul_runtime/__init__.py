"""phaul-runtime: live migration of running processes and containers with CRIU.

The library's contract is that of its ancestor, the Go library phaul::

    from phaul_runtime import PhaulClient, PhaulConfig, PhaulLocal, PhaulRemote, PhaulServer

Importing the package loads nothing but this module: each name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phaul_runtime.criu.session import Criu, CriuNotify
    from phaul_runtime.library.api import PhaulConfig, PhaulLocal, PhaulRemote
    from phaul_runtime.library.client import PhaulClient
    from phaul_runtime.library.server import PhaulServer

__version__ = "0.1.0"

_HOMES = {
    "PhaulConfig": "phaul_runtime.library.api",
    "PhaulLocal": "phaul_runtime.library.api",
    "PhaulRemote": "phaul_runtime.library.api",
    "PhaulClient": "phaul_runtime.library.client",
    "PhaulServer": "phaul_runtime.library.server",
    "Criu": "phaul_runtime.criu.session",
    "CriuNotify": "phaul_runtime.criu.session",
}

__all__ = [
    "Criu",
    "CriuNotify",
    "PhaulClient",
    "PhaulConfig",
    "PhaulLocal",
    "PhaulRemote",
    "PhaulServer",
    "__version__",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)
