"""Hot writers are slowed until they converge, and never for longer than that."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from functools import partial

import pytest

from tests.e2e.conftest import Dirtier, Hosts, Moved, wait_until
from tests.e2e.containers import Containers, containers

__all__ = ["containers"]

pytestmark = pytest.mark.needs("dirty-tracking", "controllers")

UNLIMITED = "max 100000"
GROUP = "/sys/fs/cgroup/hot"
CONFIG = "/tmp/throttle.yaml"
# More to verify than there is time for: how fast it writes depends on the CPU that it gets.
HOT = ("--mib", "16", "--hot-mib", "14", "--writes", "3000", "--verifies", "400000")
BUDGET_MS = 2500


def configured(hosts: Hosts) -> tuple[str, ...]:
    settings = (
        "policy: {if_not_converging: throttle, max_iterations: 14, "
        f"max_downtime_ms: {BUDGET_MS}}}\n"
        "transport: {connect_timeout_s: 120}\n"
    )
    hosts.sh("a", f"printf '%s' \"$1\" > {CONFIG}", settings)
    return ("--config", CONFIG)


def cpu_max(hosts: Hosts, host: str, group: str) -> str:
    return hosts.sh(host, f"cat {group}/cpu.max")


def group_of(hosts: Hosts, host: str, pid: int) -> str:
    return "/sys/fs/cgroup" + hosts.sh(host, "cat /proc/$1/cgroup", str(pid)).removeprefix("0::")


def converged(moved: Moved) -> None:
    """It was slowed, and met the budget for what the source can know."""
    assert moved.code == 0, moved.stderr
    report = moved.report
    rounds = moved.named("iteration_done")
    assert any("slowed to" in done["reason"] for done in rounds), rounds
    assert 0.05 <= report["throttled_to"] < 1
    assert report["converged"], rounds
    assert report["expected_freeze_ms"] <= BUDGET_MS
    assert not any("throttle" in text or "cpu.max" in text for text in report["warnings"])
    print(
        [(done["pages_written"], round(done["expected_freeze_ms"] or 0)) for done in rounds],
        report["throttled_to"],
        report["expected_freeze_ms"],
        report["freeze"],
    )


def ended(hosts: Hosts, host: str, pid: int) -> bool:
    return not hosts.alive(host, pid)


@pytest.fixture
def hot(hosts: Hosts) -> Iterator[Dirtier]:
    """In a cgroup of its own."""
    hosts.sh("a", f"mkdir -p {GROUP}")
    victim = hosts.dirtier("a", "hot", *HOT)
    hosts.sh("a", f"echo {victim.pid} > {GROUP}/cgroup.procs")
    yield victim
    for host in ("a", "b"):
        script = "case $(cat /proc/$1/comm) in piggie*) kill -9 $1;; esac"
        hosts.sh(host, script, str(victim.pid), check=False)
        wait_until("it has ended", partial(ended, hosts, host, victim.pid))
    hosts.sh("a", f"sleep 0.5; rmdir {GROUP}", check=False)


@pytest.mark.thorough
def test_a_hot_process_converges_and_is_slow_nowhere_afterwards(hosts: Hosts, hot: Dirtier) -> None:
    hosts.sh("a", f"echo '150000 50000' > {GROUP}/cpu.max")
    moved = hosts.migrate("a", hot.pid, "ssh://root@b", "--files", "copy", *configured(hosts))
    converged(moved)
    assert cpu_max(hosts, "a", GROUP) == "150000 50000"
    assert cpu_max(hosts, "b", group_of(hosts, "b", hot.pid)) == UNLIMITED
    assert hot.verified_on("b")["wrong"] == 0


@pytest.mark.thorough
def test_a_killed_command_leaves_it_slow_until_recover(hosts: Hosts, hot: Dirtier) -> None:
    argv = ["phaul-runtime", "migrate", str(hot.pid), "--to", "ssh://root@b", "--output", "json"]
    argv += ["--files", "copy", *configured(hosts)]
    with subprocess.Popen(
        hosts.lab.exec_argv("a", argv), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        migration = ""
        for line in process.stdout:
            event = json.loads(line)
            migration = event.get("id", migration)
            if "slowed to" in event.get("reason", ""):
                hosts.sh("a", "pkill -KILL -f '[p]haul-runtime migrate'")
                break
        process.stdout.read()
    assert cpu_max(hosts, "a", GROUP) != UNLIMITED
    done = hosts.lab.exec("a", ["phaul-runtime", "recover", migration], timeout=120)
    assert done.returncode == 0, done.stderr
    assert cpu_max(hosts, "a", GROUP) == UNLIMITED
    assert hosts.alive("a", hot.pid)
    assert not hosts.alive("b", hot.pid)
    assert hot.verified_on("a")["wrong"] == 0
    wait_until("b is clean", lambda: hosts.leftovers("b") == "")


@pytest.mark.thorough
def test_a_cancelled_move_leaves_it_as_fast_as_it_was(hosts: Hosts, hot: Dirtier) -> None:
    argv = ["phaul-runtime", "migrate", str(hot.pid), "--to", "ssh://root@b", "--output", "json"]
    argv += ["--files", "copy", *configured(hosts)]
    with subprocess.Popen(
        hosts.lab.exec_argv("a", argv), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "slowed to" in json.loads(line).get("reason", ""):
                hosts.sh("a", "pkill -INT -f '[p]haul-runtime migrate'")
                break
        process.stdout.read()
    assert cpu_max(hosts, "a", GROUP) == UNLIMITED
    assert hot.verified_on("a")["wrong"] == 0
    assert hosts.leftovers("a") == ""


@pytest.mark.thorough
def test_a_process_among_others_is_moved_without(hosts: Hosts) -> None:
    victim = hosts.dirtier("a", "among", "--mib", "4")
    moved = hosts.migrate("a", victim.pid, "ssh://root@b", "--files", "copy", *configured(hosts))
    assert moved.code == 0, moved.stderr
    finding = next(e for e in moved.named("checked") if e["check"] == "throttle")
    assert finding["level"] == "warning"
    assert "it cannot be slowed: the target shares its cgroup" in finding["text"]
    # Once moved it has one of its own.
    back = hosts.migrate("b", victim.pid, "ssh://root@a", "--files", "copy", "--dry-run")
    assert back.code == 0, back.stderr
    assert cpu_max(hosts, "b", group_of(hosts, "b", victim.pid)) == UNLIMITED


@pytest.mark.thorough
def test_a_hot_container_converges_and_keeps_its_own_limit(
    hosts: Hosts, containers: Containers
) -> None:
    limits = {"cpu": {"quota": 90000, "period": 100000}}
    container = containers.dirtier("a", "pig-hot", *HOT, resources=limits)
    wait_until("it runs", lambda: container.dirtier("a").status("a")["passes"] > 0)
    group = f"/sys/fs/cgroup/{container.name}"
    assert cpu_max(hosts, "a", group) == "90000 100000"
    moved = container.migrate("a", "b", *configured(hosts))
    converged(moved)
    assert cpu_max(hosts, "b", group) == "90000 100000"
    assert container.dirtier("b").verified_on("b")["wrong"] == 0
