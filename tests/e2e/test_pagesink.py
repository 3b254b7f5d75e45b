"""What the agent writes of the pages that it receives is what CRIU's own page server writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import Hosts
from tests.e2e.test_library_use import PYTHON

pytestmark = pytest.mark.needs("dirty-tracking")

PROGRAM = Path(__file__).parent / "programs" / "two_receivers.py"


def test_both_receivers_write_the_same_and_ours_is_restored(hosts: Hosts) -> None:
    directory = "/run/two-receivers"
    hosts.sh("a", "rm -rf $1; mkdir -m 700 $1", directory)
    hosts.lab.push("a", PROGRAM, "/tmp/two_receivers.py")
    argv = [PYTHON, "/tmp/two_receivers.py", directory]
    done = hosts.lab.exec("a", argv, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    first, last = json.loads(done.stdout)
    # Of three processes, and in the last round of what they share. That one has all again: tracking
    # changes would have the first of the two dumps take them from the second.
    assert (first["maps"], first["shared"], first["in_parent"]) == (3, 0, 0)
    assert first["present"] > 3 * 1500
    assert (last["maps"], last["shared"], last["in_parent"]) == (4, 1, 0)
    assert last["present"] > 3 * 1500 + 600
    hosts.sh("a", "rm -rf $1", directory)


@pytest.mark.thorough
def test_pages_may_be_left_to_criu(hosts: Hosts, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("criu: {page_server: criu}\n")
    hosts.lab.push("a", config, "/tmp/by-criu.yaml")
    victim = hosts.dirtier("a", "by-criu", "--mib", "24", "--hot-mib", "4", "--writes", "300")
    moved = hosts.migrate(
        "a", victim.pid, "ssh://root@b", "--files", "copy", "--config", "/tmp/by-criu.yaml"
    )
    assert moved.code == 0, moved.stderr
    assert victim.verified_on("b")["wrong"] == 0
    hosts.sh("a", "rm /tmp/by-criu.yaml")
