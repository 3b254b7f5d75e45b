"""The laboratory keeps its word."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from phaul_lab import Lab, LabError
from phaul_lab.lab import EMULATED
from phaul_lab.lab import NATIVE as NATIVE_KIND
from phaul_lab.machine import cgroup_root, soft_dirty

from tests.e2e import labs
from tests.e2e.conftest import Hosts, wait_until


@pytest.mark.parametrize("word", ["", "two words", 'it\'s "quoted"', "$HOME; `id` *", "a\nb", "-x"])
def test_arguments_arrive_unchanged(hosts: Hosts, word: str) -> None:
    done = hosts.lab.exec("a", ["printf", "%s|", word, "end"])
    assert done.stdout == f"{word}|end|"


def test_stdin_and_exit_code_pass_through(hosts: Hosts) -> None:
    done = hosts.lab.exec("b", ["sh", "-c", "cat; exit 7"], stdin="through\n", check=False)
    assert (done.stdout, done.returncode) == ("through\n", 7)


def test_the_cable_can_be_cut_and_mended(hosts: Hosts) -> None:
    ping = ["ping", "-c", "1", "-W", "2", "b"]

    def reachable() -> bool:
        return hosts.lab.exec("a", ping, check=False).returncode == 0

    assert reachable()
    hosts.lab.cut()
    try:
        assert not reachable()
    finally:
        hosts.lab.mend()
    wait_until("the cable is mended", reachable)


@pytest.mark.also_on("emulated", "emulated-forky")
def test_the_hosts_can_do_what_they_are_for(hosts: Hosts) -> None:
    tracks = soft_dirty() or not hosts.lab.native
    for host in ("a", "b"):
        assert "Looks good" in hosts.sh(host, "criu check 2>&1")
        said = hosts.sh(host, "criu check --feature mem_dirty_track 2>&1", check=False)
        assert ("is supported" in said) == tracks
        hosts.sh(
            host, "command -v runc crun dockerd containerd podman redis-server rsync nginx gcc"
        )
    assert hosts.sh("a", "ssh b phaul-runtime --version") == hosts.sh(
        "b", "phaul-runtime --version"
    )


def test_up_again_changes_nothing(lab: Lab) -> None:
    before = lab.status()
    lab.up(kind=NATIVE_KIND if lab.native else EMULATED)
    assert lab.status() == before


def test_what_is_not_up_is_told() -> None:
    with pytest.raises(LabError, match="host a is not up: make lab"):
        Lab("never-started").exec("a", ["true"])
    done = subprocess.run(
        ["tests/lab/lab", "--name", "never-started", "status"], capture_output=True, text=True,
        check=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == "laboratory never-started: down\n"


NATIVE = pytest.mark.only_on("native")
BROUGHT_UP = """
import sys, time
sys.path.insert(0, "tests/lab")
from phaul_lab.lab import NATIVE, Lab
Lab(sys.argv[1]).up(kind=NATIVE, tied=True)
print("up", flush=True)
time.sleep(600)
"""


def traces(name: str) -> list[str]:
    """What a laboratory of that name has on this machine: cgroups, mounts, links, processes."""
    root = cgroup_root()
    assert root is not None
    found = [str(path) for path in root.glob(f"phaul-lab.{name}.*")]
    mounts = Path("/proc/mounts").read_text().splitlines()
    found += [line for line in mounts if f"/labs/{name}/" in line]
    loops = [path.read_text() for path in Path("/sys/block").glob("loop*/loop/backing_file")]
    found += [path for path in loops if f"/labs/{name}/" in path]
    links = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True)
    return found + [line for line in links.stdout.splitlines() if line.startswith("cable")]


@NATIVE
@pytest.mark.parametrize("after_s", [0.3, 0.8, None])
def test_a_killed_harness_leaves_nothing(lab: Lab, after_s: float | None) -> None:
    name = f"killed{os.getpid()}"
    argv = [sys.executable, "-c", BROUGHT_UP, name]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as harness:
        if after_s is None:
            assert harness.stdout is not None
            assert harness.stdout.readline() == "up\n"
            assert len([each for each in traces(name) if "phaul-lab." in each]) == 2
        else:
            time.sleep(after_s)
        harness.kill()
    # Those that it brought up end with it; what it was about to start, `down` ends.
    if after_s is not None:
        Lab(name).down()
    wait_until("nothing is left", lambda: traces(name) == [], 30)
    Lab(name).down()


@NATIVE
def test_native_hosts_are_closed(hosts: Hosts) -> None:
    """Nothing of what started them is open in them, and their pid 1 reaps."""
    for host in ("a", "b"):
        opened = hosts.sh(host, "readlink /proc/1/fd/*").split()
        assert set(opened) <= {"/dev/null"}, opened
        assert hosts.sh(host, "ls /sys/fs/cgroup/cgroup.procs /run/old 2>&1", check=False)
        hosts.sh(host, "sh -c 'sleep 0.1 & exec true'")
        wait_until(
            "it was reaped",
            lambda host=host: hosts.sh(host, "ps -eo stat= | grep -c Z", check=False) == "0",  # type: ignore[misc]
        )
        assert hosts.sh(host, "stat -f -c %T /var/lib/phaul-runtime") == "ext2/ext3"
    facts = {host: hosts.sh(host, "readlink /proc/self/ns/pid") for host in ("a", "b")}
    assert facts["a"] != facts["b"]


@NATIVE
def test_laboratories_live_side_by_side(lab: Lab) -> None:
    other = Lab(f"other{os.getpid()}")
    other.up(kind=NATIVE_KIND, tied=True)
    try:
        other.exec("a", ["touch", "/tmp/other"])
        assert lab.exec("a", ["test", "-e", "/tmp/other"], check=False).returncode == 1
        other.cut()
        assert lab.exec("a", ["ping", "-c", "1", "-W", "2", "b"]).returncode == 0
    finally:
        other.down()
    assert traces(other.name) == []


def test_what_a_test_needs_is_named() -> None:
    assert labs.choose(set())[0] in ("native", "emulated")
    assert labs.choose({"own-kernel"})[0] == "emulated"
    with pytest.raises(ValueError, match="no such need"):
        labs.choose({"luck"})


def test_where_no_host_is_to_be_had_the_need_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labs, "why_not_emulated", lambda: "not installed: qemu-system-x86")
    name, why = labs.choose({"own-kernel"})
    assert name == ""
    assert why == (
        "needs hosts whose clock and settings are their own: not installed: qemu-system-x86"
    )
