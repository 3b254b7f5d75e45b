"""The laboratory keeps its word."""

from __future__ import annotations

import subprocess

import pytest
from phaul_lab import Lab, LabError

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


def test_the_hosts_can_do_what_they_are_for(hosts: Hosts) -> None:
    for host in ("a", "b"):
        assert "Looks good" in hosts.sh(host, "criu check 2>&1")
        assert "is supported" in hosts.sh(host, "criu check --feature mem_dirty_track 2>&1")
        assert (
            int(hosts.sh(host, "sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo")) > 5e6
        )
        hosts.sh(
            host, "command -v runc crun dockerd containerd podman redis-server rsync nginx gcc"
        )
    assert hosts.sh("a", "ssh b phaul-runtime --version") == hosts.sh(
        "b", "phaul-runtime --version"
    )


def test_up_again_changes_nothing(lab: Lab) -> None:
    before = lab.status()
    lab.up()
    assert lab.status() == before


def test_what_is_not_up_is_told() -> None:
    with pytest.raises(LabError, match="host a is not up: make lab"):
        Lab("never-started").exec("a", ["true"])
    done = subprocess.run(
        ["tests/lab/lab", "--name", "never-started", "status"], capture_output=True, text=True,
        check=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == "laboratory never-started: down\n"
