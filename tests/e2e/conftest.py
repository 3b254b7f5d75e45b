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


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--labs native,emulated`: only the tests that run there."""
    parser.addoption("--labs", default="", help=f"only tests of these: {', '.join(labs.LABS)}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each test of hosts runs in the laboratory that has what it needs, or is skipped by name."""
    if "lab" not in metafunc.fixturenames:
        return
    marks = list(metafunc.definition.iter_markers("needs"))
    chosen, lacking = labs.choose({need for mark in marks for need in mark.args})
    names = [chosen or "none"]
    for mark in metafunc.definition.iter_markers("also_on"):
        names += [name for name in mark.args if name not in names]
    for mark in metafunc.definition.iter_markers("only_on"):
        names = list(mark.args)
    if os.environ.get("THOROUGH") and names == ["native"]:
        names.append("emulated")
    skip = pytest.mark.skip(reason=lacking)
    parameters = [pytest.param(name, marks=[skip] if name == "none" else []) for name in names]
    metafunc.parametrize("lab", parameters, indirect=True, scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What `--labs` leaves out."""
    wanted = [name for name in config.getoption("--labs").split(",") if name]
    if not wanted:
        return
    if unknown := set(wanted) - labs.LABS.keys():
        raise pytest.UsageError(f"no such laboratory: {sorted(unknown)}")
    kept = [item for item in items if _lab_of(item) in {*wanted, "none", ""}]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _lab_of(item: pytest.Item) -> str:
    """The laboratory that a test runs in; empty for those without hosts."""
    spec = getattr(item, "callspec", None)
    return str(spec.params.get("lab", "")) if spec else ""


@pytest.fixture(scope="session")
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    kind = labs.LABS[request.param]
    laboratory = Lab(kind.name)
    # Native hosts end with this run, however it ends; the others take long to come up.
    laboratory.up(kind=kind, tied=kind.native)
    yield laboratory
    if kind.native:
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
        script = "case $(cat /proc/$1/comm) in piggie*) kill -9 $1;; esac"
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
