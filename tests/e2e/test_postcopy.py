"""Post-copy and hybrid moves between real hosts: every page right, whatever breaks on the way."""

from __future__ import annotations

import json
import os
import queue
import random
import subprocess
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.e2e.conftest import Dirtier, Hosts, wait_until
from tests.e2e.containers import Containers, containers
from tests.e2e.docker_hosts import DockerHosts, docker_hosts, docker_lab
from tests.e2e.observer import Observer

__all__ = ["containers", "docker_hosts", "docker_lab"]

MIB = 32
KILLS = int(os.environ.get("KILLS", "2"))
LISTENING = "ss -Hltn | awk '{print $4}' | sort"
# What works on a post-copy move, by what its command line holds; the victim's own is another.
WORKERS = {
    "a": ("phaul-runtime [m]igrate", "ssh .*phaul-runtime [a]gent"),
    "b": ("phaul-runtime [a]gent", "phaul_runtime[.]pager"),
}


@dataclass
class Running:
    """A `migrate` under way at a, whose events are read as they come."""

    hosts: Hosts
    process: subprocess.Popen[bytes]
    events: list[dict[str, Any]] = field(default_factory=list)
    _queue: queue.Queue[dict[str, Any] | None] = field(default_factory=queue.Queue)

    @classmethod
    def start(cls, hosts: Hosts, target: int | str, *flags: str) -> Running:
        argv = ["phaul-runtime", "migrate", str(target), "--to", "ssh://root@b"]
        argv = hosts.lab.exec_argv("a", [*argv, "--output", "json", *flags])
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        found = cls(hosts, process)
        threading.Thread(target=found._read, daemon=True).start()
        return found

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._queue.put(json.loads(line))
        self._queue.put(None)

    def until(self, name: str, within_s: float = 120) -> dict[str, Any]:
        """The next event of that name."""
        deadline = time.monotonic() + within_s
        while True:
            event = self._queue.get(timeout=max(0.1, deadline - time.monotonic()))
            assert event is not None, (name, self.events[-3:], self.said())
            self.events.append(event)
            if event.get("event") == name:
                return event

    def under_way(self) -> dict[str, Any]:
        """Some pages are over, and most are not."""
        while True:
            event = self.until("serving")
            if event["missing"] < 0.95 * event["pages"]:
                return event

    def end(self, within_s: float = 240) -> int:
        """Its exit code; all of its events are there then."""
        code = self.process.wait(within_s)
        while (event := self._queue.get(timeout=10)) is not None:
            self.events.append(event)
        return code

    def said(self) -> str:
        assert self.process.stderr is not None
        self.process.wait(30)
        return self.process.stderr.read().decode()

    @property
    def report(self) -> dict[str, Any]:
        return self.events[-1]


MODES = [
    "post-copy",
    pytest.param("hybrid", marks=[pytest.mark.thorough, pytest.mark.needs("dirty-tracking")]),
]


def settings(hosts: Hosts, *lines: str) -> str:
    """A configuration at a."""
    path = "/var/tmp/post-copy.yaml"
    text = "transport: {bandwidth_limit: 4MiB, connect_timeout_s: 240}\n" + "".join(
        f"{line}\n" for line in lines
    )
    hosts.sh("a", 'printf %s "$2" > "$1"', path, text)
    return path


