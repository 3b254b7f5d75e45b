"""A lazily restored copy has every page, whatever becomes of the pager that fills it."""

from __future__ import annotations

import os
import random
import subprocess

import pytest

from tests.e2e.conftest import Dirtier, Hosts, wait_until

MIB = 96
# Filled for about as long as an emulated host takes for those.
NATIVE_MIB = 1024
KILLS = int(os.environ.get("KILLS", "3"))
# Ends a pager's worker or keeper every time that two are there, at random moments, until its stdin
# ends; says how often.
KILLER = """
import glob, os, random, select, signal, sys, time

# Not in one piece: this program's own command line must not look like a pager's.
PAGER = b"-m\\0phaul_runtime" + b".pager"

def pagers():
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            if PAGER in open(path, "rb").read():
                yield int(path.split("/")[2])
        except OSError:
            pass

def filling():
    return glob.glob("/run/phaul/*/*/stats-restore")

def told_to_end(seconds):
    return bool(select.select([0], [], [], seconds)[0])

random.seed(int(sys.argv[1]))
while not filling() and not told_to_end(0.01):
    pass
killed = 0
while filling() and killed < int(sys.argv[2]):
    time.sleep(random.uniform(0, 0.4))
    found = list(pagers())
    if len(found) == 2:
        os.kill(random.choice(found), signal.SIGKILL)
        killed += 1
print(killed)
"""


def moved(
    hosts: Hosts, name: str, *flags: str, mib: int = MIB
) -> tuple[Dirtier, dict[str, object]]:
    memory = ("--mib", str(mib), "--hot-mib", "4", "--writes", "300", "--verifies", str(mib << 6))
    victim = hosts.dirtier("a", name, *memory)
    done = hosts.migrate("a", victim.pid, "ssh://root@b", "--files", "copy", *flags)
    assert done.code == 0, done.stderr
    assert not done.report["warnings"], done.report["warnings"]
    assert not hosts.alive("a", victim.pid)
    return victim, done.report


def test_the_copy_runs_before_its_memory_is_there(hosts: Hosts) -> None:
    victim, report = moved(hosts, "lazy", "--restore", "lazy")
    assert report["restore"] == "lazy"
    assert report["lazy_complete_ms"] > 0  # type: ignore[operator]
    assert report["lazy"]["pages"] > (MIB - 8) * 256  # type: ignore[index]
    assert victim.verified_on("b")["wrong"] == 0


def test_a_full_restore_by_option_and_for_little_memory(hosts: Hosts) -> None:
    victim, report = moved(hosts, "full", "--restore", "full")
    assert report["restore"] == "full: restore: full"
    assert report["lazy_complete_ms"] is None
    assert victim.verified_on("b")["wrong"] == 0


@pytest.mark.timeout(3000)
def test_pagers_that_are_killed_lose_no_page(hosts: Hosts) -> None:
    """`KILLS=30` for the whole of it: one of the two, whichever, at random moments of the copy."""
    kills = moves = 0
    while kills < KILLS:
        moves += 1
        argv = ["python3", "-c", KILLER, str(random.randrange(1 << 30)), str(KILLS - kills)]
        killer = subprocess.Popen(
            hosts.lab.exec_argv("b", argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            mib = NATIVE_MIB if hosts.lab.native else MIB
            victim, report = moved(hosts, f"killed{moves}", "--restore", "lazy", mib=mib)
            out, _ = killer.communicate(timeout=300)
        finally:
            killer.kill()
        kills += int(out)
        assert report["lazy_complete_ms"] is not None
        status = victim.verified_on("b")
        assert status["wrong"] == 0, status
        hosts.sh("b", "kill -9 $1", str(victim.pid))
        wait_until("it is gone", lambda pid=victim.pid: not hosts.alive("b", pid))  # type: ignore[misc]
    print(f"{kills} kills in {moves} moves, every page right")
