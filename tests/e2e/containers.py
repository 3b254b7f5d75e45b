"""Containers on the laboratory's hosts, and what tests ask of them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Dirtier, Hosts, Moved

BUNDLES = "/var/lib/bundles"
MAKER = Path(__file__).parent / "programs/make_bundle.py"


@dataclass
class Container:
    """A container by its name, wherever it runs."""

    containers: Containers
    name: str
    runtime: str

    @property
    def bundle(self) -> str:
        return f"{BUNDLES}/{self.name}"

    @property
    def rootfs(self) -> str:
        return f"{self.bundle}/rootfs"

    def state(self, host: str) -> str:
        """Its status there; empty if there is none."""
        out = self.containers.hosts.sh(
            host, '"$1" state "$2" 2>/dev/null', self.runtime, self.name, check=False
        )
        return str(json.loads(out)["status"]) if out else ""

    def pid(self, host: str) -> int:
        """Of its init."""
        out = self.containers.hosts.sh(host, '"$1" state "$2"', self.runtime, self.name)
        return int(json.loads(out)["pid"])

    def exec(self, host: str, *argv: str) -> str:
        """Run a command in it."""
        done = self.containers.hosts.lab.exec(host, [self.runtime, "exec", self.name, *argv])
        return done.stdout

    def migrate(self, host: str, to: str, *flags: str) -> Moved:
        """Move it."""
        url = f"ssh://root@{to}"
        return self.containers.hosts.migrate(host, self.name, url, "--engine", self.runtime, *flags)

    def remove(self, host: str) -> None:
        """End and remove everything of it there."""
        script = '"$1" delete -f "$2"; rm -rf "$3"; rmdir "/sys/fs/cgroup/$2" 2>/dev/null'
        self.containers.hosts.sh(host, script, self.runtime, self.name, self.bundle, check=False)

    def dirtier(self, host: str) -> Dirtier:
        """The view of a piggie-dirty that writes its status to /data/status."""
        return Dirtier(self.containers.hosts, self.pid(host), f"{self.rootfs}/data/status")


@dataclass
class Containers:
    """Makes them, and ends what a test left."""

    hosts: Hosts
    made: list[Container] = field(default_factory=list)

    def run(
        self, host: str, name: str, *args: str, runtime: str = "runc", **spec: Any
    ) -> Container:
        """Make a bundle and start it, detached and with /dev/null."""
        container = self.make(host, name, *args, runtime=runtime, **spec)
        self.start(host, container)
        return container

    def make(
        self, host: str, name: str, *args: str, runtime: str = "runc", **spec: Any
    ) -> Container:
        """Make a bundle, to be ended and removed after the test."""
        container = Container(self, name, runtime)
        self.made.append(container)
        self.hosts.lab.push(host, MAKER, "/var/tmp/make_bundle.py")
        text = json.dumps({"path": container.bundle, "args": list(args), **spec})
        self.hosts.sh(host, 'rm -rf "$1"', container.bundle)
        self.hosts.sh(host, 'python3 /var/tmp/make_bundle.py "$1"', text)
        return container

    def start(self, host: str, container: Container) -> None:
        """Start a bundle that is there."""
        start = (
            'cd "$1" && "$2" --log /tmp/run.err run -d --bundle . "$3" </dev/null >/dev/null 2>&1'
        )
        try:
            self.hosts.sh(host, start, container.bundle, container.runtime, container.name)
        except Exception as error:
            raise AssertionError(self.hosts.sh(host, "cat /tmp/run.err")) from error

    def dirtier(
        self, host: str, name: str, *flags: str, status: str = "/data/status", **spec: Any
    ) -> Container:
        """A container with the verifying dirtier."""
        args = ("piggie-dirty", "--status", status, "--verifies", "4000", *flags)
        return self.run(host, name, *args, **spec)

    def clear(self) -> None:
        """End and remove everything."""
        for container in self.made:
            for host in ("a", "b"):
                with contextlib.suppress(Exception):
                    container.remove(host)


@pytest.fixture
def containers(hosts: Hosts) -> Iterator[Containers]:
    """Containers for one test."""
    found = Containers(hosts)
    yield found
    found.clear()
