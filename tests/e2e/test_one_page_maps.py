"""A lazily restored copy misses no page of an area that CRIU has not registered.

The victim (programs/one-page-maps.c) has so many areas that one of them lies where CRIU maps it
beforehand: that one it leaves out.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Hosts, wait_until
from tests.e2e.containers import Containers, containers

__all__ = ["containers"]

SOURCE = Path(__file__).parent / "programs/one-page-maps.c"
NAME = "one-page-maps"
AREAS = 4096
FIXED_CRIU = """#!/bin/sh
exec setarch -R /usr/sbin/criu.real "$@"
"""


@pytest.fixture(scope="session")
def one_page_maps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, with shared libraries: its few areas below the row are a small program's."""
    built = tmp_path_factory.mktemp("maps") / NAME
    argv = ["gcc", "-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-Wl,--build-id"]
    subprocess.run([*argv, "-o", str(built), str(SOURCE)], check=True)
    return built


@pytest.fixture
def installed(hosts: Hosts, one_page_maps: Path) -> Hosts:
    for host in ("a", "b"):
        hosts.lab.push(host, one_page_maps, f"/var/tmp/{NAME}.new")
        hosts.sh(host, f"mv /var/tmp/{NAME}.new /usr/local/bin/{NAME}")
    return hosts


@pytest.fixture(params=["fixed", "random"])
def addresses(hosts: Hosts, request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """What the victim is told; CRIU at b has the same addresses each time, too, or other ones."""
    if request.param == "random":
        yield []
        return
    hosts.sh("b", 'mv /usr/sbin/criu /usr/sbin/criu.real; printf %s "$1" > /usr/sbin/criu;'
             "chmod 755 /usr/sbin/criu", FIXED_CRIU)  # fmt: skip
    yield ["fixed"]
    hosts.sh("b", "mv /usr/sbin/criu.real /usr/sbin/criu")


def passes(said: str) -> list[list[int]]:
    """Of the whole lines of a status: number, first wrong page, wrong pages."""
    return [[*map(int, line.split())] for line in said.split("\n")[:-1]]


def wrong_after(read: Callable[[], str]) -> tuple[int, int]:
    """The first wrong page and how many, in the third pass from now on."""
    target = len(passes(read())) + 3
    wait_until("all pages were looked at", lambda: len(passes(read())) >= target)
    _, first, wrong = passes(read())[-1]
    return first, wrong


@pytest.mark.parametrize("how", [("--restore", "lazy"), ("--mode", "post-copy")], ids=" ".join)
def test_of_a_process(installed: Hosts, addresses: list[str], how: tuple[str, str]) -> None:
    hosts, status = installed, f"/var/tmp/{NAME}.status"
    start = '"$@" </dev/null >/dev/null 2>&1 & echo $!'
    pid = int(hosts.sh("a", start, NAME, status, str(AREAS), *addresses))
    try:
        wait_until("it runs", lambda: hosts.sh("a", 'cat "$1"', status, check=False) != "")
        moved = hosts.migrate("a", pid, "ssh://root@b", "--files", "copy", *how)
        assert moved.code == 0, moved.stderr
        assert wrong_after(lambda: hosts.sh("b", 'cat "$1"; echo', status)) == (-1, 0)
        whole(moved.report)
    finally:
        for host in ("a", "b"):
            script = "case $(cat /proc/$1/comm) in one-page*) kill -9 $1;; esac 2>/dev/null"
            hosts.sh(host, script, str(pid), check=False)


def test_of_a_container(installed: Hosts, containers: Containers, addresses: list[str]) -> None:
    container = containers.run("a", "maps", NAME, "/data/status", str(AREAS), *addresses)
    status = f"{container.rootfs}/data/status"
    wait_until("it runs", lambda: installed.sh("a", 'cat "$1"', status, check=False) != "")
    moved = container.migrate("a", "b", "--restore", "lazy")
    assert moved.code == 0, moved.stderr
    assert wrong_after(lambda: installed.sh("b", 'cat "$1"; echo', status)) == (-1, 0)
    whole(moved.report)


def whole(report: dict[str, object]) -> None:
    """Every page is accounted for, and nothing was odd."""
    assert report["restore"] == "lazy"
    assert report["warnings"] == []
    lazy: dict[str, int] = report["lazy"]  # type: ignore[assignment]
    fates = ("filled", "present", "dropped", "ended", "unshared", "lost")
    assert lazy["pages"] == sum(lazy[fate] for fate in fates) > AREAS
    assert lazy["filled"] == lazy["pages"], lazy
