"""A container's move leaves a host the options of its cgroup2, as it finds them (criu#3029).

They belong to the kernel: whoever mounts cgroup2 outside of cgroup namespaces changes them, for
all. Hosts of namespaces are in one. Here a container runs, and is moved, outside of it: by a second
sshd on each host, that has the rest of the host and all of the machine's cgroups, as on a machine.
"""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from phaul_lab.host import ADDRESSES
from phaul_lab.image import cache_dir
from phaul_lab.machine import cgroup_root
from phaul_lab.native import NativeHost
from phaul_lab.shell import locked

from tests.e2e.conftest import Hosts, wait_until
from tests.e2e.containers import Containers, containers

__all__ = ["containers"]

OPTION = "memory_recursiveprot"
FIRST_CGROUP_NAMESPACE = 0xEFFFFFFB
PORT = "2222"
PID_FILE = "/run/outside.pid"
PATIENT = "/var/tmp/patient.yaml"
# Without a cgroup namespace, in a mount namespace where all hierarchies are mounted whole.
SSHD = f"""
set -e
option=$1
mount -t cgroup2 -o "$option" cgroup2 /sys/fs/cgroup
sed -n 's/^[1-9][0-9]*:\\([^:]*\\):.*/\\1/p' /proc/self/cgroup | while read -r controllers; do
    place=/run/cgroups/$controllers
    mkdir -p "$place"
    case $controllers in name=*) controllers=none,$controllers;; esac
    mount -t cgroup -o "$controllers" cgroup "$place"
done
exec /usr/sbin/sshd -D -p {PORT} -o PidFile={PID_FILE}
"""


def options() -> set[str]:
    """Of cgroup2, on this machine."""
    root = str(cgroup_root())
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        before, _, after = line.partition(" - ")
        if before.split(" ")[4] == root:
            return set(after.split(" ")[2].split(","))
    raise AssertionError(f"nothing is mounted at {root}")


def mount_anew(*wanted: str) -> None:
    """Give this machine's cgroup2 other options: whoever mounts it says what they are."""
    with tempfile.TemporaryDirectory() as place:
        how = ",".join(["rw", *wanted])
        subprocess.run(["mount", "-t", "cgroup2", "-o", how, "x", place], check=True, timeout=30)
        subprocess.run(["umount", place], check=True, timeout=30)


@dataclass
class Place:
    """A host, outside of cgroup namespaces or as always."""

    hosts: Hosts
    host: str
    outside: bool

    def run(self, *argv: str) -> str:
        """Run a command there to its good end; what it says."""
        words = list(argv)
        if self.outside:
            words = ["ssh", "-p", PORT, f"root@{ADDRESSES[self.host]}", "--", shlex.join(argv)]
        done = self.hosts.lab.exec(self.host, words, check=False, timeout=400)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def sh(self, script: str, *args: str) -> str:
        """The same of a shell script."""
        return self.run("sh", "-c", script, "sh", *args)

    def group(self, pid: int) -> str:
        """The cgroup of a process, in the eyes of whoever looks from there."""
        return self.sh("sed -n s/^0:://p /proc/$1/cgroup", str(pid))


@dataclass
class Outside:
    """Both hosts, with a way to where there is no cgroup namespace around."""

    hosts: Hosts

    def at(self, host: str, outside: str = "ab") -> Place:
        """A host; `outside`: those that are entered there, not as always."""
        return Place(self.hosts, host, host in outside)


@pytest.fixture
def outside(hosts: Hosts) -> Iterator[Outside]:
    """As above; this machine's cgroup2 has the option meanwhile."""
    if Path("/proc/self/ns/cgroup").stat().st_ino != FIRST_CGROUP_NAMESPACE:
        pytest.skip("this machine is in a cgroup namespace: nothing here changes the options")
    started = []
    # One test at a time, of all laboratories.
    with locked(cache_dir() / "cgroup-options.lock"):
        before = options() - {"rw"}
        mount_anew(*before, OPTION)
        try:
            for name in ("a", "b"):
                host = hosts.lab.host(name)
                assert isinstance(host, NativeHost)
                started.append(_start_sshd(host))
                hosts.sh(name, 'echo "transport: {connect_timeout_s: 240}" >"$1"', PATIENT)
            for name in ("a", "b"):
                listens = partial(hosts.sh, name, f"ss -Hltn 'sport = {PORT}'")
                wait_until(f"sshd on {name}", lambda: listens() != "", 60)  # noqa: B023
            yield Outside(hosts)
        finally:
            for name in ("a", "b"):
                hosts.sh(name, f"kill $(cat {PID_FILE}); rm -rf /run/cgroups", check=False)
            for process in started:
                process.wait(30)
            mount_anew(*before)


