"""Every engine passes one suite, `phaul_runtime.testing`, with both halves on one real host."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from phaul_lab import Lab

from phaul_runtime.testing import CHECKS
from tests.e2e.conftest import Hosts
from tests.e2e.docker_hosts import docker_lab, docker_network
from tests.e2e.test_library_use import PYTHON

__all__ = ["docker_lab"]

PROGRAMS = Path(__file__).parent / "programs"
# crun's engine is runc's with another program.
ENGINES = ("process", "runc", pytest.param("crun", marks=pytest.mark.thorough), "docker")


@dataclass
class Results:
    """Of each engine, from one run: its start alone takes longer than many a check."""

    hosts: Hosts
    by_engine: dict[str, dict[str, Any]] = field(default_factory=dict)

    def of(self, engine: str) -> dict[str, Any]:
        if engine not in self.by_engine:
            self.by_engine[engine] = {}  # a run that failed is not repeated for each check
            assert self.hosts.leftovers("a") == "", "an earlier test left something on a"
            self.by_engine[engine] = self._run(engine)
            assert self.hosts.leftovers("a") == ""
        return self.by_engine[engine]

    def _run(self, engine: str) -> dict[str, Any]:
        lab, directory = self.hosts.lab, f"/run/conformance-{engine}"
        for name in ("conformance.py", "make_bundle.py"):
            lab.push("a", PROGRAMS / name, f"/tmp/{name}")
        network = f"DOCKER_NETWORK={docker_network(lab)}"
        argv = ["env", network, PYTHON, "/tmp/conformance.py", engine, directory]
        done = lab.exec("a", argv, check=False, timeout=550)
        self.hosts.sh("a", 'rm -rf "$1"', directory)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        found = {line["check"]: line["failure"] for line in lines}
        assert done.returncode == 0, f"after {list(found)}: {done.stderr}"
        return found


@pytest.fixture(scope="session")
def results(lab: Lab) -> Results:
    return Results(Hosts(lab))


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
@pytest.mark.parametrize("engine", ENGINES)
def test_conforms(
    results: Results, request: pytest.FixtureRequest, engine: str, check: str
) -> None:
    if engine == "docker":
        request.getfixturevalue("docker_lab")
    found = results.of(engine)
    assert check in found, f"{check} was not run: {list(found)}"
    assert found[check] is None, found[check]
