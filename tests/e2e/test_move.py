"""Real moves between real hosts."""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
import threading
import time

import pytest
from phaul_lab.machine import soft_dirty

from tests.e2e.conftest import WAYS, Dirtier, Hosts, wait_until

COPY = ("--files", "copy")
REPORT_FIELDS = {
    "schema", "id", "engine", "result", "downtime_ms", "total_ms", "bytes_transferred",
    "restored_pid", "iterations",
}  # fmt: skip
ITERATION_FIELDS = {"pages_written", "pages_skipped", "duration_ms", "bytes"}


@pytest.mark.needs("dirty-tracking")
@pytest.mark.also_on("emulated-forky")
@pytest.mark.usefixtures("random_addresses")
@pytest.mark.parametrize("ways", WAYS)
def test_dirtier_moves(hosts: Hosts, ways: list[tuple[str, str]]) -> None:
    victim = hosts.dirtier("a", "rounds", "--mib", "64", "--hot-mib", "4", "--writes", "300")
    for source, destination in ways:
        moved = hosts.migrate(source, victim.pid, f"ssh://root@{destination}", *COPY)
        assert moved.code == 0, moved.stderr
        assert not hosts.alive(source, victim.pid)
        status = victim.verified_on(destination)
        assert (status["wrong"], status["pid"], status["pages"]) == (0, victim.pid, 16384)
        report = moved.report
        assert report.keys() >= REPORT_FIELDS
        assert (report["result"], report["restored_pid"]) == ("moved", victim.pid)
        assert len(report["iterations"]) > 1
        assert all(iteration.keys() >= ITERATION_FIELDS for iteration in report["iterations"])
        assert report["iterations"][0]["pages_written"] >= 16384
        assert report["iterations"][1]["pages_skipped"] > 8192
        assert report["bytes_transferred"] > 64 << 20
        for host in ("a", "b"):
            assert hosts.leftovers(host) == ""


@pytest.mark.only_on("native")
def test_what_the_kernel_can_track_decides_about_rounds(hosts: Hosts) -> None:
    victim = hosts.dirtier("a", "rounds-or-one", "--mib", "8")
    moved = hosts.migrate("a", victim.pid, "ssh://root@b", *COPY)
    assert moved.code == 0, moved.stderr
    levels = {event["check"]: event["level"] for event in moved.named("checked")}
    if soft_dirty():
        assert levels["dirty-tracking"] == "ok"
        assert moved.report["iterations"]
        return
    # One stop-and-copy round, and the report says so.
    assert levels["dirty-tracking"] == "warning"
    assert moved.report["iterations"] == []
    assert "no dirty tracking" in moved.report["pre_copy"]
    assert len(moved.named("pre_copy_skipped")) == 1
    assert moved.report["final_pages_written"] > 0


def test_the_verifier_would_have_seen_a_wrong_page(hosts: Hosts) -> None:
    victim = hosts.dirtier("a", "spoiled", "--mib", "4")
    assert hosts.migrate("a", victim.pid, "ssh://root@b", *COPY).code == 0
    hosts.sh("b", "kill -USR1 $1", str(victim.pid))
    assert victim.verified_on("b")["wrong"] == 1


@pytest.mark.usefixtures("random_addresses")
def test_tree_with_pipes_and_session_moves(hosts: Hosts) -> None:
    victim = hosts.dirtier("a", "tree", "--mib", "8", "--children", "2", "--writes", "100")
    children = hosts.sh("a", "pgrep -P $1", str(victim.pid)).split()
    moved = hosts.migrate("a", victim.pid, "ssh://root@b", *COPY)
    assert moved.code == 0, moved.stderr
    before = victim.status("b")["tokens"]
    status = victim.verified_on("b")
    assert status["wrong"] == 0
    assert status["tokens"] > before
    assert hosts.sh("b", "pgrep -P $1", str(victim.pid)).split() == children
    sessions = hosts.sh("b", "ps -o sid= -p $1,$2,$3", str(victim.pid), *children).split()
    assert sessions == [str(victim.pid)] * 3
    assert not any(hosts.alive("a", pid) for pid in [victim.pid, *map(int, children)])


def test_a_job_of_a_shell_moves(hosts: Hosts) -> None:
    # Its session is led by a shell outside the tree, which has ended meanwhile.
    status = "/var/tmp/job.status"
    start = "piggie-dirty --status $1 --mib 4 --verifies 4000 </dev/null >/dev/null 2>&1 & echo $!"
    pid = int(hosts.sh("a", start, status))
    victim = Dirtier(hosts, pid, status)
    hosts.started += [("a", pid), ("b", pid)]
    assert hosts.sh("a", "ps -o sid= -p $1", str(pid)) != str(pid)
    wait_until("it runs", lambda: hosts.sh("a", f"cat {status}", check=False) != "")
    moved = hosts.migrate("a", pid, "ssh://root@b", *COPY)
    assert moved.code == 0, moved.stderr
    assert victim.verified_on("b")["wrong"] == 0