def victim(hosts: Hosts, name: str, observer: Observer | None = None, mib: int = MIB) -> Dirtier:
    told = () if observer is None else ("--udp", observer.address)
    found = hosts.dirtier(
        "a", name, "--mib", str(mib), "--hot-mib", str(mib // 2), "--writes", "2000", *told
    )
    wait_until("it runs", lambda: found.status("a")["passes"] > 0)
    return found


def clean(hosts: Hosts) -> None:
    for host in ("a", "b"):
        wait_until(f"nothing is left on {host}", lambda: hosts.leftovers(host) == "", 30)  # noqa: B023


def one_copy(hosts: Hosts, dirtier: Dirtier) -> None:
    wait_until("the source's copy is gone", lambda: not hosts.alive("a", dirtier.pid))
    status = dirtier.verified_on("b")
    assert status["wrong"] == 0, status
    clean(hosts)


@pytest.mark.parametrize("mode", MODES)
def test_every_page_comes_after_the_move(hosts: Hosts, observer: Observer, mode: str) -> None:
    dirtier = victim(hosts, f"late-{mode}", observer)
    before = {host: hosts.sh(host, LISTENING) for host in ("a", "b")}
    running = Running.start(
        hosts, dirtier.pid, "--mode", mode, "--files", "copy", "--config", settings(hosts)
    )
    event = running.until("serving")
    for host in ("a", "b"):
        assert hosts.sh(host, LISTENING) == before[host]
    assert event["missing"] <= event["pages"]
    if mode == "post-copy":
        # That takes its time. The one here is there for nothing but its memory.
        assert hosts.alive("a", dirtier.pid)
        assert "post-copy" in hosts.lab.exec("a", ["phaul-runtime", "status"]).stdout
    assert running.end() == 0, running.said()
    report = running.report
    assert (report["result"], report["mode"]) == ("moved", mode)
    assert report["post_copy"]["pages"] == event["pages"] > 100
    assert bool(report["iterations"]) == (mode == "hybrid")
    assert not report["warnings"]
    assert observer.complaints() == []
    one_copy(hosts, dirtier)


ROUNDS = [pytest.mark.needs("dirty-tracking"), pytest.mark.also_on("emulated-forky")]


@pytest.mark.parametrize("mode", ["post-copy", pytest.param("hybrid", marks=ROUNDS)])
def test_a_container(hosts: Hosts, containers: Containers, mode: str) -> None:
    container = containers.dirtier(
        "a", f"late-{mode}", "--mib", "24", "--hot-mib", "12", "--writes", "500"
    )
    wait_until("it runs", lambda: container.dirtier("a").status("a")["passes"] > 0)
    moved = container.migrate("a", "b", "--mode", mode)
    assert moved.code == 0, moved.stderr
    assert (container.state("a"), container.state("b")) == ("", "running")
    assert moved.report["post_copy"]["pages"] > 1000
    assert container.dirtier("b").verified_on("b")["wrong"] == 0
    clean(hosts)
    if mode == "hybrid":
        return
    # What came late can go on as ever.
    moved = container.migrate("b", "a")
    assert moved.code == 0, moved.stderr
    assert container.dirtier("a").verified_on("a")["wrong"] == 0
    clean(hosts)


@pytest.mark.needs("dirty-tracking")
@pytest.mark.thorough
def test_a_container_of_docker(docker_hosts: DockerHosts) -> None:
    web = docker_hosts.dirtier(
        "a", "late-docker", "--mib", "24", "--hot-mib", "12", "--writes", "500"
    )
    status = web.file("a", "/data/status")
    wait_until("it runs", lambda: docker_hosts.sh("a", f"cat {status}", check=False) != "")
    moved = web.migrate("a", "b", "--mode", "hybrid")
    assert moved.code == 0, moved.stderr
    assert moved.report["post_copy"]["pages"] > 1000
    assert not moved.report["warnings"]
    assert web.dirtier("b").verified_on("b")["wrong"] == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_tree_with_shared_memory(hosts: Hosts, mode: str) -> None:
    dirtier = hosts.dirtier(
        "a", "late-tree", "--mib", "16", "--hot-mib", "8", "--writes", "300", "--children", "2"
    )
    wait_until("it runs", lambda: dirtier.status("a")["passes"] > 0)
    moved = hosts.migrate("a", dirtier.pid, "ssh://root@b", "--files", "copy", "--mode", mode)
    assert moved.code == 0, moved.stderr
    one_copy(hosts, dirtier)


@pytest.mark.parametrize("mode", MODES)
def test_a_refused_restore_lets_the_source_run_on(
    hosts: Hosts, observer: Observer, mode: str
) -> None:
    dirtier = victim(hosts, "late-refused", observer, 16)
    hosts.sh("b", "mkdir -p /etc/phaul-runtime/hooks/post_restore.d && "
             "printf '#!/bin/sh\\nexit 1\\n' > /etc/phaul-runtime/hooks/post_restore.d/no && "
             "chmod 755 /etc/phaul-runtime/hooks/post_restore.d/no")  # fmt: skip
    try:
        moved = hosts.migrate("a", dirtier.pid, "ssh://root@b", "--files", "copy", "--mode", mode)
    finally:
        hosts.sh("b", "rm -r /etc/phaul-runtime/hooks/post_restore.d")
    assert moved.code == 4, moved.stderr
    status = dirtier.verified_on("a")
    assert status["wrong"] == 0
    assert not hosts.alive("b", dirtier.pid)
    assert observer.complaints() == []
    clean(hosts)
    moved = hosts.migrate("a", dirtier.pid, "ssh://root@b", "--files", "copy", "--mode", "hybrid")
    assert moved.code == 0, moved.stderr
    one_copy(hosts, dirtier)


@pytest.mark.timeout(900)
def test_a_cable_that_is_cut_for_a_while(hosts: Hosts, observer: Observer) -> None:
    dirtier = victim(hosts, "late-cut", observer)
    running = Running.start(
        hosts, dirtier.pid, "--mode", "post-copy", "--files", "copy", "--config", settings(hosts)
    )
    running.under_way()
    hosts.lab.cut()
    try:
        time.sleep(20)
    finally:
        hosts.lab.mend()
    assert running.end(400) == 0, running.said()
    assert observer.complaints() == []
    one_copy(hosts, dirtier)


@pytest.mark.timeout(900)
def test_a_cable_that_is_cut_for_good(hosts: Hosts, observer: Observer) -> None:
    dirtier = victim(hosts, "late-gone", observer)
    path = settings(hosts, "timeouts: {recover_s: 5, lost_s: 8, commit_s: 5}")
    running = Running.start(
        hosts, dirtier.pid, "--mode", "post-copy", "--files", "copy", "--config", path
    )
    running.under_way()
    hosts.lab.cut()
    try:
        assert running.end(200) == 5
        said = running.said()
        assert "waits for pages that are here" in said
        migration = running.report["id"]
        assert f"phaul-runtime recover {migration}" in said
        # Blocked there, frozen here.
        ticks = dirtier.status("b")["tick"]
        frozen = dirtier.status("a")["tick"]
        time.sleep(3)
        assert dirtier.status("b")["tick"] == ticks
        assert dirtier.status("a")["tick"] == frozen
        assert "post-copy" in hosts.lab.exec("a", ["phaul-runtime", "status"]).stdout
        tried = hosts.lab.exec(
            "a", ["phaul-runtime", "recover", migration, "--config", path], check=False, timeout=120
        )
        assert tried.returncode == 5, tried.stderr
    finally:
        hosts.lab.mend()
    done = hosts.lab.exec(
        "a", ["phaul-runtime", "recover", migration, "--config", path], check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert observer.complaints() == []
    one_copy(hosts, dirtier)
    again = hosts.lab.exec("a", ["phaul-runtime", "recover", migration], check=False)
    assert again.returncode == 0, again.stderr


@pytest.mark.timeout(3000)
def test_whoever_is_killed(hosts: Hosts, observer: Observer) -> None:
    """`KILLS=20` for the whole of it: one of all that works on it, at a random moment."""
    kills = moves = 0
    while kills < KILLS:
        moves += 1
        dirtier = victim(hosts, f"late-killed-{moves}", observer)
        path = settings(hosts, "timeouts: {recover_s: 60, lost_s: 8}")
        running = Running.start(
            hosts, dirtier.pid, "--mode", "post-copy", "--files", "copy", "--config", path
        )
        migration = running.until("migration_started")["id"]
        running.until("committed")
        time.sleep(random.uniform(0, 7))
        host = random.choice("ab")
        what = random.choice(WORKERS[host])
        script = 'pids=$(pgrep -f "$1" | shuf -n 1); kill -9 $pids; echo $pids'
        killed = hosts.sh(host, script, what, check=False)
        kills += bool(killed)
        code = running.end(300)
        print(f"killed {what} ({killed}) on {host}: exit {code}")
        if code != 0:
            argv = ["phaul-runtime", "recover", migration, "--config", path]
            done = hosts.lab.exec("a", argv, check=False, timeout=300)
            assert done.returncode == 0, (what, done.stderr)
        assert observer.complaints() == []
        one_copy(hosts, dirtier)
        hosts.sh("b", "kill -9 $1", str(dirtier.pid))
        wait_until("it is gone", lambda pid=dirtier.pid: not hosts.alive("b", pid))  # type: ignore[misc]
        observer.heard.clear()
    print(f"{kills} kills in {moves} moves, every page right")
