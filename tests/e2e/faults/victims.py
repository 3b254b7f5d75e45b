"""Victims of faults: one of each engine, that tells an observer from which host it speaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.e2e.conftest import Dirtier, Hosts
from tests.e2e.containers import Container, Containers
from tests.e2e.docker_hosts import IMAGE, DockerContainer, DockerHosts
from tests.e2e.observer import Observer

MIB = 20
FLAGS = ("--hot-mib", "2", "--writes", "200")
ALWAYS = "--network host --uts host --restart always"
# State that docker's runtime or containerd keep of containers that docker does not know.
STRAYS = """
for id in $(ls /run/docker/runtime-runc/moby /run/containerd/io.containerd.runtime.v2.task/moby \
    2>/dev/null | grep -E '^[0-9a-f]{64}$' | sort -u); do
    docker inspect $id >/dev/null 2>&1 || echo "stray $id"
done
"""


@dataclass
class Victim(Dirtier):
    """A dirtier, and as such moved by the process engine; found again by its status file's name."""

    engine: str
    target: str
    mode: str = field(default="pre-copy", kw_only=True)

    @property
    def runtime(self) -> str:
        """What stands between phaul-runtime and CRIU."""
        return self.engine

    def migrate(self) -> list[str]:
        """The command that moves it to b."""
        argv = ["migrate", self.target, "--engine", self.engine, "--to", "ssh://root@b"]
        return [*argv, "--mode", self.mode]

    def pids(self, host: str) -> list[int]:
        """Its processes there."""
        name = Path(self.status_file).name
        found = self.hosts.sh(host, f"pgrep -x -f 'piggie-dirty .*{name} .*'", check=False)
        return [int(pid) for pid in found.split()]

    def remove(self, host: str) -> None:
        """End and remove everything of it there."""
        for pid in self.pids(host):
            self.hosts.sh(host, "kill -9 $1", str(pid), check=False)

    def traces(self, host: str) -> str:
        """What of a move is left there, beside what `Hosts.leftovers` lists."""
        return ""

    def judge(self, host: str) -> None:
        """It lives there: whatever runs it has to agree, on both hosts."""

    def refuse(self) -> Callable[[], object]:
        """Make its restore at b impossible; returns what mends that."""
        # Somebody takes the pid at the destination after the check.
        last = self.hosts.sh("b", "cat /proc/sys/kernel/ns_last_pid")
        take = "echo $(($1 - 1)) > /proc/sys/kernel/ns_last_pid;"
        take += " sleep 300 </dev/null >/dev/null 2>&1 & echo $!"
        for _ in range(50):
            pid = self.hosts.sh("b", take, str(self.pid))
            if int(pid) == self.pid:
                break
            self.hosts.sh("b", "kill $1", pid)
        assert int(pid) == self.pid
        # What b starts from now on must not get the pids of the victims to come.
        self.hosts.sh("b", "echo $1 > /proc/sys/kernel/ns_last_pid", last)
        return lambda: self.hosts.sh("b", "kill $1", pid)


@dataclass
class ContainerVictim(Victim):
    """In a container of runc or crun."""

    container: Container

    def remove(self, host: str) -> None:
        """See `Victim`."""
        super().remove(host)
        self.container.remove(host)

    def judge(self, host: str) -> None:
        """See `Victim`."""
        container = self.container
        assert container.state(host) == "running"
        assert container.exec(host, "cat", "/proc/1/comm") == "piggie-dirty\n"
        other = "b" if host == "a" else "a"
        assert container.state(other) == ""
        traces = f"/sys/fs/cgroup/{container.name} /run/{container.runtime}/{container.name}"
        if host == "a":
            traces += f" {container.bundle}"
        assert self.hosts.sh(other, f"ls -d {traces} 2>/dev/null", check=False) == ""

    def refuse(self) -> Callable[[], object]:
        """See `Victim`: somebody takes its name after the check."""
        taken = f"/run/{self.engine}/{self.target}"
        self.hosts.sh("b", f"mkdir -p {taken}")
        return lambda: self.hosts.sh("b", f"rmdir {taken}")


@dataclass
class DockerVictim(Victim):
    """In a container of docker, which would restart it whenever it ends."""

    container: DockerContainer

    @property
    def runtime(self) -> str:
        """See `Victim`: underneath docker."""
        return "runc"

    def status(self, host: str) -> dict[str, Any]:
        """See `Dirtier`: each host has a layer of its own for it."""
        layer = self.container.file(host, "")
        here = Dirtier(self.hosts, 0, f"{layer}{self.status_file}")
        return here.status(host)

    def remove(self, host: str) -> None:
        """See `Victim`; before docker can restart it."""
        self.hosts.sh(host, f"docker rm -fv {self.target}", check=False)
        super().remove(host)

    def traces(self, host: str) -> str:
        """See `Victim`."""
        strays = self.hosts.sh(host, STRAYS, check=False)
        return self.container.docker.leftovers(host) + strays

    def judge(self, host: str) -> None:
        """See `Victim`."""
        facts = self.container.inspect(host)
        assert facts["State"]["Status"] == "running"
        assert facts["State"]["Pid"] == self.pids(host)[0]
        assert facts["RestartCount"] == 0
        assert facts["HostConfig"]["RestartPolicy"]["Name"] == "always"
        assert self.container.exec(host, "cat", "/proc/1/comm") == "piggie-dirty\n"
        assert self.container.inspect("b" if host == "a" else "a") == {}

    def refuse(self) -> Callable[[], object]:
        """See `Victim`: somebody puts another container in the place of the one that was made."""
        name = self.target
        self.hosts.sh("b", f"docker rm {name} && docker create --name {name} {IMAGE} true")
        return lambda: self.hosts.sh("b", f"docker rm {name}")


def start(hosts: Hosts, engine: str, name: str, observer: Observer, mib: int = 0) -> Victim:
    """A new victim on host a, that tells the observer; `mib` of memory, or little."""
    flags = (*FLAGS, "--mib", str(mib or MIB), "--udp", observer.address)
    if engine == "process":
        dirtier = hosts.dirtier("a", name, *flags)
        return Victim(hosts, dirtier.pid, dirtier.status_file, engine, str(dirtier.pid))
    status = f"/data/{name}.status"
    if engine == "docker":
        words = ("piggie-dirty", "--status", status, "--verifies", "4000", *flags)
        found = DockerHosts(hosts).run("a", name, *words, flags=ALWAYS)
        return DockerVictim(hosts, 0, status, engine, name, found)
    container = Containers(hosts).dirtier(
        "a", name, *flags, runtime=engine, network="host", uts="host", status=status
    )
    path = f"{container.rootfs}{status}"
    return ContainerVictim(hosts, 0, path, engine, name, container)
