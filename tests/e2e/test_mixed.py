"""Moves between hosts with CRIU 4.1 and 4.2, whose pages and page maps differ: no page is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Dirtier, Hosts, wait_until
from tests.e2e.portable import portable

__all__ = ["portable"]

PROGRAM = "/var/tmp/piggie-mixed"
BOTH_WAYS = pytest.mark.parametrize(("source", "destination"), [("a", "b"), ("b", "a")])
# Two rounds, and time for emulated hosts that have other work.
PATIENT = """policy: {max_iterations: 2, max_downtime_ms: 1}
transport: {connect_timeout_s: 120}
timeouts: {lost_s: 120}
"""
WAYS = {
    "full": ("--restore", "full"),
    "lazy": ("--restore", "lazy"),
    "post-copy": ("--mode", "post-copy"),
    "hybrid": ("--mode", "hybrid"),
}


@pytest.fixture
def mixed(hosts: Hosts, portable: Path) -> Iterator[Hosts]:
    versions = {hosts.sh(host, "criu --version | head -n 1") for host in ("a", "b")}
    assert len(versions) == 2, versions
    for host in ("a", "b"):
        hosts.lab.push(host, portable, PROGRAM)
    yield hosts
    for host in ("a", "b"):
        hosts.sh(host, "rm -f $1", PROGRAM)


def moved(
    hosts: Hosts, source: str, destination: str, way: str, mib: int, *flags: str
) -> dict[str, object]:
    """A tree of two that rewrites some of its memory, moved and verified there; the report."""
    status = f"/var/tmp/mixed-{source}-{way}.status"
    sizes = ["--mib", str(mib), "--hot-mib", "2", "--writes", "300", "--children", "1"]
    argv = [PROGRAM, "--status", status, "--verifies", "4000", "--detach", *sizes]
    pid = int(hosts.lab.exec(source, argv).stdout)
    hosts.started += [("a", pid), ("b", pid)]
    victim = Dirtier(hosts, pid, status)
    wait_until("it runs", lambda: victim.status(source)["passes"] > 0)
    to = f"ssh://root@{destination}"
    done = hosts.migrate(source, pid, to, "--files", "copy", *WAYS[way], *flags)
    assert done.code == 0, done.stderr
    assert not done.report["warnings"], done.report["warnings"]
    wait_until("the source's copy is gone", lambda: not hosts.alive(source, pid))
    found = victim.verified_on(destination)
    assert found["wrong"] == 0, found
    return done.report


@pytest.mark.only_on("native-mixed")
@BOTH_WAYS
@pytest.mark.parametrize("way", ["full", "lazy", "post-copy"])
def test_no_page_is_wrong(mixed: Hosts, source: str, destination: str, way: str) -> None:
    report = moved(mixed, source, destination, way, 48)
    assert str(report["restore"]).startswith("full" if way == "full" else "lazy")
    assert bool(report["post_copy"]) == (way == "post-copy")


@pytest.mark.only_on("emulated-mixed")
@pytest.mark.thorough
@pytest.mark.timeout(900)
@BOTH_WAYS
@pytest.mark.parametrize("way", ["hybrid", "lazy", "full"])
def test_rounds_of_pre_copy(mixed: Hosts, source: str, destination: str, way: str) -> None:
    """What a round leaves out is looked up in the one before it, at either end."""
    path = "/var/tmp/mixed-rounds.yaml"
    mixed.sh(source, f'printf %s "{PATIENT}" > "$1"', path)
    report = moved(mixed, source, destination, way, 8, "--config", path)
    rounds = report["iterations"]
    assert isinstance(rounds, list)
    assert len(rounds) == 2
    assert rounds[1]["pages_skipped"] > 0
    assert bool(report["post_copy"]) == (way == "hybrid")


@pytest.mark.only_on("native-mixed")
@BOTH_WAYS
def test_crius_own_page_server_is_refused_by_name(
    mixed: Hosts, source: str, destination: str
) -> None:
    path = "/var/tmp/mixed.yaml"
    mixed.sh(source, 'echo "criu: {page_server: criu}" > "$1"', path)
    status = "/var/tmp/mixed-refused.status"
    argv = [PROGRAM, "--status", status, "--detach"]
    pid = int(mixed.lab.exec(source, argv).stdout)
    mixed.started.append((source, pid))
    to = f"ssh://root@{destination}"
    refused = mixed.migrate(source, pid, to, "--files", "copy", "--config", path)
    assert refused.code == 3, refused.stderr
    assert "criu.page_server: criu" in refused.stderr
    assert mixed.alive(source, pid)