def _start_sshd(host: NativeHost) -> subprocess.Popen[bytes]:
    """In the host's group, which ends with it."""
    join = 'echo $$ >"$1/host/system/cgroup.procs" && shift && exec "$@"'
    enter = ["nsenter", "--target", str(host.pid), "--mount", "--net", "--uts", "--ipc", "--pid"]
    inside = ["--", "unshare", "--mount", "sh", "-c", SSHD, "sh", OPTION]
    with (host.dir / "outside.log").open("wb") as log:
        return subprocess.Popen(
            ["sh", "-c", join, "sh", str(host.group), *enter, *inside],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


@pytest.mark.only_on("native")
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("runtime", "where"),
    [
        ("runc", "a"),
        ("runc", "b"),
        # Not from there: CRIU under crun cannot give a host the settings of a machine's own cpuset.
        pytest.param("crun", "b", marks=pytest.mark.thorough),
    ],
)
def test_a_container_moves(
    outside: Outside, containers: Containers, runtime: str, where: str
) -> None:
    """From there, or to there: the machine's cgroups cannot be those of both hosts.

    With a process in a group below the container's: it is there afterwards, too.
    """
    words = ("piggie-dirty", "--status", "/data/status", "--verifies", "4000", "--mib", "4")
    name = f"options-{runtime}"
    container = containers.make("a", name, *words, "--children", "1", runtime=runtime)
    start = 'cd "$1" && "$2" run -d --bundle . "$3" </dev/null >/dev/null 2>&1'
    outside.at("a", where).sh(start, container.bundle, runtime, name)
    root = container.pid("a")
    group = outside.at("a", where).group(root)
    sub = 'mkdir "/sys/fs/cgroup$1/sub" && pgrep -P $2 >"/sys/fs/cgroup$1/sub/cgroup.procs"'
    outside.at("a", where).sh(sub, group, str(root))
    assert OPTION in options()
    to = "ssh://root@b" + (f":{PORT}" if where == "b" else "")
    migrate = ("phaul-runtime", "migrate", name, "--engine", runtime, "--config", PATIENT)
    outside.at("a", where).run(*migrate, "--to", to)
    assert OPTION in options()
    there = outside.at("b", where)
    moved = container.pid("b")
    assert there.group(moved) == group
    assert there.group(int(there.sh("pgrep -P $1", str(moved)))) == f"{group}/sub"
    # Its own cgroup namespace: it sees nothing above its group.
    assert "0::/" in there.run(runtime, "exec", name, "cat", "/proc/self/cgroup").splitlines()
    clear = '"$1" delete -f "$2"; rmdir "/sys/fs/cgroup$3/sub" "/sys/fs/cgroup$3"; true'
    there.sh(clear, runtime, name, group)


@pytest.mark.only_on("native")
@pytest.mark.timeout(900)
def test_a_process_moves(outside: Outside) -> None:
    """From there to there; CRIU is told to ignore its cgroups."""
    start = "piggie-dirty --status /var/tmp/options.status --verifies 4000 --mib 4 --detach"
    pid = int(outside.at("a").sh(start))
    outside.hosts.started += [("a", pid), ("b", pid)]
    migrate = ("phaul-runtime", "migrate", str(pid), "--files", "copy", "--config", PATIENT)
    outside.at("a").run(*migrate, "--to", f"ssh://root@b:{PORT}")
    assert OPTION in options()
    assert outside.at("b").group(pid).startswith("/phaul-runtime/")
    outside.at("b").sh(
        "kill -9 $1; sleep 0.5; rmdir /sys/fs/cgroup/phaul-runtime/* ; true", str(pid)
    )
