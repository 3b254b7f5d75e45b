"""A container of runc: its own checkpoint, and redis in a network that moves along."""

from __future__ import annotations

from tests.bench.methods.base import NAME, Method
from tests.bench.result import Carried
from tests.bench.workloads import Workload
from tests.e2e.conftest import Dirtier, Hosts
from tests.e2e.containers import Container, Containers

REDIS = (
    "redis-server", "--save", "", "--bind", "0.0.0.0", "--protected-mode", "no",
    "--enable-debug-command", "yes",
)  # fmt: skip
REDIS_NETWORK = "/run/netns/app"


class Bundle(Method):
    """The container."""

    redis = True
    container: Container

    def __init__(self, hosts: Hosts, workload: Workload) -> None:
        super().__init__(hosts, workload)
        self.containers = Containers(hosts)

    def start(self, observer: str) -> None:
        """See `Method`; with the host's name in its ticks the program tells where it runs."""
        flags = (*self.workload.flags, "--udp", observer)
        args = ("piggie-dirty", "--status", "/data/status", *flags)
        self.container = self.containers.run("a", NAME, *args, network="host", uts="host")

    def start_redis(self) -> None:
        """Start redis in its network."""
        self.container = self.containers.run("a", NAME, *REDIS, network=REDIS_NETWORK)

    def dirtier(self, host: str) -> Dirtier:
        """See `Method`."""
        return self.container.dirtier(host)

    def clear(self) -> None:
        """See `Method`."""
        self.containers.clear()
        for host in ("a", "b"):
            self.hosts.sh(host, "rm -rf /run/bench-images", check=False)


class Runc(Bundle):
    """Stop, copy, restore by runc's own commands."""

    key = "runc"
    title = "runc checkpoint, rsync, runc restore"
    script = "runc-checkpoint.sh"

    def move(self) -> Carried:
        """See `Method`."""
        self.push_script(self.script)
        redis = "redis" if self.workload.redis else ""
        return self.run_script(self.script, NAME, "b", self.container.bundle, redis)
