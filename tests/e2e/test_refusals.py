"""What refuses, fails or is cancelled: the right exit code, one clear line, nothing left."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import Hosts, wait_until

COPY = ("--files", "copy")


def clean(hosts: Hosts) -> None:
    for host in ("a", "b"):
        assert hosts.leftovers(host) == ""


def one_clear_line(stderr: str) -> str:
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if line.startswith("phaul-runtime: ")]
    assert len(lines) == 1, stderr
    return lines[0]


def test_pid_taken_at_the_destination(hosts: Hosts) -> None:
    hosts.sh("b", "rm -f /var/tmp/taken.status")  # of an earlier run
    victim = hosts.dirtier("a", "taken", "--mib", "16", "--writes", "100")
    # Somebody at b gets that very pid: the next one after ns_last_pid.
    last = hosts.sh("b", "cat /proc/sys/kernel/ns_last_pid")
    squat = "echo $(($1 - 1)) > /proc/sys/kernel/ns_last_pid; sleep 1000 >/dev/null 2>&1 & echo $!"
    while (squatter := int(hosts.sh("b", squat, str(victim.pid)))) != victim.pid:
        hosts.sh("b", "kill $1", str(squatter))
    hosts.sh("b", "echo $1 > /proc/sys/kernel/ns_last_pid", last)
    # The check sees it before anything is frozen.
    refused = hosts.migrate("a", victim.pid, "ssh://root@b", *COPY)
    assert refused.code == 3
    assert f"pid taken: {victim.pid} (sleep)" in one_clear_line(refused.stderr)
    assert not refused.named("frozen")
    # Overridden (or taken a moment later), it is CRIU that refuses, and everything is undone.
    failed = hosts.migrate("a", victim.pid, "ssh://root@b", *COPY, "--ignore", "pids")
    assert failed.code == 4
    assert "File exists" in failed.stderr, failed.stderr
    one_clear_line(failed.stderr)
    assert failed.report["result"] == "failed"
    assert failed.named("rolled_back")[0]["destination_clean"]
    assert hosts.sh("a", "ls $1", failed.report["logs"]) != ""
    assert victim.verified_on("a")["wrong"] == 0
    clean(hosts)
    assert hosts.sh("b", "ls /var/tmp/taken.status", check=False) == ""
    assert hosts.sh("b", "cat /proc/$1/comm", str(victim.pid)) == "sleep"
    # Once it is free, the next attempt works.
    hosts.sh("b", "kill $1", str(victim.pid))
    moved = hosts.migrate("a", victim.pid, "ssh://root@b", *COPY)
    assert moved.code == 0, moved.stderr
    assert victim.verified_on("b")["wrong"] == 0


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["migrate", "1", "--engine", "jail", "--to", "ssh://root@b"], 2, "unknown engine 'jail'"),
        (["migrate", "web", "--to", "ssh://root@b"], 2, "'web' is not a pid"),
        (["migrate", "999999", "--to", "ssh://root@b"], 3, "no process has pid 999999"),
        pytest.param(["migrate", "2", "--to", "ssh://root@b"], 3, "kernel thread",
                     marks=pytest.mark.needs("own-kernel")),
        (["migrate", "2", "--to", "ssh://root@10.77.0.99"], 3, "10.77.0.99"),
        (["migrate", "2", "--to", "ssh://root@nowhere.invalid"], 3, "nowhere.invalid"),
        (["migrate", "2", "--to", "warp://b"], 2, "unknown transport 'warp'"),
        (["migrate", "2", "--to", "ssh://root@b", "--config", "/tmp/bad.yaml"], 2,
         "/tmp/bad.yaml:2: policy.max_downtime: unknown key; did you mean max_downtime_ms?"),
        (["migrate", "2", "--to", "ssh://root@b", "--config", "/tmp/noagent.yaml"], 3,
         "phaul-runtime is not installed there"),
    ],
)  # fmt: skip
def test_bad_input(hosts: Hosts, argv: list[str], code: int, says: str) -> None:
    hosts.sh("a", "printf 'policy:\\n  max_downtime: 5\\n' > /tmp/bad.yaml")
    hosts.sh(
        "a",
        "printf 'transport:\\n  agent_command: [no-such-agent]\\n  connect_timeout_s: 20\\n'"
        " > /tmp/noagent.yaml; printf 'transport:\\n  connect_timeout_s: 5\\n' > /tmp/short.yaml",
    )
    if "10.77.0.99" in argv[-1]:
        argv = [*argv, "--config", "/tmp/short.yaml"]
    done = hosts.lab.exec("a", ["phaul-runtime", *argv], check=False)
    assert done.returncode == code, done.stderr
    assert says in one_clear_line(done.stderr)
    clean(hosts)


def test_no_criu_on_the_other_side(hosts: Hosts) -> None:
    victim = hosts.dirtier("a", "nocriu", "--mib", "4")
    hosts.sh("b", "mv /usr/sbin/criu /usr/sbin/criu.away")
    try:
        refused = hosts.migrate("a", victim.pid, "ssh://root@b", *COPY)
    finally:
        hosts.sh("b", "mv /usr/sbin/criu.away /usr/sbin/criu")
    assert refused.code == 3
    assert "b: cannot start criu" in one_clear_line(refused.stderr)
    clean(hosts)


def test_no_pycriu_is_told_by_check(hosts: Hosts) -> None:
    away = "d=/usr/lib/python3/dist-packages; mv $d/$1 $d/$2"
    hosts.sh("b", away, "pycriu", "pycriu.away")
    try:
        done = hosts.lab.exec("a", ["phaul-runtime", "check", "--to", "ssh://root@b"], check=False)
    finally:
        hosts.sh("b", away, "pycriu.away", "pycriu")
    assert done.returncode == 3
    assert "python3-pycriu" in done.stdout
    assert "pycriu cannot be imported" in done.stdout


def test_rootless_is_refused_with_the_reason(hosts: Hosts) -> None:
    hosts.sh("a", "printf 'workdir: /tmp/rootless\\n' > /tmp/rootless.yaml")
    argv = ["setpriv", "--reuid=65534", "--clear-groups", "--regid=65534", "phaul-runtime",
            "migrate", "1", "--to", "local:", "--config", "/tmp/rootless.yaml"]  # fmt: skip
    done = hosts.lab.exec("a", argv, check=False)
    hosts.sh("a", "rm -rf /tmp/rootless /tmp/rootless.yaml")
    assert done.returncode == 3, done.stderr
    assert "root" in one_clear_line(done.stderr)


def test_another_build_of_a_program_is_never_replaced(hosts: Hosts) -> None:
    build = "printf '#include <unistd.h>\\nint main(void){for(;;)pause();}' |"
    build += " gcc -Wl,--build-id=$1 -o $2 -xc -"
    for host, number in (("a", "0xaa"), ("b", "0xbb")):
        hosts.sh(host, build, number, "/var/tmp/sleeper")
    pid = int(hosts.sh("a", "setsid /var/tmp/sleeper </dev/null >/dev/null 2>&1 & echo $!"))
    try:
        refused = hosts.migrate("a", pid, "ssh://root@b", *COPY)
        assert refused.code == 3
        line = one_clear_line(refused.stderr)
        assert "/var/tmp/sleeper is another build there (build-id bb, here aa)" in line
        # Missing there, it is carried, and runs.
        hosts.sh("b", "rm /var/tmp/sleeper")
        moved = hosts.migrate("a", pid, "ssh://root@b", *COPY)
        assert moved.code == 0, moved.stderr
        assert hosts.sh("b", "readlink /proc/$1/exe", str(pid)) == "/var/tmp/sleeper"
    finally:
        for host in ("a", "b"):
            hosts.sh(host, "kill -9 $1; rm -f /var/tmp/sleeper", str(pid), check=False)


def test_a_terminal_and_a_connection_are_refused(hosts: Hosts) -> None:
    start = (
        "setsid nc -l -p 9999 </dev/null >/dev/null 2>&1 & server=$!; sleep 1;"
        "setsid sh -c 'sleep 600 | nc 127.0.0.1 9999' </dev/null >/dev/null 2>&1 & sleep 1;"
        "setsid script -qc 'sleep 600' /dev/null </dev/null >/dev/null 2>&1 & sleep 1;"
        "echo $server $(pgrep -n -x sleep)"
    )
    server, sleeper = hosts.sh("a", start).split()
    try:
        refused = hosts.migrate("a", server, "ssh://root@b")
        assert refused.code == 3
        assert "TCP connections are established" in refused.stderr
        assert "--tcp-established" in refused.stderr
        refused = hosts.migrate("a", sleeper, "ssh://root@b")
        assert refused.code == 3
        assert "terminal stays on this host" in one_clear_line(refused.stderr)
    finally:
        hosts.sh("a", "kill $1 $2; pkill -x nc; pkill -x sleep; true", server, sleeper)


def test_a_pipe_that_leads_out_of_the_tree_is_refused(hosts: Hosts) -> None:
    start = "setsid sh -c 'sleep 600 | cat' </dev/null >/dev/null 2>&1 & sleep 1; pgrep -n -x cat"
    pid = hosts.sh("a", start)
    try:
        refused = hosts.migrate("a", pid, "ssh://root@b")
        assert refused.code == 3
        assert "a pipe leads out of the tree" in one_clear_line(refused.stderr)
    finally:
        hosts.sh("a", "kill $1; pkill -x sleep; true", pid)


def stream(hosts: Hosts, *argv: str) -> subprocess.Popen[str]:
    words = ["phaul-runtime", "migrate", "--output", "json", *argv, *hosts.patient("a")]
    command = hosts.lab.exec_argv("a", words)
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def until_event(process: subprocess.Popen[str], name: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line).get("event") == name:
            return
    pytest.fail(f"no event {name}")


@pytest.mark.needs("dirty-tracking")
def test_a_process_that_exits_in_mid_move(hosts: Hosts) -> None:
    victim = hosts.dirtier("a", "exits", "--mib", "48")
    process = stream(hosts, str(victim.pid), "--to", "ssh://root@b", *COPY)
    until_event(process, "iteration_started")
    hosts.sh("a", "kill -9 $1", str(victim.pid))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 3, err
    assert "ended by itself" in one_clear_line(err)
    assert json.loads(out.splitlines()[-1])["result"] == "refused"
    wait_until("all is clean", lambda: hosts.leftovers("b") == "")
    clean(hosts)


@pytest.mark.needs("dirty-tracking")
@pytest.mark.parametrize(
    "signal", ["INT", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("TERM", "HUP"))]
)
def test_cancelled_before_the_freeze(hosts: Hosts, signal: str) -> None:
    victim = hosts.dirtier("a", "cancel", "--mib", "64", "--writes", "100")
    process = stream(hosts, str(victim.pid), "--to", "ssh://root@b", *COPY)
    until_event(process, "iteration_started")
    hosts.sh("a", f"pkill -{signal} -f '[p]haul-runtime migrate'")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 6, err
    assert "Traceback" not in err
    assert json.loads(out.splitlines()[-1])["result"] == "cancelled"
    assert victim.verified_on("a")["wrong"] == 0
    assert not hosts.alive("b", victim.pid)
    clean(hosts)


def test_check_prints_the_two_hosts(hosts: Hosts) -> None:
    victim = hosts.dirtier("a", "checked", "--mib", "4")
    argv = ["phaul-runtime", "check", str(victim.pid), "--to", "ssh://root@b", *COPY]
    done = hosts.lab.exec("a", argv)
    for name in ("criu", "arch", "kernel", "cpu", "space", "pids", "files", "dirty-tracking"):
        assert f" {name}: " in done.stdout
    argv = ["phaul-runtime", "migrate", str(victim.pid), "--to", "ssh://root@b", *COPY,
            "--dry-run", "--output", "json"]  # fmt: skip
    done = hosts.lab.exec("a", argv)
    assert json.loads(done.stdout.splitlines()[-1])["result"] == "checked"
    assert hosts.alive("a", victim.pid)
    clean(hosts)


def test_config_example_is_accepted_there(hosts: Hosts) -> None:
    example = Path(__file__).resolve().parents[2] / "config.example.yaml"
    hosts.lab.push("a", example, "/tmp/example.yaml")
    done = hosts.lab.exec("a", ["phaul-runtime", "config", "check", "/tmp/example.yaml"])
    assert done.stdout == "/tmp/example.yaml: ok\n"
