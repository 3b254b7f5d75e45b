"""The pure parts of the benchmark: selection, results, tables."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests/lab"))

from tests.bench.__main__ import plan
from tests.bench.methods import METHODS
from tests.bench.methods.base import failure, parse_carried, with_rounds
from tests.bench.methods.phaul import parse_report
from tests.bench.plot import draw
from tests.bench.result import Carried, Cell, Results, Run, Spread
from tests.bench.table import markdown, readings
from tests.bench.workloads import PLAN, parse


def run(freeze_ms: float, wrong: int = 0, **carried: float) -> Run:
    steps = {"dump": 100.0, "restore": 200.0}
    numbers = {"pages": 1000, "final_pages": 10, "bytes": 5_000_000, **carried}
    return Run(
        freeze_ms=freeze_ms,
        pause_ms=50,
        total_s=2.5,
        wire_bytes=6_000_000,
        rewritten_pages=20,
        wrong=wrong,
        carried=Carried(**numbers, steps=steps),  # type: ignore[arg-type]
    )


def results() -> Results:
    found = Results(runs=3, raw_mib_s=[10.0, 20.0, 30.0], versions={"criu": "4.1.1"})
    for number, freeze in enumerate((100.0, 300.0, 200.0), 1):
        lazy = run(freeze, downtime_ms=400.0, first_round_mib_s=15.0)
        found.add(Cell("idle-64", "phaul-full", number, lazy))
        found.add(Cell("idle-1024", "phaul-full", number, run(freeze * 2)))
        found.add(Cell("256-10", "phaul-runc", number, run(freeze)))
    found.add(Cell("256-10", "runc", 1, run(800.0)))
    found.add(Cell("256-10", "podman", 1, failure="RuntimeError: no"))
    return found


@pytest.mark.parametrize(
    ("key", "flags"),
    [
        ("idle-64", "--mib 64 --hot-mib 0 --writes 0"),
        ("256-10", "--mib 256 --hot-mib 25.6 --writes 819"),
        ("64-6.25", "--mib 64 --hot-mib 4 --writes 128"),
    ],
)
def test_a_workload_is_flags_of_the_dirtier(key: str, flags: str) -> None:
    assert " ".join(parse(key).flags).startswith(flags)


def test_redis_is_a_workload_of_those_that_move_connections() -> None:
    assert (parse("redis").redis, parse("redis-128").mib) == (True, 128)
    moving = [key for key, method in METHODS.items() if method.takes(parse("redis"))]
    assert moving == ["phaul-runc-lazy", "phaul-runc", "runc"]


@pytest.mark.parametrize("key", ["", "idle", "idle-x", "256", "256-0", "256-101", "big-1"])
def test_other_workloads_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match="no workload"):
        parse(key)


def test_the_plan_is_a_selection() -> None:
    usual = {workload.key: keys for workload, keys in plan([], [])}
    assert usual.keys() == PLAN.keys()
    assert usual["256-10"] == tuple(METHODS)
    assert usual["idle-1024"] == ("phaul-lazy", "phaul-tcp", "phaul-full", "criu", "runc")
    named = plan(["idle-1024", "redis"], ["phaul-go", "runc"])
    assert [keys for _, keys in named] == [("runc", "phaul-go"), ("runc",)]
    with pytest.raises(ValueError, match="no method nothing"):
        plan([], ["nothing"])


def test_a_spread_is_of_what_there_is() -> None:
    assert Spread.of([3.0, None, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert Spread.of([None]) is None


def test_results_survive_the_file(tmp_path: Path) -> None:
    found, path = results(), tmp_path / "out" / "x.json"
    found.save(path)
    assert Results.load(path) == found
    path.write_text('{"schema": "other"}')
    with pytest.raises(ValueError, match="is not phaul-runtime/bench/1"):
        Results.load(path)


def test_a_resumed_run_repeats_only_what_failed() -> None:
    found = results()
    assert found.done("256-10", "runc", 1)
    assert not found.done("256-10", "runc", 2)
    assert not found.done("256-10", "podman", 1)
    found.add(Cell("256-10", "podman", 1, run(900.0)))
    assert found.done("256-10", "podman", 1)
    assert found.faults == []


def test_failures_and_wrong_pages_are_faults() -> None:
    found = results()
    found.add(Cell("idle-64", "criu", 2, run(1.0, wrong=7)))
    assert found.faults == [
        "256-10, podman, run 1: RuntimeError: no",
        "idle-64, criu, run 2: 7 wrong",
    ]


def test_what_is_read_off() -> None:
    found = dict(readings(results()))
    assert found["downtime at 1024 MiB idle / at 64 MiB idle, phaul-full"] == 2
    assert found["downtime at 256 MiB, 10 % hot: phaul-runc / runc"] == 0.25
    assert found["own share of the freeze at 64 MiB idle, phaul-full"] == 0.25
    assert found["own part of the freeze at 64 MiB idle, ms, phaul-full"] == 100
    assert found["page throughput / plain socket, idle-64, phaul-full"] == 0.75
    assert not any("phaul-lazy" in name for name in found)


def test_the_tables_have_medians_spread_and_failures() -> None:
    text = markdown(results(), "x.svg")
    assert "| phaul-runtime, process, full | 3 | 200 | 100 to 300 | 1.00 | 50 | 2.5 | 6 |" in text
    assert "| runc checkpoint, rsync, runc restore | 1 | 800 | 800 to 800 | 4.00 |" in text
    assert "| podman checkpoint -e, ssh, restore -i | failed |" in text
    assert "failed: 256-10, podman, run 1: RuntimeError: no" in text
    assert "![downtime, total time, wire](x.svg)" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)
    assert "| 256-10 runc | dump 100, restore 200 |" in text


def test_a_title_is_one_column() -> None:
    assert not any("|" in method.title for method in METHODS.values())


def test_tables_of_nothing() -> None:
    assert "## Read off" in markdown(Results(runs=1), None)


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert draw(results(), tmp_path / "x.svg")
    assert "<svg" in (tmp_path / "x.svg").read_text()
    assert draw(Results(runs=1), tmp_path / "empty.svg")


def test_what_a_script_says() -> None:
    line = '{"pages": 5, "final_pages": 2, "bytes": 9, "steps": {"dump": 3}}'
    found = parse_carried(f"noise\n{line}\n")
    assert (found.final_pages, found.dumped_pages, found.own_ms) == (2, None, None)
    assert with_rounds(found).dumped_pages == 7
    with pytest.raises(ValueError, match="did not say"):
        parse_carried("")


def test_how_a_command_ended() -> None:
    said = failure("/var/tmp/x", 3, "one\ntwo\n  three\nfour\n")
    assert said == "x ended with 3: two | three | four"


def test_what_a_report_says() -> None:
    rounds = [
        {"pages_written": 100, "bytes": 2 << 20, "duration_ms": 500},
        {"pages_written": 7, "bytes": 1, "duration_ms": 1},
    ]
    report = {
        "final_pages_written": 3,
        "final_pages_skipped": 97,
        "bytes_transferred": 99,
        "freeze": {"dump_ms": 10.0, "prepare_ms": 30.0, "restore_ms": 20.0},
        "iterations": rounds,
        "downtime_ms": 50.0,
    }
    found = parse_report(report)
    assert (found.pages, found.dumped_pages, found.rounds) == (100, 110, 2)
    assert (found.first_round_mib_s, found.own_ms, found.lazy_complete_ms) == (4.0, 20.0, None)
    assert parse_report({**report, "iterations": []}).first_round_mib_s is None
