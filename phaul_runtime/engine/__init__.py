"""What an engine implements, and how one is found: the contract of third parties' engines.

An engine imports from here alone; the rest of the core imports the modules below. Read `interface`
first.
"""

from phaul_runtime.engine.interface import (
    OK,
    REFUSED,
    WARNING,
    Claim,
    DestinationHalf,
    Engine,
    Finding,
    Handover,
    Inspection,
    SourceHalf,
    Tree,
    engine_names,
    load_engine,
)

__all__ = [
    "OK",
    "REFUSED",
    "WARNING",
    "Claim",
    "DestinationHalf",
    "Engine",
    "Finding",
    "Handover",
    "Inspection",
    "SourceHalf",
    "Tree",
    "engine_names",
    "load_engine",
]
