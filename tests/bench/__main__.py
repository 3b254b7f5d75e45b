"""Moves side by side: `python -m tests.bench --help`; README.md says what the columns are."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from phaul_lab import Lab

from tests.bench.measure import beside_mib_s, clean, measure, raw_mib_s
from tests.bench.methods import METHODS, Method, Unavailable
from tests.bench.plot import draw
from tests.bench.result import Cell, Results
from tests.bench.table import markdown
from tests.bench.workloads import ONCE, PLAN, Workload, parse
from tests.e2e.conftest import Hosts

VERSIONS = {
    "kernel": "uname -r",
    "criu": "criu --version | sed -n 's/Version: //p'",
    "docker": "dockerd --version | sed 's/Docker version //'",
    "containerd": "containerd --version | cut -d ' ' -f 3",
    "runc": "runc --version | sed -n 's/runc version //p'",
    "podman": "podman --version | cut -d ' ' -f 3",
    "podman's runtime": "podman info --format '{{.Host.OCIRuntime.Package}}'",
    "phaul-runtime": "phaul-runtime --version | cut -d ' ' -f 3",
}
Turn = tuple[Workload, tuple[str, ...]]


def say(text: str) -> None:
    """Progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def plan(chosen: Sequence[str], only: Sequence[str]) -> list[Turn]:
    """Which methods move which workload.

    Raises:
        ValueError: a name is not known.
    """
    if unknown := set(only) - METHODS.keys():
        raise ValueError(f"no method {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    turns = []
    for key in chosen or PLAN:
        workload = parse(key)
        # Whoever names methods gets them with each workload.
        usual = PLAN.get(key) if not only else None
        keys = [one for one in METHODS if one in (only or usual or METHODS)]
        turns.append((workload, tuple(one for one in keys if METHODS[one].takes(workload))))
    return turns


def prepare(hosts: Hosts, turns: Sequence[Turn], results: Results) -> list[type[Method]]:
    """Every method that takes part; those that cannot are remarks."""
    ready = []
    results.remarks.clear()
    for key in METHODS:
        if any(key in keys for _, keys in turns):
            try:
                METHODS[key].prepare(hosts)
                ready.append(METHODS[key])
            except Unavailable as error:
                results.remarks[key] = str(error)
                say(f"left out: {key}: {error}")
    return ready


def cell(hosts: Hosts, method: type[Method], workload: Workload, number: int) -> Cell:
    """One measurement; a failure is its result, and the hosts are cleaned after it."""
    found = Cell(workload.key, method.key, number)
    begun = time.monotonic()
    try:
        found.run = measure(method(hosts, workload))
        said = f"{found.run.freeze_ms:.0f} ms, {found.run.wrong} wrong"
    except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 - the others go on
        found.failure = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        said = found.failure
        clean(hosts, say)
    say(f"{number} {workload.key} {method.key}: {said} ({time.monotonic() - begun:.0f} s in all)")
    return found


def run_all(hosts: Hosts, turns: Sequence[Turn], results: Results, out: Path) -> None:
    """In turns, so that a busy quarter of an hour is every method's; saved after each."""
    ready = prepare(hosts, turns, results)
    left = [
        (number, workload, method)
        for number in range(1, results.runs + 1)
        for workload, keys in turns
        for method in ready
        if method.key in keys and not results.done(workload.key, method.key, number)
        if number == 1 or method.key not in ONCE.get(workload.key, ())
    ]
    begun, turn = time.monotonic(), len(results.raw_mib_s)
    try:
        for index, (number, workload, method) in enumerate(left):
            if number > turn:
                results.raw_mib_s.append(raw_mib_s(hosts))
                results.beside_mib_s.append(beside_mib_s(hosts))
                both = (
                    f"{results.raw_mib_s[-1]:.1f}, {results.beside_mib_s[-1]:.1f} beside a victim"
                )
                say(f"{number} a plain socket, MiB/s: {both}")
                turn = number
            results.add(cell(hosts, method, workload, number))
            results.save(out)
            spent = time.monotonic() - begun
            rest = spent / (index + 1) * (len(left) - index - 1)
            say(f"{index + 1} of {len(left)}; about {rest / 60:.0f} min more")
    finally:
        for method in ready:
            method.tidy(hosts)


def write(results: Results, out: Path) -> str:
    """The table and the plot beside the JSON."""
    picture = out.with_suffix(".svg")
    text = markdown(results, picture.name if draw(results, picture) else None)
    out.with_suffix(".md").write_text(text)
    return text


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def main() -> int:
    """Measure, write, print; 1 if anything failed or was wrong."""
    parser = argparse.ArgumentParser(prog="tests.bench")
    parser.add_argument("--runs", type=int, default=3, help="of each cell (3)")
    parser.add_argument("--methods", default="", help="of " + ",".join(METHODS))
    parser.add_argument("--workloads", default="", help="as " + ",".join(PLAN))
    parser.add_argument("--out", type=Path, default=Path("build/bench/benchmarks.json"))
    parser.add_argument("--resume", action="store_true", help="keep what --out has, do the rest")
    parser.add_argument("--render", action="store_true", help="only tables and plot of --out")
    parser.add_argument("--list", action="store_true", help="print the plan and do nothing")
    given = parser.parse_args()
    if given.runs < 1:
        parser.error("at least one run")
    if given.render:
        print(write(Results.load(given.out), given.out))
        return 0
    try:
        turns = plan(
            *([w for w in text.split(",") if w] for text in (given.workloads, given.methods))
        )
    except ValueError as error:
        parser.error(str(error))
    if given.list:
        for workload, keys in turns:
            print(f"{workload.key}: {', '.join(keys)}")
        return 0
    resumed = given.resume and given.out.exists()
    results = Results.load(given.out) if resumed else Results(given.runs)
    results.runs = given.runs
    words = [f"{name.upper()}={getattr(given, name)}" for name in ("runs", "methods", "workloads")]
    words = ["make", "bench", *(word for word in words if not word.endswith("="))]
    command = shlex.join([*words, *(["RESUME=1"] if resumed else [])])
    if command != results.command:
        results.command = " && ".join(filter(None, (results.command, command)))
    hosts = Hosts(Lab())
    results.versions = {n: hosts.sh("a", script, check=False) for n, script in VERSIONS.items()}
    run_all(hosts, turns, results, given.out)
    print(write(results, given.out))
    return int(bool(results.faults))


if __name__ == "__main__":
    sys.exit(main())
