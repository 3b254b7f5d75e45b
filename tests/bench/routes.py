"""Ways to move a container from host a to host b, each one command that is given on a."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tests.e2e.conftest import Dirtier, Hosts, Moved
from tests.e2e.containers import Container, Containers
from tests.e2e.docker_hosts import IMAGE, DockerContainer, DockerHosts, start_docker

NAME = "bench"
# 64 MiB, of which 4 are rewritten, 300 pages a second.
MEMORY = ("--mib", "64", "--hot-mib", "4", "--writes", "300")
PROGRAM = ("piggie-dirty", "--status", "/data/status", "--verifies", "4000", *MEMORY)
# Podman's --pre-checkpoint needs the host's network, so all have it; with the host's name in its
# ticks the program tells where it runs.
FLAGS = ("--network", "host", "--uts", "host")
SCRIPTS = Path(__file__).parent / "scripts"
MOVE_S = 400


@dataclass(frozen=True)
class Carried:
    """What a move carried; pages of the container, and those of them while it stood still.

    `steps` are the parts of the freeze as the command itself timed them, ms; the rows' differ.
    """

    pages: int
    final_pages: int
    bytes: int
    steps: dict[str, float]


class Route(ABC):
    """One way to move one container, once."""

    key: ClassVar[str]
    title: ClassVar[str]

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts

    @classmethod  # noqa: B027 - some need nothing
    def prepare(cls, hosts: Hosts) -> None:
        """What the hosts need before the first move, and is not measured."""

    @classmethod  # noqa: B027 - some need nothing
    def tidy(cls, hosts: Hosts) -> None:
        """Undo `prepare`, after the last move."""

    @abstractmethod
    def start(self, observer: str) -> None:
        """Start the container on a; it sends ticks to `observer`."""

    @abstractmethod
    def move(self) -> Carried:
        """Move it to b, and remove it from a."""

    @abstractmethod
    def dirtier(self, host: str) -> Dirtier:
        """The program in it, by its status file."""

    @abstractmethod
    def clear(self) -> None:
        """Remove it from both hosts, wherever it is."""

    def run_script(self, name: str, *args: str) -> Carried:
        """Run a script of SCRIPTS on a, which prints what it carried."""
        argv = [f"/var/tmp/{name}", *args]
        done = self.hosts.lab.exec("a", argv, timeout=MOVE_S)
        return Carried(**json.loads(done.stdout.splitlines()[-1]))


def carried(moved: Moved) -> Carried:
    """What the report of phaul-runtime says."""
    if moved.code != 0:
        raise RuntimeError(f"phaul-runtime ended with {moved.code}: {moved.stderr}")
    report = moved.report
    final = int(report["final_pages_written"])
    return Carried(
        pages=final + int(report["final_pages_skipped"]),
        final_pages=final,
        bytes=int(report["bytes_transferred"]),
        steps=dict(report["freeze"]),
    )


class OfDocker(Route):
    """A container of docker."""

    container: DockerContainer

    def __init__(self, hosts: Hosts) -> None:
        super().__init__(hosts)
        self.docker = DockerHosts(hosts)

    @classmethod
    def prepare(cls, hosts: Hosts) -> None:
        """See `Route`."""
        start_docker(hosts.lab)

    def start(self, observer: str) -> None:
        """See `Route`."""
        self._program = (*PROGRAM, "--udp", observer)
        self.container = self.docker.run("a", NAME, *self._program, flags=" ".join(FLAGS))

    def dirtier(self, host: str) -> Dirtier:
        """See `Route`."""
        return self.container.dirtier(host)

    def clear(self) -> None:
        """See `Route`."""
        self.docker.clear()


class PhaulDocker(OfDocker):
    """phaul-runtime, as a user types it."""

    key = "phaul-docker"
    title = "phaul-runtime migrate --engine docker"

    def move(self) -> Carried:
        """See `Route`."""
        return carried(self.container.migrate("a", "b"))


class DockerCheckpoint(OfDocker):
    """Docker's own checkpoint and start."""

    key = "docker"
    title = "docker checkpoint, tar | ssh, docker start"
    script = "docker-checkpoint.sh"

    def start(self, observer: str) -> None:
        """See `Route`."""
        super().start(observer)
        self.hosts.lab.push("a", SCRIPTS / self.script, f"/var/tmp/{self.script}")

    def move(self) -> Carried:
        """See `Route`."""
        return self.run_script(self.script, NAME, "b", *FLAGS, IMAGE, *self._program)

    def clear(self) -> None:
        """See `Route`."""
        super().clear()
        for host in ("a", "b"):
            script = f"rm -rf /var/tmp/{self.script} /run/docker-checkpoint.*"
            self.hosts.sh(host, script, check=False)


