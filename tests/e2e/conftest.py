"""Two real hosts for the whole run, and victims on them."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "lab"))

from phaul_lab import Lab

WITHIN_S = 120.0


def wait_until(what: str, condition: Callable[[], bool], within_s: float = WITHIN_S) -> None:
    """Poll until `condition`; a missed deadline is a failure that names `what`."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {within_s:g} s: {what}")
        time.sleep(0.3)


@dataclass
class Moved:
    """What a `phaul-runtime migrate --output json` said."""

    code: int
    events: list[dict[str, Any]]
    stderr: str

    @property
    def report(self) -> dict[str, Any]:
        return self.events[-1]

    def named(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event.get("event") == name]


@dataclass
class Hosts:
    """The laboratory with what tests do on it."""

    lab: Lab
    started: list[tuple[str, int]] = field(default_factory=list)

    def sh(self, host: str, script: str, *args: str, check: bool = True) -> str:
        return self.lab.exec(host, ["sh", "-c", script, "sh", *args], check=check).stdout.strip()

    def alive(self, host: str, pid: int) -> bool:
        return self.lab.exec(host, ["kill", "-0", str(pid)], check=False).returncode == 0

    def migrate(self, host: str, target: int | str, to: str, *flags: str) -> Moved:
        argv = ["phaul-runtime", "migrate", str(target), "--to", to, "--output", "json", *flags]
        done = self.lab.exec(host, argv, check=False, timeout=300)
        events = [json.loads(line) for line in done.stdout.splitlines() if line.strip()]
        return Moved(done.returncode, events, done.stderr)

    def dirtier(self, host: str, name: str, *flags: str) -> Dirtier:
        status = f"/var/tmp/{name}.status"
        argv = ["piggie-dirty", "--status", status, "--verifies", "4000", "--detach", *flags]
        pid = int(self.lab.exec(host, argv).stdout)
        self.started += [("a", pid), ("b", pid)]
        return Dirtier(self, pid, status)

    def leftovers(self, host: str) -> str:
        """What a move must not leave behind: directories, sockets, staged files, processes."""
        return self.sh(
            host,
            "ls -A /run/phaul 2>/dev/null;"
            "find /var/tmp /tmp -name '*.phaul-*';"
            "pgrep -a -x criu; pgrep -af 'phaul-runtime [am]|phaul_runtime[.]pager';"
            "for g in /sys/fs/cgroup/phaul-runtime/*/; do "
            '[ ! -d $g ] || [ -n "$(cat $g/cgroup.procs)" ] || echo empty cgroup $g; done',
            check=False,
        )


@dataclass
class Dirtier:
    """A running piggie-dirty."""

    hosts: Hosts
    pid: int
    status_file: str

    def status(self, host: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.hosts.sh(host, 'cat "$1"', self.status_file))
        return found

    def verified_on(self, host: str) -> dict[str, Any]:
        """Wait until every page was verified since now; returns the status then."""
        target = self.status(host)["passes"] + 2
        wait_until("every page verified", lambda: self.status(host)["passes"] >= target)
        return self.status(host)


@pytest.fixture(scope="session")
def lab() -> Lab:
    laboratory = Lab()
    laboratory.up()
    return laboratory


@pytest.fixture
def hosts(lab: Lab) -> Iterator[Hosts]:
    found = Hosts(lab)
    for host in ("a", "b"):
        assert found.leftovers(host) == "", f"an earlier test left something on {host}"
    yield found
    for host, pid in found.started:
        script = "case $(cat /proc/$1/comm) in piggie*) kill -9 $1;; esac"
        with contextlib.suppress(Exception):
            found.sh(host, script, str(pid), check=False)
    for host in ("a", "b"):
        # A tree that ended by itself leaves its group to the next migration's sweep.
        found.sh(host, "sleep 0.2; rmdir /sys/fs/cgroup/phaul-runtime/*/", check=False)


@pytest.fixture
def random_addresses(hosts: Hosts) -> Iterator[None]:
    """Processes started meanwhile have random addresses, as on hosts that are not emulated."""
    setting = "echo $1 > /proc/sys/kernel/randomize_va_space"
    for host in ("a", "b"):
        hosts.sh(host, setting, "2")
    yield
    for host in ("a", "b"):
        hosts.sh(host, setting, "0")
