"""Containers of docker and of podman, by their own checkpoints."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from tests.bench.methods.base import MOVE_S, NAME, Method, with_rounds
from tests.bench.result import Carried
from tests.bench.workloads import Workload
from tests.e2e.conftest import Dirtier, Hosts
from tests.e2e.docker_hosts import IMAGE, DockerContainer, DockerHosts, start_docker

# Podman's --pre-checkpoint needs the host's network, so all have it; with the host's name in its
# ticks the program tells where it runs.
FLAGS = ("--network", "host", "--uts", "host")
PROGRAM = ("piggie-dirty", "--status", "/data/status")


class OfDocker(Method):
    """A container of docker."""

    container: DockerContainer

    def __init__(self, hosts: Hosts, workload: Workload) -> None:
        super().__init__(hosts, workload)
        self.docker = DockerHosts(hosts)

    @classmethod
    def prepare(cls, hosts: Hosts) -> None:
        """See `Method`."""
        start_docker(hosts.lab)

    def start(self, observer: str) -> None:
        """See `Method`."""
        self._program = (*PROGRAM, *self.workload.flags, "--udp", observer)
        self.container = self.docker.run("a", NAME, *self._program, flags=" ".join(FLAGS))

    def dirtier(self, host: str) -> Dirtier:
        """See `Method`."""
        return self.container.dirtier(host)

    def clear(self) -> None:
        """See `Method`."""
        self.docker.clear()
        for host in ("a", "b"):
            self.hosts.sh(host, "rm -rf /run/docker-checkpoint.*", check=False)


class Docker(OfDocker):
    """Docker's own checkpoint and start."""

    key = "docker"
    title = "docker checkpoint, tar over ssh, docker start"
    script = "docker-checkpoint.sh"

    def move(self) -> Carried:
        """See `Method`."""
        self.push_script(self.script)
        return self.run_script(self.script, NAME, "b", *FLAGS, IMAGE, *self._program)


class Podman(Method):
    """Podman's own export and import."""

    key = "podman"
    title = "podman checkpoint -e, ssh, restore -i"
    script = "podman-checkpoint.sh"
    flags: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def prepare(cls, hosts: Hosts) -> None:
        """See `Method`: docker's image, which has then one id on both."""
        start_docker(hosts.lab)
        load = f"podman image exists {IMAGE} || docker save {IMAGE} | podman load -q"
        for host in ("a", "b"):
            hosts.lab.exec(host, ["sh", "-c", load], timeout=MOVE_S)

    @classmethod
    def tidy(cls, hosts: Hosts) -> None:
        """See `Method`."""
        for host in ("a", "b"):
            hosts.sh(host, f"podman rmi {IMAGE}", check=False)

    def start(self, observer: str) -> None:
        """See `Method`."""
        program = (*PROGRAM, *self.workload.flags, "--udp", observer)
        words = " ".join(["--name", NAME, *FLAGS, IMAGE, *program])
        log = "/var/tmp/bench-podman.log"
        # Its monitor keeps what it is given as output.
        run = f"podman run -d {words} </dev/null >{log} 2>&1 || {{ cat {log} >&2; exit 1; }}"
        self.hosts.sh("a", run)

    def move(self) -> Carried:
        """See `Method`."""
        self.push_script(self.script)
        return self.run_script(self.script, *self.flags, NAME, "b")

    def dirtier(self, host: str) -> Dirtier:
        """See `Method`."""
        facts: list[dict[str, Any]] = json.loads(self.hosts.sh(host, f"podman inspect {NAME}"))
        layer = facts[0]["GraphDriver"]["Data"]["UpperDir"]
        return Dirtier(self.hosts, int(facts[0]["State"]["Pid"]), f"{layer}/data/status")

    def clear(self) -> None:
        """See `Method`."""
        for host in ("a", "b"):
            script = (
                f"podman rm -f -t 0 {NAME};"
                "rm -rf /var/tmp/bench-podman.log /run/podman-checkpoint.*"
            )
            self.hosts.sh(host, script, check=False)


class PodmanPre(Podman):
    """The same, with one round of memory beforehand."""

    key = "podman-pre"
    title = "podman checkpoint --pre-checkpoint, --with-previous"
    flags: ClassVar[tuple[str, ...]] = ("--pre-checkpoint",)

    def move(self) -> Carried:
        """See `Method`."""
        return with_rounds(super().move())
