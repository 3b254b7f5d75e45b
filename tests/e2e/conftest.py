"""Two real hosts for the whole run, and victims on them."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from phaul_lab import Lab

from tests.e2e import labs
from tests.e2e.observer import Observer
from tests.e2e.table import pytest_terminal_summary

__all__ = ["pytest_terminal_summary"]

WITHIN_S = 120.0
# Each way takes a minute or two where hosts are emulated: `make test-all` goes them all.
THERE, BACK = ("a", "b"), ("b", "a")
WAYS = [
    pytest.param([THERE], id="there"),
    pytest.param([THERE, BACK, THERE], id="there-and-back-and-there", marks=pytest.mark.thorough),
]


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

    def patient(self, host: str) -> tuple[str, ...]:
        """Flags for a configuration that waits for an agent on a slow host."""
        if self.lab.native:
            return ()
        path = "/var/tmp/patient.yaml"
        self.sh(host, 'echo "transport: {connect_timeout_s: 240}" > "$1"', path)
        return ("--config", path)

    def migrate(self, host: str, target: int | str, to: str, *flags: str) -> Moved:
        if "--config" not in flags:
            flags = (*flags, *self.patient(host))
        argv = ["phaul-runtime", "migrate", str(target), "--to", to, "--output", "json", *flags]
        done = self.lab.exec(host, argv, check=False, timeout=300 if self.lab.native else 550)
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


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--labs native,emulated`: only the tests that run there."""
    parser.addoption("--labs", default="", help=f"only tests of these: {', '.join(labs.LABS)}")
    parser.addoption("--down", action="store_true", help="emulated hosts end with their tests, too")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test of hosts with each laboratory; most of those are put away again below."""
    if "lab" in metafunc.fixturenames:
        metafunc.parametrize("lab", labs.LABS, indirect=True, scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Each test of hosts runs in the laboratory that has what it needs, or is skipped by name."""
    wanted = [name for name in config.getoption("--labs").split(",") if name]
    if unknown := set(wanted) - labs.LABS.keys():
        raise pytest.UsageError(f"no such laboratory: {', '.join(sorted(unknown))}")
    kept: list[pytest.Item] = []
    left: list[pytest.Item] = []
    for item in items:
        (kept if _runs_there(item, wanted) else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


def _runs_there(item: pytest.Item, wanted: list[str]) -> bool:
    """Whether a test runs in the laboratory that it stands there with."""
    spec = getattr(item, "callspec", None)
    if spec is None or "lab" not in spec.params:
        return True
    there = spec.params["lab"]
    chosen, lacking = labs.choose({need for m in item.iter_markers("needs") for need in m.args})
    only = [name for mark in item.iter_markers("only_on") for name in mark.args]
    names = only or [chosen, *(name for m in item.iter_markers("also_on") for name in m.args)]
    if os.environ.get("THOROUGH") and not only and names == ["native"]:
        names.append("emulated")
    if not chosen and not only:
        item.add_marker(pytest.mark.skip(reason=lacking))
        return bool(there == next(iter(labs.LABS)))
    return there in names and (not wanted or there in wanted)


@pytest.fixture(scope="session")
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    kind = labs.LABS[request.param]
    laboratory = Lab(kind.name)
    # Native hosts end with this run, however it ends; the others take long to come up.
    laboratory.up(kind=kind, tied=kind.native)
    yield laboratory
    if kind.native or request.config.getoption("--down"):
        laboratory.down()


@pytest.fixture
def observer(lab: Lab) -> Iterator[Observer]:
    """Hears what a victim tells, from outside of both hosts."""
    found = Observer(lab)
    yield found
    found.close()


@pytest.fixture
def hosts(lab: Lab) -> Iterator[Hosts]:
    found = Hosts(lab)
    for host in ("a", "b"):
        assert found.leftovers(host) == "", f"an earlier test left something on {host}"
    yield found
    for host, pid in found.started:
        # Gone it is only once the kernel has freed its memory.
        script = (
            "case $(cat /proc/$1/comm) in piggie*) kill -9 $1;; *) exit;; esac;"
            "for i in $(seq 200); do kill -0 $1 || exit; sleep 0.05; done"
        )
        with contextlib.suppress(Exception):
            found.sh(host, script, str(pid), check=False)
    for host in ("a", "b"):
        # A tree that ended by itself leaves its group to the next migration's sweep.
        found.sh(host, "sleep 0.2; rmdir /sys/fs/cgroup/phaul-runtime/*/", check=False)


@pytest.fixture
def random_addresses(hosts: Hosts) -> Iterator[None]:
    """Processes started meanwhile have random addresses, as on hosts that are not emulated."""
    if hosts.lab.native:
        yield
        return
    setting = "echo $1 > /proc/sys/kernel/randomize_va_space"
    for host in ("a", "b"):
        hosts.sh(host, setting, "2")
    yield
    for host in ("a", "b"):
        hosts.sh(host, setting, "0")
