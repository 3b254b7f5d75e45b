"""Every method, in the order of the tables."""

from tests.bench.methods.base import Method, Unavailable
from tests.bench.methods.bundle import Runc
from tests.bench.methods.engine import Docker, Podman, PodmanPre
from tests.bench.methods.phaul import (
    PhaulDocker,
    PhaulDockerLazy,
    PhaulFull,
    PhaulHybrid,
    PhaulLazy,
    PhaulLocal,
    PhaulPolicy,
    PhaulPostCopy,
    PhaulRunc,
    PhaulRuncLazy,
    PhaulTcp,
)
from tests.bench.methods.plain import Criu, GoPhaul

METHODS: dict[str, type[Method]] = {
    method.key: method
    for method in (
        PhaulLazy,
        PhaulHybrid,
        PhaulPostCopy,
        PhaulTcp,
        PhaulFull,
        PhaulPolicy,
        Criu,
        PhaulRuncLazy,
        PhaulRunc,
        Runc,
        PodmanPre,
        Podman,
        PhaulDockerLazy,
        PhaulDocker,
        Docker,
        PhaulLocal,
        GoPhaul,
    )
}

__all__ = ["METHODS", "Method", "Unavailable"]
