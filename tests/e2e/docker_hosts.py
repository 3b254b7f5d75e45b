"""Docker on the laboratory's hosts, and what tests ask of its containers."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from phaul_lab import Lab

from tests.e2e.conftest import Dirtier, Hosts, Moved, wait_until

IMAGE = "phaul-test:1"
PROGRAMS = Path(__file__).parent / "programs"
# The command that an operator gives once for each host; dockerd is started after it.
START = """
set -e
docker version >/dev/null 2>&1 && exit 0
phaul-runtime hook install docker
setsid containerd </dev/null >/var/log/containerd.log 2>&1 &
setsid dockerd --containerd=/run/containerd/containerd.sock </dev/null >/var/log/dockerd.log 2>&1 &
"""
# As a supervisor does: with the same words, once it is dead.
RESTART = """
set -e
pid=$(pgrep -x dockerd)
words=$(tr '\\0' ' ' </proc/$pid/cmdline)
kill -9 $pid
while kill -0 $pid 2>/dev/null; do sleep 0.1; done
setsid $words </dev/null >>/var/log/dockerd.log 2>&1 &
"""
IN_IMAGE = ("redis-server", "redis-cli", "piggie-dirty", "ip", "nc")


def docker_network(lab: Lab) -> str:
    """See `DockerHosts.network`: docker 28 restores none with a network namespace of its own."""
    return "--network host" if lab.host("b").image.suite == "forky" else "--network none"


def start_docker(lab: Lab) -> None:
    """Docker on both hosts, with one image; idempotent."""
    hosts = Hosts(lab)
    for host in ("a", "b"):
        hosts.sh(host, START)
    for host in ("a", "b"):
        wait_until(f"dockerd on {host}", partial(_answers, hosts, host), 300)
    ids = [
        hosts.sh(host, f"docker images -q --no-trunc {IMAGE}", check=False) for host in ("a", "b")
    ]
    if not ids[0]:
        for program in ("make_bundle.py", "make_image.py"):
            lab.push("a", PROGRAMS / program, f"/var/tmp/{program}")
        names = " ".join(IN_IMAGE)
        hosts.sh("a", f"cd /var/tmp && python3 make_image.py {IMAGE} {names}")
    if not ids[0] or ids[0] != ids[1]:
        copy_image(hosts)


def _answers(hosts: Hosts, host: str) -> bool:
    script = "docker version --format '{{.Server.Experimental}}'"
    return hosts.sh(host, script, check=False) == "true"


def restart_dockerd(hosts: Hosts, host: str) -> None:
    """Kill it (SIGKILL), start it again, and wait until it answers."""
    hosts.sh(host, RESTART)
    wait_until(f"dockerd on {host}", partial(_answers, hosts, host), 300)


def copy_image(hosts: Hosts) -> None:
    """An image has one id on both hosts only if it was carried."""
    save = f"docker save {IMAGE} | ssh root@b docker load"
    hosts.sh("a", save)


@dataclass
class DockerContainer:
    """A container by its name, wherever it runs."""

    docker: DockerHosts
    name: str

    def inspect(self, host: str) -> dict[str, Any]:
        """What docker says of it; empty if there is none."""
        out = self.docker.sh(host, f"docker inspect {self.name} 2>/dev/null", check=False)
        found = json.loads(out or "[]")
        return dict(found[0]) if found else {}

    def status(self, host: str) -> str:
        """As `running`; empty if there is none."""
        return str(self.inspect(host).get("State", {}).get("Status", ""))

    def pid(self, host: str) -> int:
        """Of its init."""
        return int(self.inspect(host)["State"]["Pid"])

    def exec(self, host: str, *argv: str) -> str:
        """Run a command in it."""
        return self.docker.hosts.lab.exec(host, ["docker", "exec", self.name, *argv]).stdout

    def migrate(self, host: str, to: str, *flags: str) -> Moved:
        """Move it."""
        url = f"ssh://root@{to}"
        return self.docker.hosts.migrate(host, self.name, url, "--engine", "docker", *flags)

    def file(self, host: str, path: str) -> str:
        """Where a file of its writable layer lies on the host."""
        return f"{self.inspect(host)['GraphDriver']['Data']['UpperDir']}{path}"

    def dirtier(self, host: str) -> Dirtier:
        """The view of a piggie-dirty that writes its status to /data/status."""
        return Dirtier(self.docker.hosts, self.pid(host), self.file(host, "/data/status"))


@dataclass
class DockerHosts:
    """Makes containers, and removes what a test left."""

    hosts: Hosts
    made: list[DockerContainer] = field(default_factory=list)
    volumes: list[str] = field(default_factory=list)

    def sh(self, host: str, script: str, *args: str, check: bool = True) -> str:
        """A shell script on a host."""
        return self.hosts.sh(host, script, *args, check=check)

    def run(self, host: str, name: str, *args: str, flags: str = "") -> DockerContainer:
        """`docker run -d`; to be removed after the test, on both hosts."""
        container = DockerContainer(self, name)
        self.made.append(container)
        words = shlex.join(args)
        self.sh(host, f"docker run -d --name {name} {flags} {IMAGE} {words} </dev/null")
        return container

    @property
    def network(self) -> str:
        """The flag for the most of a network of its own that this docker can restore."""
        return docker_network(self.hosts.lab)

    def dirtier(
        self, host: str, name: str, *args: str, flags: str | None = None
    ) -> DockerContainer:
        """A container with the verifying dirtier."""
        words = ("piggie-dirty", "--status", "/data/status", "--verifies", "4000", *args)
        return self.run(host, name, *words, flags=self.network if flags is None else flags)

    def leftovers(self, host: str) -> str:
        """What a move must not leave in docker's directories."""
        return self.sh(
            host,
            "ls -d /tmp/ctrd-checkpoint* /run/phaul-runtime/docker/* /var/lib/docker/tmp/phaul-* "
            "/var/lib/docker/containers/*/checkpoints/* 2>/dev/null",
            check=False,
        )

    def clear(self) -> None:
        """Remove everything."""
        for host in ("a", "b"):
            for container in self.made:
                name = container.name
                script = f"docker ps -aq --filter name=^/{name} | xargs -r docker rm -fv"
                with contextlib.suppress(Exception):
                    self.sh(host, script, check=False)
            for volume in self.volumes:
                self.sh(host, f"docker volume rm {volume}", check=False)


@pytest.fixture(scope="session")
def docker_lab(lab: Lab) -> Lab:
    """The laboratory with docker running on both hosts."""
    start_docker(lab)
    return lab


@pytest.fixture
def docker_hosts(docker_lab: Lab, hosts: Hosts) -> Iterator[DockerHosts]:
    """Containers of docker for one test."""
    found = DockerHosts(hosts)
    yield found
    found.clear()
