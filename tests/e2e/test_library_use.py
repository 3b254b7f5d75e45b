"""A program written against the Go library ports line by line; and a move within one host."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import Dirtier, Hosts, wait_until

PROGRAM = Path(__file__).parent / "programs" / "library_use.py"
PYTHON = "/opt/phaul-runtime/bin/python3"


def counted(hosts: Hosts, file: str) -> list[int]:
    return [int(line.split()[0]) for line in hosts.sh("a", 'cat "$1"', file).splitlines()]


def start_piggie(hosts: Hosts, file: str) -> int:
    pid = int(hosts.lab.exec("a", ["piggie", file, "50"]).stdout)
    hosts.started.append(("a", pid))
    wait_until("piggie counts", lambda: len(counted(hosts, file)) > 5)
    return pid


def goes_on(hosts: Hosts, file: str, old: int, new: int) -> None:
    hosts.started.append(("a", new))
    assert new != old
    assert not hosts.alive("a", old)
    assert hosts.sh("a", "cat /proc/$1/comm", str(new)) == "piggie"
    # Inside, it is what it was: the first process of its namespace.
    assert hosts.sh("a", "sed -n 's/^NSpid:.*\\t//p' /proc/$1/status", str(new)) == "1"
    before = len(counted(hosts, file))
    wait_until("it counts on", lambda: len(counted(hosts, file)) > before + 10)
    numbers = counted(hosts, file)
    assert numbers == list(range(len(numbers)))


@pytest.mark.needs("dirty-tracking")
def test_the_ancestors_demonstration(hosts: Hosts) -> None:
    file, directory = "/var/tmp/piggie.count", "/run/library-use"
    hosts.sh("a", "rm -rf $1 $2", file, directory)
    old = start_piggie(hosts, file)
    hosts.lab.push("a", PROGRAM, "/tmp/library_use.py")
    hosts.sh("a", "mkdir -m 700 $1", directory)
    done = hosts.lab.exec("a", [PYTHON, "/tmp/library_use.py", str(old), directory], check=False)
    assert done.returncode == 0, done.stderr
    goes_on(hosts, file, old, int(done.stdout))
    hosts.sh("a", "rm -rf $1 $2", file, directory)


@pytest.mark.needs("dirty-tracking")
@pytest.mark.thorough
@pytest.mark.parametrize(
    "parent", ["none", pytest.param("same-parent", marks=pytest.mark.thorough)]
)
def test_a_retry_after_a_failed_final_dump_loses_nothing(hosts: Hosts, parent: str) -> None:
    directory = "/run/retry"
    hosts.sh("a", "rm -rf $1; mkdir -m 700 $1", directory)
    for program in (PROGRAM, PROGRAM.with_name("retry.py")):
        hosts.lab.push("a", program, f"/tmp/{program.name}")
    status = f"/var/tmp/retry-{parent}.status"
    start = (
        "unshare --pid --fork setsid piggie-dirty --status $1 --mib 64 --hot-mib 64 --writes 500"
        " --verifies 4000 </dev/null >/dev/null 2>&1 & sleep 3; pgrep -P $!"
    )
    old = int(hosts.sh("a", start, status))
    hosts.started.append(("a", old))
    victim = Dirtier(hosts, old, status)
    argv = [PYTHON, "/tmp/retry.py", str(old), directory, parent]
    done = hosts.lab.exec("a", argv, check=False)
    assert done.returncode == 0, done.stderr
    assert "first: " in done.stderr
    assert "was vetoed" in done.stderr
    new = int(done.stdout)
    hosts.started.append(("a", new))
    wrong = victim.verified_on("a")["wrong"]
    # The same parent is the ancestors' way: if nothing were lost by it, this test could not fail.
    assert (wrong == 0) == (parent == "none"), f"{wrong} wrong pages"
    hosts.sh("a", "rm -rf $1", directory)


def test_the_same_by_the_command_line(hosts: Hosts) -> None:
    file = "/var/tmp/piggie2.count"
    hosts.sh("a", "rm -f $1", file)
    old = start_piggie(hosts, file)
    moved = hosts.migrate("a", old, "local:")
    assert moved.code == 0, moved.stderr
    goes_on(hosts, file, old, moved.report["restored_pid"])
    assert hosts.leftovers("a") == ""
    hosts.sh("a", "rm -f $1", file)


def test_within_one_host_a_plain_process_is_refused(hosts: Hosts) -> None:
    victim = hosts.dirtier("a", "onehost", "--mib", "4")
    refused = hosts.migrate("a", victim.pid, "local:")
    assert refused.code == 3
    assert "source and destination are one host" in refused.stderr
    assert victim.verified_on("a")["wrong"] == 0
