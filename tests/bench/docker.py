"""The freeze of a moving container, seen from outside: several ways side by side.

    PYTHONPATH=tests/lab python -m tests.bench.docker [--runs 3] [--only KEY,KEY] [--out PATH]

Prints a table, and writes it to OUT.txt, and all that was measured to OUT.json. The laboratory is
up (make lab). README.md, beside this file, says what the columns are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
from phaul_lab import Lab

from tests.bench.routes import ROUTES, Route
from tests.e2e.conftest import Hosts, wait_until
from tests.e2e.observer import Observer

VERSIONS = {
    "kernel": "uname -r",
    "criu": "criu --version | sed -n 's/Version: //p'",
    "docker": "docker version --format '{{.Server.Version}}'",
    "containerd": "containerd --version | cut -d ' ' -f 3",
    "runc": "runc --version | sed -n 's/runc version //p'",
    "podman": "podman --version | cut -d ' ' -f 3",
    "podman's runtime": "podman info --format '{{.Host.OCIRuntime.Package}}'",
    "phaul-runtime": "phaul-runtime --version | cut -d ' ' -f 3",
}
COLUMNS = (
    f"{'':<52}{'freeze':>9}{'ratio':>7}{'pause':>8}{'total':>8}{'MB':>6}{'final':>13}{'wrong':>7}"
)


@dataclass
class Run:
    """One move, measured.

    Attributes:
        freeze_ms: from the last tick of a that was heard to the first of b.
        pause_ms: the longest silence besides, from the command's start to its end.
        total_s: of the command.
        pages: of the container.
        final_pages: those of them that were dumped in the freeze.
        bytes: that were carried.
        steps: of the freeze, as the command timed them.
        wrong: pages that were not what they should be, after all were verified on b.
    """

    freeze_ms: float
    pause_ms: float
    total_s: float
    pages: int
    final_pages: int
    bytes: int
    steps: dict[str, float]
    wrong: int


@dataclass
class Row:
    """All runs of one way."""

    route: type[Route]
    runs: list[Run] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def median(self, name: str) -> float:
        """Of an attribute of `Run`."""
        return float(statistics.median(getattr(run, name) for run in self.runs))

    @property
    def wrong(self) -> int:
        """Of all runs."""
        return sum(run.wrong for run in self.runs)

    def to_json(self, first: Row) -> dict[str, Any]:
        """Its runs, their medians, and the ratio of its freeze to that of the first row."""
        names = ("freeze_ms", "pause_ms", "total_s", "pages", "final_pages", "bytes")
        medians = {name: self.median(name) for name in names} if self.runs else {}
        return {
            "key": self.route.key,
            "title": self.route.title,
            "median": medians,
            "freeze_ratio": self.ratio(first),
            "wrong": self.wrong,
            "runs": [asdict(run) for run in self.runs],
            "failures": self.failures,
        }

    def ratio(self, first: Row) -> float | None:
        """Of its freeze to that of the first row."""
        if not self.runs or not first.runs:
            return None
        return self.median("freeze_ms") / first.median("freeze_ms")

    def line(self, first: Row) -> str:
        """It in the table."""
        if not self.runs:
            return f"{self.route.title:<52}failed"
        ratio, share = self.ratio(first), self.median("final_pages") / self.median("pages")
        return (
            f"{self.route.title:<52}"
            f"{self.median('freeze_ms'):>9.0f}"
            f"{'' if ratio is None else format(ratio, '.2f'):>7}"
            f"{self.median('pause_ms'):>8.0f}"
            f"{self.median('total_s'):>8.1f}"
            f"{self.median('bytes') / 1e6:>6.0f}"
            f"{self.median('final_pages'):>7.0f}{share:>6.0%}"
            f"{self.wrong:>7}"
        )


def measure(route: Route) -> Run:
    """Start a container, move it, verify every page of it, remove it."""
    observer = Observer()
    try:
        route.start(observer.address)
        wait_until("the observer hears it", lambda: len(observer.heard) > 50)
        begun = time.monotonic()
        carried = route.move()
        ended = time.monotonic()
        wait_until("the observer hears it from b", lambda: observer.heard[-1][2] == "b")
        status = route.dirtier("b").verified_on("b")
        if complaints := observer.complaints():
            raise RuntimeError(f"two copies: {'; '.join(complaints)}")
        return Run(
            freeze_ms=round(observer.freeze_ms("a", "b"), 1),
            pause_ms=round(observer.pause_ms(begun, ended), 1),
            total_s=round(ended - begun, 2),
            wrong=int(status["wrong"]),
            **asdict(carried),
        )
    finally:
        route.clear()
        observer.close()


def run_all(hosts: Hosts, routes: Sequence[type[Route]], runs: int) -> list[Row]:
    """In turns, so that a busy quarter of an hour is every row's."""
    rows = [Row(route) for route in routes]
    try:
        for route in routes:
            route.prepare(hosts)
        for number in range(1, runs + 1):
            for row in rows:
                try:
                    row.runs.append(measure(row.route(hosts)))
                    said = f"{row.runs[-1].freeze_ms:.0f} ms"
                except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 - others go on
                    row.failures.append(f"{type(error).__name__}: {error}")
                    said = row.failures[-1]
                print(f"{number}/{runs} {row.route.key}: {said}", file=sys.stderr, flush=True)
    finally:
        for route in routes:
            route.tidy(hosts)
    return rows


def versions(hosts: Hosts) -> dict[str, str]:
    """Of what takes part, on host a."""
    return {name: hosts.sh("a", script, check=False) for name, script in VERSIONS.items()}


def table(rows: Sequence[Row], runs: int, found: dict[str, str]) -> str:
    """For people; the columns are explained below it."""
    return "\n".join(
        [
            COLUMNS,
            *(row.line(rows[0]) for row in rows),
            "",
            f"Medians of {runs}. freeze, pause: ms, heard from outside; total: s; final: pages",
            "dumped in the freeze, and their share; wrong: pages, of all runs.",
            textwrap.fill(", ".join(f"{name} {text}" for name, text in found.items()), 100),
            *(f"{row.route.key} failed: {why}" for row in rows for why in row.failures),
            "",
        ]
    )


def main() -> int:
    """Measure, print, write; 1 if anything failed or any page was wrong."""
    parser = argparse.ArgumentParser(prog="tests.bench.docker")
    keys = [route.key for route in ROUTES]
    parser.add_argument("--runs", type=int, default=3, help="of each row (3)")
    parser.add_argument("--only", default=",".join(keys), help="rows: " + ", ".join(keys))
    parser.add_argument("--out", type=Path, default=Path("build/bench-docker"))
    given = parser.parse_args()
    only = given.only.split(",")
    if given.runs < 1 or not set(only) <= set(keys):
        parser.error(f"there are the rows {', '.join(keys)}, and at least one run")
    hosts = Hosts(Lab())
    rows = run_all(hosts, [route for route in ROUTES if route.key in only], given.runs)
    found = versions(hosts)
    text = table(rows, given.runs, found)
    document = {
        "schema": "phaul-runtime/bench-docker/1",
        "versions": found,
        "rows": [row.to_json(rows[0]) for row in rows],
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.with_suffix(".txt").write_text(text)
    given.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    print(text, end="")
    return int(any(row.failures or row.wrong for row in rows))


if __name__ == "__main__":
    sys.exit(main())
