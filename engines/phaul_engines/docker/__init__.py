"""The docker engine: containers of a dockerd, with all that docker knows of them.

It imports what every OCI runtime shares (`oci`) and `common`. Read `engine`, then `arrival`.
"""

from phaul_engines.docker.engine import DockerEngine

__all__ = ["DockerEngine"]
