"""The stage, the choice of cells, and the table at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Hosts
from tests.e2e.docker_hosts import docker_lab
from tests.e2e.faults.stage import Stage, Stagehand

__all__ = ["docker_lab", "pytest_terminal_summary", "stage"]

_ROWS: list[tuple[str, str, str, str]] = []


@pytest.fixture(scope="module")
def stage(lab: object) -> Iterator[Stage]:
    hosts = Hosts(lab)  # type: ignore[arg-type]
    # A working directory that can be filled without filling the host's memory.
    hosts.sh("b", "mkdir -p /run/phaul; mount -t tmpfs -o size=400m,mode=700 faults /run/phaul")
    found = Stage(hosts, Stagehand(hosts, "a"), Stagehand(hosts, "b"), _ROWS)
    yield found
    found.a.close()
    found.b.close()
    hosts.sh("b", "umount /run/phaul")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _ROWS:
        return
    widths = [max(len(row[i]) for row in _ROWS) for i in range(4)]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in _ROWS
    ]
    terminalreporter.section("fault @ moment > outcome")
    for line in lines:
        terminalreporter.write_line(line)
    path = os.environ.get("FAULTS_TABLE")
    if path:
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
