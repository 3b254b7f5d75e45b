"""What pre-copy is for: little is left for the freeze."""

from __future__ import annotations

import pytest

from tests.e2e.conftest import wait_until
from tests.e2e.docker_hosts import DockerHosts, docker_hosts, docker_lab

__all__ = ["docker_hosts", "docker_lab"]

pytestmark = [pytest.mark.needs("dirty-tracking"), pytest.mark.also_on("emulated-forky")]

PAGES = 64 * 256


def test_the_final_dump_carries_little(docker_hosts: DockerHosts) -> None:
    """All of memory goes over while the container runs; then what it rewrites meanwhile."""
    memory = ("--mib", "64", "--hot-mib", "4", "--writes", "300")
    web = docker_hosts.dirtier("a", "precopy", *memory)
    status = web.file("a", "/data/status")
    wait_until(
        "its memory is full", lambda: docker_hosts.sh("a", f"cat {status}", check=False) != ""
    )
    moved = web.migrate("a", "b")
    assert moved.code == 0, moved.stderr
    report = moved.report
    assert report["iterations"][0]["pages_written"] >= PAGES
    written, skipped = report["final_pages_written"], report["final_pages_skipped"]
    assert written + skipped >= PAGES
    assert written < 0.15 * (written + skipped)
    assert web.dirtier("b").verified_on("b")["wrong"] == 0
