"""The engines of the command-line runtimes runc and crun: containers by name and bundle.

They import what every OCI runtime shares (`oci`) and `common`. Read `engine`, then `arrival`.
"""

from phaul_engines.runc.engine import CrunEngine, RuncEngine

__all__ = ["CrunEngine", "RuncEngine"]