@pytest.mark.needs("dirty-tracking")
@pytest.mark.thorough
def test_a_killed_command_leaves_one_copy_and_nothing_else(hosts: Hosts) -> None:
    victim = hosts.dirtier("a", "killed", "--mib", "64", "--writes", "200")
    argv = ["phaul-runtime", "migrate", str(victim.pid), "--to", "ssh://root@b", "--output", "json"]
    for event in ("iteration_started", "frozen"):
        with subprocess.Popen(
            hosts.lab.exec_argv("a", [*argv, *COPY, *hosts.patient("a")]),
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if json.loads(line).get("event") == event:
                    hosts.sh("a", "pkill -KILL -f '[p]haul-runtime migrate'")
                    break
            process.stdout.read()
        wait_until("b is clean", lambda: hosts.leftovers("b") == "")
        copies = [host for host in ("a", "b") if hosts.alive(host, victim.pid)]
        assert copies == ["a"]
        assert victim.verified_on("a")["wrong"] == 0
        # What only the killed command could have removed: its own directories.
        hosts.sh("a", "rm -rf /run/phaul/*")


def test_what_was_restored_has_a_cgroup_of_its_own(hosts: Hosts) -> None:
    victim = hosts.dirtier("a", "cgroup", "--mib", "4")
    moved = hosts.migrate("a", victim.pid, "ssh://root@b", *COPY)
    assert moved.code == 0, moved.stderr
    group = hosts.sh("b", "grep ^0:: /proc/$1/cgroup", str(victim.pid))
    assert group == f"0::/phaul-runtime/{moved.report['id']}"
    # The ssh session and the agent in it are gone, and it runs on.
    assert hosts.leftovers("b") == ""
    assert victim.verified_on("b")["wrong"] == 0


def test_downtime_is_what_an_outside_observer_saw(hosts: Hosts) -> None:
    with hosts.lab.outside_socket(socket.SOCK_DGRAM) as listener:
        listener.settimeout(0.5)
        port = listener.getsockname()[1]
        victim = hosts.dirtier(
            "a",
            "observed",
            "--mib",
            "32",
            "--writes",
            "200",
            "--udp",
            f"{hosts.lab.outside}:{port}",
        )
        arrivals: list[float] = []
        done = threading.Event()

        def observe() -> None:
            while not done.is_set():
                try:
                    listener.recv(200)
                except TimeoutError:
                    continue
                arrivals.append(time.monotonic())

        observer = threading.Thread(target=observe)
        observer.start()
        wait_until("the observer hears the victim", lambda: len(arrivals) > 20)
        moved = hosts.migrate("a", victim.pid, "ssh://root@b", *COPY)
        heard = len(arrivals)
        wait_until("the observer hears it from b", lambda: len(arrivals) > heard + 20)
        done.set()
        observer.join()
    assert moved.code == 0, moved.stderr
    gaps = [(b - a) * 1000 for a, b in itertools.pairwise(arrivals)]
    seen, told = max(gaps), moved.report["downtime_ms"]
    print(f"downtime: reported {told:.0f} ms, seen from outside {seen:.0f} ms")
    assert abs(seen - told) <= max(0.2 * seen, 100)
    assert victim.verified_on("b")["wrong"] == 0


WRITER = """
import os, time
os.makedirs("/var/tmp/logdir", exist_ok=True)
os.chdir("/var/tmp/logdir")
gone = open("gone", "w+")
os.unlink("gone")
print("kept", file=gone, flush=True)
log = open("log", "w")
number = 0
while True:
    number += 1
    print(number, file=log, flush=True)
    time.sleep(0.05)
"""


def test_files_written_up_to_the_freeze_are_there(hosts: Hosts) -> None:
    # A log that grows all the time, a file that is deleted but held open, a working directory.
    hosts.sh("b", "rm -rf /var/tmp/logdir")
    start = 'setsid python3 -c "$1" </dev/null >/dev/null 2>&1 & echo $!'
    pid = int(hosts.sh("a", start, WRITER))
    log = "/var/tmp/logdir/log"
    try:
        wait_until("it writes", lambda: len(hosts.sh("a", f"cat {log}", check=False)) > 10)
        refused = hosts.migrate("a", pid, "ssh://root@b")
        assert refused.code == 3
        assert f"{log} file is missing there" in refused.stderr
        assert "--files copy" in refused.stderr
        moved = hosts.migrate("a", pid, "ssh://root@b", *COPY)
        assert moved.code == 0, moved.stderr
        at_move = hosts.sh("a", f"tail -1 {log}")
        wait_until("it goes on", lambda: int(hosts.sh("b", f"tail -1 {log}")) > int(at_move))
        lines = hosts.sh("b", f"cat {log}").split()
        assert lines == [str(number) for number in range(1, len(lines) + 1)]
        assert hosts.sh("b", "cat /proc/$1/fd/3", str(pid)) == "kept"
        assert hosts.sh("b", "readlink /proc/$1/cwd", str(pid)) == "/var/tmp/logdir"
    finally:
        for host in ("a", "b"):
            hosts.sh(host, "kill -9 $1; rm -rf /var/tmp/logdir", str(pid), check=False)


@pytest.mark.needs("sys-resource")
def test_nginx_moves_and_serves(hosts: Hosts) -> None:
    conf = (
        "worker_processes 2; pid /run/web.pid; error_log /var/tmp/web/error.log;"
        "events {} http { access_log off; server { listen 8080;"
        " location / { return 200 served-by-$hostname; } } }"
    )
    for host in ("a", "b"):
        hosts.sh(
            host,
            'mkdir -p /var/tmp/web /var/lib/nginx/body && echo "$1" > /var/tmp/web/nginx.conf',
            conf,
        )
    hosts.sh("a", "cd / && setsid nginx -c /var/tmp/web/nginx.conf </dev/null >/dev/null 2>&1")
    pid = int(hosts.sh("a", "cat /run/web.pid"))
    fetch = "exec 3<>/dev/tcp/127.0.0.1/8080; printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3"
    try:
        assert "served-by-a" in hosts.lab.exec("a", ["bash", "-c", fetch]).stdout
        moved = hosts.migrate("a", pid, "ssh://root@b", *COPY)
        assert moved.code == 0, moved.stderr
        # The host's name was read at the start: it is memory, and moved along.
        assert "served-by-a" in hosts.lab.exec("b", ["bash", "-c", fetch]).stdout
        assert len(hosts.sh("b", "pgrep -P $1", str(pid)).split()) == 2
        assert not hosts.alive("a", pid)
        # It is still master of its workers.
        hosts.sh("b", "kill -HUP $1", str(pid))
        wait_until(
            "it serves after a reload",
            lambda: (
                "served-by-a" in hosts.lab.exec("b", ["bash", "-c", fetch], check=False).stdout
                or "served-by-b" in hosts.lab.exec("b", ["bash", "-c", fetch], check=False).stdout
            ),
        )
    finally:
        for host in ("a", "b"):
            hosts.sh(host, "kill $1; rm -rf /var/tmp/web", str(pid), check=False)


SELF_TALKER = """
import socket, time
server = socket.create_server(("127.0.0.1", 7777))
client = socket.create_connection(("127.0.0.1", 7777))
peer, _ = server.accept()
log = open("/var/tmp/selftalk.log", "w")
number = 0
while True:
    number += 1
    try:
        client.sendall(b"%08d" % number)
        received = int(peer.recv(8, socket.MSG_WAITALL))
    except (OSError, ValueError):
        time.sleep(3600)  # its connection is broken: it says nothing more, and lives
    print(received, file=log, flush=True)
    time.sleep(0.05)
"""


def test_established_connections_move_by_option(hosts: Hosts) -> None:
    log = "/var/tmp/selftalk.log"
    start = 'setsid python3 -c "$1" </dev/null >/dev/null 2>&1 & echo $!'
    pid = int(hosts.sh("a", start, SELF_TALKER))
    try:
        wait_until("it talks", lambda: len(hosts.sh("a", f"cat {log}", check=False)) > 10)
        refused = hosts.migrate("a", pid, "ssh://root@b", *COPY)
        assert refused.code == 3
        assert "127.0.0.1:7777" in refused.stderr
        moved = hosts.migrate("a", pid, "ssh://root@b", *COPY, "--tcp-established")
        assert moved.code == 0, moved.stderr
        at_move = int(hosts.sh("a", f"tail -1 {log}"))
        wait_until("it goes on", lambda: int(hosts.sh("b", f"tail -1 {log}")) > at_move + 5)
        lines = hosts.sh("b", f"cat {log}").split()
        assert lines == [str(number) for number in range(1, len(lines) + 1)]
        for host in ("a", "b"):
            assert "0xc114" not in hosts.sh(host, "iptables-save")
    finally:
        for host in ("a", "b"):
            hosts.sh(host, "kill -9 $1; rm -f /var/tmp/selftalk.log", str(pid), check=False)
