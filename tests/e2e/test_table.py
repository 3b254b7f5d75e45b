"""Every engine in every mode, in every laboratory: moved with no page wrong, or refused by name.

The table of it is printed at the end (`table.py`). What is refused is stated here: a cell that
begins to work, or ceases to, fails.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from phaul_lab.machine import soft_dirty

from tests.e2e.conftest import Dirtier, Hosts, Moved, wait_until
from tests.e2e.containers import Containers, containers
from tests.e2e.docker_hosts import DockerHosts, docker_hosts, docker_lab
from tests.e2e.labs import LABS
from tests.e2e.portable import portable
from tests.e2e.table import MODES, TABLE, Cell

__all__ = ["containers", "docker_hosts", "docker_lab", "portable"]

ENGINES = ("process", "runc", "crun", "docker")
PROGRAM = "/var/tmp/piggie-portable"
SIZES = ("--mib", "12", "--hot-mib", "2", "--writes", "300")
# By engine and mode: the check that refuses it, everywhere.
REFUSED = {
    ("crun", "lazy"): "lazy-pages",
    ("crun", "hybrid"): "mode",
    ("crun", "post-copy"): "mode",
}
# The same, by suites: crun 1.21 of trixie does not restore what crun 1.28 of forky made.
REFUSED_BETWEEN = {
    ("forky", "trixie", "crun", "lazy"): "runtime",
    ("forky", "trixie", "crun", "full"): "runtime",
}


@dataclass
class Victim:
    """What is moved: how to, its process as seen by either host, and whether a host has it."""

    migrate: Callable[..., Moved]
    on: Callable[[str], Dirtier]
    there: Callable[[str], bool]


def process(request: pytest.FixtureRequest, cell: Cell, name: str) -> Victim:
    hosts: Hosts = request.getfixturevalue("hosts")
    program: Path = request.getfixturevalue("portable")
    for host in ("a", "b"):
        hosts.lab.push(host, program, PROGRAM)
    status = f"/var/tmp/{name}.status"
    argv = [PROGRAM, "--status", status, "--verifies", "4000", "--detach", *SIZES]
    pid = int(hosts.lab.exec(cell.source, argv).stdout)
    hosts.started += [("a", pid), ("b", pid)]

    def migrate(host: str, to: str, *flags: str) -> Moved:
        return hosts.migrate(host, pid, f"ssh://root@{to}", "--files", "copy", *flags)

    dirtier = Dirtier(hosts, pid, status)
    return Victim(migrate, lambda _host: dirtier, lambda host: hosts.alive(host, pid))


def oci(request: pytest.FixtureRequest, cell: Cell, name: str) -> Victim:
    found: Containers = request.getfixturevalue("containers")
    container = found.dirtier(cell.source, name, *SIZES, runtime=cell.engine)
    return Victim(
        container.migrate, container.dirtier, lambda host: container.state(host) == "running"
    )


def docker(request: pytest.FixtureRequest, cell: Cell, name: str) -> Victim:
    found: DockerHosts = request.getfixturevalue("docker_hosts")
    container = found.dirtier(cell.source, name, *SIZES, flags="--network host")
    return Victim(
        container.migrate, container.dirtier, lambda host: container.status(host) == "running"
    )


START = {"process": process, "runc": oci, "crun": oci, "docker": docker}


def expected_refusal(cell: Cell) -> str:
    """The name of the check, or empty: it is to move."""
    kind = LABS[cell.lab]
    suites = (kind.suite_of(cell.source), kind.suite_of(cell.destination))
    what = (cell.engine, cell.mode)
    return REFUSED_BETWEEN.get((*suites, *what), REFUSED.get(what, ""))


def refusal(moved: Moved) -> str:
    """The name of the check that refuses, said in the one line of the cause."""
    said = [line for line in moved.stderr.splitlines() if line.startswith("phaul-runtime: ")]
    assert len(said) == 1, moved.stderr
    named = re.search(r"\(check ([a-z-]+)\)$", said[0])
    assert named, said
    return named[1]


def dirty_tracking(lab: str) -> bool:
    """Whether there are rounds of pre-copy in that laboratory; a move there is one without."""
    return not LABS[lab].native or soft_dirty()


def assert_moved(hosts: Hosts, cell: Cell, victim: Victim, moved: Moved) -> None:
    """It runs there and nowhere else, in the way that was asked for, and every page is right."""
    report = moved.report
    assert not report["warnings"], report["warnings"]
    assert bool(report["post_copy"]) == (cell.mode in ("post-copy", "hybrid"))
    assert str(report["restore"]).partition(":")[0] == ("full" if cell.mode == "full" else "lazy")
    tracked = dirty_tracking(cell.lab)
    assert bool(report["iterations"]) == (tracked and cell.mode != "post-copy")
    assert tracked or cell.mode == "post-copy" or "no dirty tracking" in report["pre_copy"]
    wait_until("the source's copy is gone", lambda: not victim.there(cell.source))
    found = victim.on(cell.destination).verified_on(cell.destination)
    assert found["wrong"] == 0, found
    for host in ("a", "b"):
        wait_until(f"nothing is left on {host}", lambda: hosts.leftovers(host) == "", 30)  # noqa: B023


def try_cell(request: pytest.FixtureRequest, cell: Cell) -> None:
    """Try it, and say what became of it."""
    TABLE.cells[cell] = "FAILED"
    hosts: Hosts = request.getfixturevalue("hosts")
    victim = START[cell.engine](request, cell, f"table-{cell.engine}-{cell.mode}-{cell.source}")
    dirtier = victim.on(cell.source)
    tells = f"grep -q '\"passes\": *[1-9]' {dirtier.status_file} && echo yes"
    wait_until("it runs", lambda: hosts.sh(cell.source, tells, check=False) == "yes")
    moved = victim.migrate(cell.source, cell.destination, *MODES[cell.mode])
    expected = expected_refusal(cell)
    TABLE.cells[cell] = f"FAILED: exit {moved.code}"
    if moved.code == 3:
        check = refusal(moved)
        TABLE.cells[cell] = f"FAILED: refused: {check}"
        assert check == expected, moved.stderr
        assert not moved.named("frozen")
        assert dirtier.verified_on(cell.source)["wrong"] == 0
        TABLE.cells[cell] = f"refused: {check}"
        return
    assert moved.code == 0, moved.stderr
    TABLE.cells[cell] = "FAILED: after the move"
    assert_moved(hosts, cell, victim, moved)
    assert not expected, f"the check {expected} was to refuse it"
    TABLE.cells[cell] = "moved"
    if not dirty_tracking(cell.lab):
        TABLE.notes[cell.lab] = "the kernel has no dirty tracking: no round of pre-copy"


EACH_ENGINE = pytest.mark.parametrize("engine", ENGINES)
EACH_MODE = pytest.mark.parametrize("mode", MODES)
# Of processes test_mixed.py has that; without rounds, as on most machines, hybrid is post-copy.
EACH_CONTAINER = pytest.mark.parametrize(
    "engine", [pytest.param("process", marks=pytest.mark.thorough), *ENGINES[1:]]
)
EACH_OTHER_MODE = pytest.mark.parametrize(
    "mode", [pytest.param(m, marks=[pytest.mark.thorough] * (m == "hybrid")) for m in MODES]
)
# test_mixed.py goes both ways with a process.
BOTH_WAYS = pytest.mark.parametrize(
    "direction", ["ab", pytest.param("ba", marks=pytest.mark.thorough)]
)


@pytest.fixture
def place(request: pytest.FixtureRequest, hosts: Hosts) -> str:
    """The laboratory's name."""
    return str(request.node.callspec.params["lab"])


