"""Containers of runc and crun move between real hosts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from tests.e2e.conftest import WAYS, Hosts, Moved, wait_until
from tests.e2e.containers import Container, Containers, containers

__all__ = ["containers"]

RECVTTY = Path(__file__).parent / "programs/recvtty.py"


def clean(hosts: Hosts) -> None:
    for host in ("a", "b"):
        assert hosts.leftovers(host) == ""


@pytest.mark.needs("dirty-tracking", "controllers")
@pytest.mark.also_on("emulated-forky")
@pytest.mark.parametrize("ways", WAYS)
@pytest.mark.parametrize("runtime", ["runc", pytest.param("crun", marks=pytest.mark.thorough)])
def test_dirtier_moves(
    hosts: Hosts, containers: Containers, runtime: str, ways: list[tuple[str, str]]
) -> None:
    limits = {"memory": {"limit": 256 << 20}, "pids": {"limit": 77}}
    container = containers.dirtier(
        "a", f"pig-{runtime}", "--mib", "24", "--hot-mib", "2", "--writes", "200",
        runtime=runtime, resources=limits,
    )  # fmt: skip
    wait_until("it runs", lambda: container.dirtier("a").status("a")["passes"] > 0)
    container.exec("a", "sh", "-c", "echo kept > /data/kept; echo gone > /data/gone")
    for number, (source, destination) in enumerate(ways):
        container.exec(source, "sh", "-c", f"echo {number} > /data/n{number}; rm -f /data/gone")
        moved = container.migrate(source, destination)
        assert moved.code == 0, moved.stderr
        assert container.state(source) == ""
        assert container.state(destination) == "running"
        status = container.dirtier(destination).verified_on(destination)
        assert (status["wrong"], status["pid"], status["pages"]) == (0, 1, 24 << 8)
        report = moved.report
        assert (report["engine"], report["restored_pid"]) == (runtime, container.pid(destination))
        assert len(report["iterations"]) > 1
        assert report["iterations"][1]["pages_skipped"] > 2048
        assert report["final_pages_written"] < 1024
        files = container.exec(destination, "ls", "/data").split()
        assert files == ["kept", *(f"n{n}" for n in range(number + 1)), "status"]
        group = f"/sys/fs/cgroup/{container.name}"
        assert hosts.sh(destination, f"cat {group}/memory.max") == str(256 << 20)
        assert hosts.sh(destination, f"cat {group}/pids.max") == "77"
        assert not hosts.sh(source, f"ls {group} 2>/dev/null", check=False)
        clean(hosts)
    # It is the runtime's own container there.
    assert container.exec("b", "cat", "/data/kept") == "kept\n"
    hosts.lab.exec("b", [runtime, "pause", container.name])
    assert container.state("b") == "paused"
    hosts.lab.exec("b", [runtime, "resume", container.name])
    assert container.dirtier("b").verified_on("b")["wrong"] == 0


def test_a_failed_restore_leaves_it_running_and_a_retry_works(
    hosts: Hosts, containers: Containers
) -> None:
    container = containers.dirtier("a", "pig-fails", "--mib", "8", "--writes", "100")
    wait_until("it runs", lambda: container.dirtier("a").status("a")["passes"] > 0)
    # Its cgroup at b cannot take it: CRIU or the runtime fails there, late.
    hosts.sh("b", "mv /usr/sbin/criu /usr/sbin/criu.real; printf '%s' \"$1\" > /usr/sbin/criu;"
             "chmod 755 /usr/sbin/criu", CRIU_WITHOUT_PROGRAM)  # fmt: skip
    try:
        failed = container.migrate("a", "b")
    finally:
        hosts.sh("b", "mv /usr/sbin/criu.real /usr/sbin/criu")
    assert failed.code == 4, failed.stderr
    assert "piggie-dirty" in failed.stderr, failed.stderr
    assert "type NOTIFY errno 0" not in failed.stderr.splitlines()[0]
    assert container.state("a") == "running"
    assert container.state("b") == ""
    clean(hosts)
    assert hosts.sh("b", f"ls {container.bundle}", check=False) == ""
    assert container.dirtier("a").verified_on("a")["wrong"] == 0
    assert container.exec("a", "cat", "/proc/1/comm") == "piggie-dirty\n"
    hosts.lab.exec("a", ["runc", "pause", container.name])
    hosts.lab.exec("a", ["runc", "resume", container.name])
    moved = container.migrate("a", "b")
    assert moved.code == 0, moved.stderr
    assert container.dirtier("b").verified_on("b")["wrong"] == 0
    clean(hosts)


# A restore at whose moment the program is missing in the root file system.
CRIU_WITHOUT_PROGRAM = """#!/bin/sh
root=/var/lib/bundles/pig-fails/rootfs/bin
[ ! -e $root/piggie-dirty ] || [ -z "$CRIU_CONFIG_FILE" ] || mv $root/piggie-dirty $root/away
exec /usr/sbin/criu.real "$@"
"""


def at_once(moves: list[tuple[Container, str, str]]) -> list[Moved]:
    with ThreadPoolExecutor(len(moves)) as pool:
        return list(pool.map(lambda move: move[0].migrate(move[1], move[2]), moves))


@pytest.mark.thorough
def test_two_at_once_and_one_each_way(hosts: Hosts, containers: Containers) -> None:
    flags = ("--mib", "8", "--writes", "100")
    one, two, three = (containers.dirtier("a", f"pig-{n}", *flags) for n in (1, 2, 3))
    for moves in ([(one, "a", "b"), (two, "a", "b")], [(one, "b", "a"), (three, "a", "b")]):
        results = at_once(moves)
        assert [moved.code for moved in results] == [0, 0], [moved.stderr for moved in results]
        for container, source, destination in moves:
            assert container.state(source) == ""
            assert container.dirtier(destination).verified_on(destination)["wrong"] == 0
    clean(hosts)


def test_what_cannot_move_is_refused_before_anything_is_frozen(
    hosts: Hosts, containers: Containers
) -> None:
    for host in ("a", "b"):
        hosts.sh(host, "rm -rf /srv/volume; mkdir -p /srv")
    hosts.sh("a", "mkdir /srv/volume; echo carried > /srv/volume/file")
    container = containers.dirtier("a", "pig-odd", "--mib", "4", binds={"/srv/volume": "/data/v"})
    started = "runc exec -d --pid-file /tmp/exec.pid pig-odd sleep 1000 </dev/null >/dev/null 2>&1"
    hosts.sh("a", started)
    hosts.sh("b", f"mkdir -p {container.bundle}; touch {container.bundle}/precious")
    refused = container.migrate("a", "b")
    assert refused.code == 3
    assert not refused.named("frozen")
    for said in (
        "/srv/volume of this host is mounted at /data/v (check mounts)",
        "was started in the container by exec",
        f"{container.bundle} is there already, and no move left it",
    ):
        assert said in refused.stderr, refused.stderr
    hosts.sh("a", "kill -9 $(cat /tmp/exec.pid)")
    hosts.sh("b", f"rm -r {container.bundle}")
    settings = "engines: {runc: {mounts: {/srv/volume: rsync}}}\nhooks: {pre_freeze: [[%s]]}\n"
    hosts.sh(
        "a",
        'printf "$1" /bin/false > /tmp/no.yaml; printf "$1" /bin/true > /tmp/yes.yaml',
        settings,
    )
    vetoed = container.migrate("a", "b", "--config", "/tmp/no.yaml")
    assert vetoed.code == 4, vetoed.stderr
    assert "hook pre_freeze: /bin/false ended with 1" in vetoed.stderr
    assert container.dirtier("a").verified_on("a")["wrong"] == 0
    assert hosts.sh("b", f"ls -d {container.bundle} /srv/volume", check=False) == ""
    moved = container.migrate("a", "b", "--config", "/tmp/yes.yaml")
    assert moved.code == 0, moved.stderr
    assert container.exec("b", "cat", "/data/v/file") == "carried\n"
    assert container.dirtier("b").verified_on("b")["wrong"] == 0
    clean(hosts)


TALKS = "n=0; while :; do n=$((n+1)); echo $n; echo $n > /data/n; sleep 0.1; done"


def counts_on(hosts: Hosts, host: str, container: Container) -> None:
    count = f"cat {container.rootfs}/data/n"
    before = int(hosts.sh(host, count))
    wait_until("it counts on", lambda: int(hosts.sh(host, count) or 0) > before + 3)


def listens(hosts: Hosts, host: str) -> bool:
    return hosts.sh(host, "ls /run/tty.sock", check=False) != ""


def test_pipes_and_terminals_move_by_option(hosts: Hosts, containers: Containers) -> None:
    container = containers.make("a", "pig-stdio", "sh", "-c", TALKS)
    start = 'cd "$1" && runc run -d --bundle . pig-stdio </dev/null 2>/dev/null | cat >/dev/null &'
    hosts.sh("a", f"({start}) >/dev/null 2>&1", container.bundle)
    wait_until(
        "it runs", lambda: hosts.sh("a", f"cat {container.rootfs}/data/n", check=False) != ""
    )
    refused = container.migrate("a", "b")
    assert refused.code == 3
    assert "a pipe leads out of the container" in refused.stderr
    hosts.sh("a", "echo 'engines: {runc: {stdio: devnull}}' > /tmp/stdio.yaml")
    moved = container.migrate("a", "b", "--config", "/tmp/stdio.yaml")
    assert moved.code == 0, moved.stderr
    assert hosts.sh("b", "readlink /proc/$1/fd/1", str(container.pid("b"))) == "/dev/null"
    counts_on(hosts, "b", container)

    talker = containers.make("a", "pig-tty", "sh", "-c", TALKS, terminal=True)
    for host in ("a", "b"):
        hosts.lab.push(host, RECVTTY, "/var/tmp/recvtty.py")
        hosts.sh(
            host,
            "rm -f /run/tty.sock; setsid python3 /var/tmp/recvtty.py /run/tty.sock /tmp/tty.out"
            " </dev/null >/dev/null 2>&1 &",
        )
        wait_until("it listens", partial(listens, hosts, host))
    run = "runc run -d --console-socket /run/tty.sock --bundle . pig-tty </dev/null >/dev/null 2>&1"
    hosts.sh("a", f'cd "$1" && {run}', talker.bundle)
    wait_until("it talks", lambda: "5" in hosts.sh("a", "cat /tmp/tty.out"))
    refused = talker.migrate("a", "b")
    assert refused.code == 3
    assert "the container has a terminal" in refused.stderr
    hosts.sh("a", "echo 'engines: {runc: {console_socket: /run/tty.sock}}' > /tmp/tty.yaml")
    moved = talker.migrate("a", "b", "--config", "/tmp/tty.yaml")
    assert moved.code == 0, moved.stderr
    counts_on(hosts, "b", talker)
    count = talker.rootfs + "/data/n"
    at = int(hosts.sh("b", f"cat {count}"))
    wait_until(
        "it talks to its new terminal", lambda: str(at + 3) in hosts.sh("b", "cat /tmp/tty.out")
    )
    clean(hosts)


def test_names_that_are_none(hosts: Hosts) -> None:
    for name, code, says in (
        ("none-such", 3, "runc knows no container 'none-such'"),
        ("../x", 2, "'../x' is no container's name"),
    ):
        done = hosts.migrate("a", name, "ssh://root@b", "--engine", "runc")
        assert done.code == code
        assert says in done.stderr
        assert "Traceback" not in done.stderr
