"""What an engine implements, and how one is found: the contract of third parties' engines.

An engine imports from here alone; the rest of the core imports the modules below. Read `interface`
first.
"""

from phaul_runtime.engine.findings import OK, REFUSED, WARNING, Finding
from phaul_runtime.engine.interface import (
    Claim,
    DestinationHalf,
    Engine,
    Handover,
    Inspection,
    SourceHalf,
    engine_names,
    load_engine,
)
from phaul_runtime.engine.targets import FileFact, Tree, User

__all__ = [
    "OK",
    "REFUSED",
    "WARNING",
    "Claim",
    "DestinationHalf",
    "Engine",
    "FileFact",
    "Finding",
    "Handover",
    "Inspection",
    "SourceHalf",
    "Tree",
    "User",
    "engine_names",
    "load_engine",
]