@pytest.mark.only_on("native")
@EACH_MODE
@EACH_ENGINE
def test_native(request: pytest.FixtureRequest, place: str, engine: str, mode: str) -> None:
    try_cell(request, Cell(place, "a", "b", engine, mode))


@pytest.mark.only_on("native-mixed")
@EACH_OTHER_MODE
@EACH_CONTAINER
@BOTH_WAYS
def test_native_pair(
    request: pytest.FixtureRequest, place: str, direction: str, engine: str, mode: str
) -> None:
    try_cell(request, Cell(place, direction[0], direction[1], engine, mode))


@pytest.mark.only_on("emulated", "emulated-forky")
@pytest.mark.thorough
@pytest.mark.timeout(900)
@EACH_MODE
@EACH_ENGINE
def test_emulated(request: pytest.FixtureRequest, place: str, engine: str, mode: str) -> None:
    try_cell(request, Cell(place, "a", "b", engine, mode))


@pytest.mark.only_on("emulated-mixed")
@pytest.mark.thorough
@pytest.mark.timeout(900)
@EACH_MODE
@EACH_ENGINE
@BOTH_WAYS
def test_emulated_pair(
    request: pytest.FixtureRequest, place: str, direction: str, engine: str, mode: str
) -> None:
    try_cell(request, Cell(place, direction[0], direction[1], engine, mode))
