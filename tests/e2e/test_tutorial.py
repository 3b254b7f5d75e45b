"""docs/tutorial.md, from its first line to its last, on real hosts."""

from __future__ import annotations

import contextlib

import pytest

from tests.docblocks import ROOT, Block, blocks, said
from tests.e2e.conftest import Hosts

CONFIG = "/etc/phaul-runtime/config.yaml"
EVENT = "/etc/phaul-runtime/hooks/pre_freeze.d"
TIDY = f"""
pkill -KILL -xf 'python3 count.py'
rm -f /var/tmp/count.* /var/tmp/report.json {CONFIG} {EVENT}/10-not-today
sleep 0.2  # a tree that ended by itself leaves its group to the next migration's sweep
rmdir /sys/fs/cgroup/phaul-runtime/*/
"""


def run(hosts: Hosts, block: Block) -> str:
    """A block as a reader types it; returns what it printed."""
    done = hosts.lab.exec(block.host, ["sh", "-c", block.text], check=False, timeout=300)
    output = f"{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, f"{block} ended with {done.returncode}:\n{output}"
    return output


def numbers(hosts: Hosts, host: str) -> list[str]:
    return hosts.sh(host, "cat /var/tmp/count.log").split()


@pytest.mark.needs("dirty-tracking")
@pytest.mark.thorough
def test_the_tutorial(hosts: Hosts) -> None:
    for host in ("a", "b"):
        hosts.sh(host, f"test ! -e {CONFIG}")
    # The directories are docker's host hook's, if another test has installed that.
    theirs = hosts.sh("b", f"ls -d {EVENT} 2>/dev/null", check=False)
    output, counted = "", list[str]()
    try:
        for block in blocks(ROOT / "docs/tutorial.md"):
            if block.kind == "yaml":
                script = f"mkdir -p /etc/phaul-runtime && cat > {CONFIG}"
                hosts.lab.exec("b", ["sh", "-c", script], stdin=block.text)
            elif block.kind == "text":
                missing = said(block.text, output)
                assert missing == [], f"{block}: not printed: {missing}\n{output}"
            elif block.host:
                if "rm -f /var/tmp/count.py" in block.text:
                    counted = numbers(hosts, "a")
                output = run(hosts, block)
    finally:
        for host in ("a", "b"):
            with contextlib.suppress(Exception):
                hosts.sh(host, TIDY, check=False)
        if not theirs:
            hosts.sh("b", f"rmdir -p {EVENT} 2>/dev/null", check=False)
    # It has counted on through both moves and the one that was refused, and left nothing.
    assert counted == [str(number) for number in range(1, len(counted) + 1)]
    assert len(counted) > 10
    for host in ("a", "b"):
        assert hosts.leftovers(host) == ""


@pytest.mark.parametrize("kind", ["sh", "text", "yaml"])
def test_it_has_blocks_of_each_kind(kind: str) -> None:
    assert any(block.kind == kind for block in blocks(ROOT / "docs/tutorial.md"))