class Podman(Route):
    """Podman's own export and import."""

    key = "podman"
    title = "podman checkpoint -e, ssh, restore -i"
    script = "podman-checkpoint.sh"
    flags: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def prepare(cls, hosts: Hosts) -> None:
        """See `Route`: docker's image, which has then one id on both."""
        start_docker(hosts.lab)
        load = f"podman image exists {IMAGE} || docker save {IMAGE} | podman load -q"
        for host in ("a", "b"):
            hosts.lab.exec(host, ["sh", "-c", load], timeout=MOVE_S)

    @classmethod
    def tidy(cls, hosts: Hosts) -> None:
        """See `Route`."""
        for host in ("a", "b"):
            hosts.sh(host, f"podman rmi {IMAGE}", check=False)

    def start(self, observer: str) -> None:
        """See `Route`."""
        self.hosts.lab.push("a", SCRIPTS / self.script, f"/var/tmp/{self.script}")
        words = " ".join(["--name", NAME, *FLAGS, IMAGE, *PROGRAM, "--udp", observer])
        log = "/var/tmp/bench-podman.log"
        # Its monitor keeps what it is given as output.
        run = f"podman run -d {words} </dev/null >{log} 2>&1 || {{ cat {log} >&2; exit 1; }}"
        self.hosts.sh("a", run)

    def move(self) -> Carried:
        """See `Route`."""
        return self.run_script(self.script, *self.flags, NAME, "b")

    def dirtier(self, host: str) -> Dirtier:
        """See `Route`."""
        facts: list[dict[str, Any]] = json.loads(self.hosts.sh(host, f"podman inspect {NAME}"))
        layer = facts[0]["GraphDriver"]["Data"]["UpperDir"]
        return Dirtier(self.hosts, int(facts[0]["State"]["Pid"]), f"{layer}/data/status")

    def clear(self) -> None:
        """See `Route`."""
        for host in ("a", "b"):
            script = (
                f"podman rm -f -t 0 {NAME};"
                f"rm -rf /var/tmp/{self.script} /var/tmp/bench-podman.log /run/podman-checkpoint.*"
            )
            self.hosts.sh(host, script, check=False)


class PodmanPreCheckpoint(Podman):
    """The same, with one round of memory beforehand."""

    key = "podman-pre"
    title = "podman checkpoint --pre-checkpoint, --with-previous"
    flags: ClassVar[tuple[str, ...]] = ("--pre-checkpoint",)


class PhaulRunc(Route):
    """The same program under runc alone."""

    key = "phaul-runc"
    title = "phaul-runtime migrate --engine runc"
    container: Container

    def __init__(self, hosts: Hosts) -> None:
        super().__init__(hosts)
        self.containers = Containers(hosts)

    def start(self, observer: str) -> None:
        """See `Route`."""
        self.container = self.containers.dirtier(
            "a", NAME, *MEMORY, "--udp", observer, network="host", uts="host"
        )

    def move(self) -> Carried:
        """See `Route`."""
        return carried(self.container.migrate("a", "b"))

    def dirtier(self, host: str) -> Dirtier:
        """See `Route`."""
        return self.container.dirtier(host)

    def clear(self) -> None:
        """See `Route`."""
        self.containers.clear()


# The first is what the others are compared with.
ROUTES: tuple[type[Route], ...] = (
    PhaulDocker,
    DockerCheckpoint,
    PodmanPreCheckpoint,
    Podman,
    PhaulRunc,
)
