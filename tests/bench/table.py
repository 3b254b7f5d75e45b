"""The results for people: tables, and what can be read off them, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from tests.bench.methods import METHODS
from tests.bench.result import Results, Run, Spread
from tests.bench.workloads import Workload, parse

PAGE = 4096
HOT = "256-10"
ALL_HOT = "512-100"
SMALL, LARGE = "idle-64", "idle-1024"
OURS_LAZY = ("phaul-lazy", "phaul-runc-lazy", "phaul-docker-lazy")
Pick = Callable[[Run], float | None]


def freeze_ms(run: Run) -> float | None:
    """The downtime."""
    return run.freeze_ms


def total_s(run: Run) -> float | None:
    """Of the command."""
    return run.total_s


def spread(results: Results, workload: str, method: str, pick: Pick) -> Spread | None:
    """Of one figure."""
    return Spread.of(pick(run) for run in results.of(workload, method))


def workloads(results: Results) -> list[Workload]:
    """Those that were tried, in their order."""
    return [parse(key) for key in dict.fromkeys(cell.workload for cell in results.cells)]


def methods(results: Results, workload: str) -> list[str]:
    """Those that were tried with it, in the order of METHODS."""
    tried = {cell.method for cell in results.cells if cell.workload == workload}
    return [key for key in METHODS if key in tried]


def grid(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table; the first column is text, the others are figures."""
    line = "| " + " | ".join(heads) + " |"
    rule = "|---|" + "---:|" * (len(heads) - 1)
    return [line, rule, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _figure(found: Spread | None, form: str = ".0f") -> str:
    return "" if found is None else format(found.median, form)


def _range(found: Spread | None, form: str = ".0f") -> str:
    return "" if found is None else f"{found.low:{form}} to {found.high:{form}}"


def ratio(one: Spread | None, other: Spread | None) -> float | None:
    """Of the medians."""
    if one is None or other is None or not other.median:
        return None
    return one.median / other.median


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def workload_table(results: Results, workload: Workload) -> list[str]:
    """All methods with one workload; ratios are to the first that succeeded."""
    keys = methods(results, workload.key)
    first = next((key for key in keys if results.of(workload.key, key)), None)
    rows = []
    for key in keys:
        runs = results.of(workload.key, key)
        failed = sum(
            bool(cell.failure)
            for cell in results.cells
            if (cell.workload, cell.method) == (workload.key, key)
        )
        if not runs:
            rows.append([METHODS[key].title, *["failed", *[""] * 9]])
            continue

        def of(pick: Pick, key: str = key) -> Spread | None:
            return spread(results, workload.key, key, pick)

        freeze = of(freeze_ms)
        base = first and spread(results, workload.key, first, freeze_ms)
        rows.append(
            [
                METHODS[key].title + (f" ({failed} failed)" if failed else ""),
                str(len(runs)),
                _figure(freeze),
                _range(freeze),
                _times(ratio(freeze, base or None)),
                _figure(of(lambda run: run.pause_ms)),
                _figure(of(total_s), ".1f"),
                _figure(of(lambda run: run.wire_bytes / 1e6)),
                _figure(of(lambda run: run.carried.final_pages)),
                _figure(of(lambda run: run.carried.lazy_complete_ms)),
                str(sum(run.wrong for run in runs)),
            ]
        )
    heads = [
        "", "runs", "downtime", "spread", "ratio", "pause", "total s", "wire MB", "final pages",
        "lazy ms", "wrong",
    ]  # fmt: skip
    return [f"### {workload.title}", "", *grid(heads, rows)]


def readings(results: Results) -> list[tuple[str, float | None]]:
    """What the tables are read for, by name; None: not measured."""

    def freeze(workload: str, method: str) -> Spread | None:
        return spread(results, workload, method, freeze_ms)

    found: list[tuple[str, float | None]] = []
    for key in ("phaul-lazy", "phaul-tcp", "phaul-full", "criu", "runc"):
        name = f"downtime at 1024 MiB idle / at 64 MiB idle, {key}"
        found.append((name, ratio(freeze(LARGE, key), freeze(SMALL, key))))
    for one, others in (
        ("phaul-lazy", ("phaul-full", "phaul-policy", "criu", "runc", "podman-pre", "podman")),
        ("phaul-runc-lazy", ("phaul-runc", "runc", "podman-pre", "podman")),
        ("phaul-docker-lazy", ("phaul-docker", "docker", "podman-pre", "podman")),
        ("phaul-runc", ("runc", "podman-pre")),
        ("phaul-docker", ("docker", "podman-pre")),
        ("phaul-local", ("phaul-go",)),
    ):
        for other in others:
            name = f"downtime at 256 MiB, 10 % hot: {one} / {other}"
            found.append((name, ratio(freeze(HOT, one), freeze(HOT, other))))
    for key in ("phaul-hybrid", "phaul-post"):
        name = f"downtime at 512 MiB, all hot: {key} / phaul-lazy"
        found.append((name, ratio(freeze(ALL_HOT, key), freeze(ALL_HOT, "phaul-lazy"))))
    for key in ("phaul-lazy", "phaul-tcp", "phaul-full", "phaul-runc-lazy", "phaul-runc"):
        own = spread(results, SMALL, key, lambda run: run.carried.own_ms)
        reported = spread(results, SMALL, key, lambda run: run.carried.downtime_ms)
        found.append((f"own share of the freeze at 64 MiB idle, {key}", ratio(own, reported)))
        found.append(
            (f"own part of the freeze at 64 MiB idle, ms, {key}", own.median if own else None)
        )
    raw, beside = Spread.of(results.raw_mib_s), Spread.of(results.beside_mib_s)
    for workload in workloads(results):
        for key in ("phaul-tcp", "phaul-full"):
            pages = spread(results, workload.key, key, lambda run: run.carried.first_round_mib_s)
            name = f"page throughput / plain socket, {workload.key}, {key}"
            found.append((name, ratio(pages, raw)))
            found.append((f"{name}, beside a victim", ratio(pages, beside)))
    return [(name, value) for name, value in found if value is not None]


def _wire_rows(results: Results) -> Iterable[list[str]]:
    for workload in workloads(results):
        for key in methods(results, workload.key):
            if METHODS[key].local or not results.of(workload.key, key):
                continue

            def of(pick: Pick, workload: str = workload.key, key: str = key) -> Spread | None:
                return spread(results, workload, key, pick)

            wire = of(lambda run: run.wire_bytes)
            memory = of(lambda run: run.carried.pages * PAGE)
            dumped = of(dumped_bytes)
            yield [
                f"{workload.key} {key}",
                _figure(of(lambda run: run.wire_bytes / 1e6)),
                _figure(of(lambda run: run.carried.pages * PAGE / 1e6)),
                _figure(of(lambda run: run.rewritten_pages * PAGE / 1e6)),
                _figure(of(lambda run: dumped_bytes(run) / 1e6)),
                _figure(of(lambda run: run.carried.rounds)),
                _times(ratio(wire, dumped)),
                _times(ratio(wire, memory)),
            ]


def dumped_bytes(run: Run) -> float:
    """Of pages, in all rounds."""
    carried = run.carried
    pages = carried.final_pages if carried.dumped_pages is None else carried.dumped_pages
    return pages * PAGE


def _step_rows(results: Results) -> Iterable[list[str]]:
    for workload in workloads(results):
        for key in methods(results, workload.key):
            runs = results.of(workload.key, key)
            names = dict.fromkeys(name for run in runs for name in run.carried.steps)
            steps = {name: Spread.of(run.carried.steps.get(name) for run in runs) for name in names}
            if steps:
                text = ", ".join(f"{name} {_figure(found)}" for name, found in steps.items())
                yield [f"{workload.key} {key}", text]


def _growth_rows(results: Results) -> Iterable[list[str]]:
    idle = [w for w in workloads(results) if not w.hot_percent and not w.redis]
    for key in METHODS:
        figures = [spread(results, workload.key, key, total_s) for workload in idle]
        freezes = [spread(results, workload.key, key, freeze_ms) for workload in idle]
        if sum(figure is not None for figure in figures) > 1:
            yield [
                METHODS[key].title,
                *(_figure(figure, ".1f") for figure in figures),
                *(_figure(freeze) for freeze in freezes),
            ]


def markdown(results: Results, plot: str | None) -> str:
    """Everything; `plot` is the picture's name beside it."""
    idle = [w for w in workloads(results) if not w.hot_percent and not w.redis]
    raw, beside = Spread.of(results.raw_mib_s), Spread.of(results.beside_mib_s)
    lines = [
        "# Benchmarks",
        "",
        "Made by `make bench` (tests/bench), in two emulated hosts: read ratios within a table,",
        "never milliseconds. Downtime is what an observer outside both hosts sees on its own",
        "clock: from the last sign of life at the source to the first at the destination.",
        "",
        f"    {results.command}",
        "",
        f"Medians of {results.runs} interleaved runs. downtime, pause (the longest other silence)",
        "and lazy (until the last page is in, as reported) are ms; wire: both ways; final: pages",
        "dumped in the freeze; wrong: pages in all runs, verified at the destination.",
        "",
        *([f"![downtime, total time, wire]({plot})", ""] if plot else []),
        "## Read off",
        "",
        *grid(["", "value"], [[name, f"{value:.2f}"] for name, value in readings(results)]),
        "## By workload",
        "",
    ]
    for workload in workloads(results):
        lines += workload_table(results, workload)
    sizes = [f"total s, {w.mib} MiB" for w in idle] + [f"downtime, {w.mib} MiB" for w in idle]
    lines += ["## Growth with memory, idle", "", *grid(["", *sizes], _growth_rows(results))]
    heads = ["", "wire MB", "memory MB", "rewritten MB", "dumped MB", "rounds", "wire / dumped",
             "wire / memory"]  # fmt: skip
    lines += [
        "## Wire and dirtied bytes",
        "",
        "rewritten: by the program while the command ran, a page each time; dumped: pages in all",
        "rounds.",
        "",
        *grid(heads, _wire_rows(results)),
        f"A plain socket carries {_figure(raw, '.1f')} MiB/s ({_range(raw, '.1f')}) from a to b, "
        f"{_figure(beside, '.1f')} ({_range(beside, '.1f')}) while a victim runs at a.",
        "",
        "## Steps of the freeze",
        "",
        "As each command timed them, ms, medians. In ours images and restore are parts of prepare,",
        "the others follow each other.",
        "",
        *grid(["", "steps"], _step_rows(results)),
        "## Versions and remarks",
        "",
        *(f"- {name} {version}" for name, version in results.versions.items()),
        *(f"- left out: {key}: {why}" for key, why in results.remarks.items()),
        *(f"- failed: {fault}" for fault in results.faults),
        "",
    ]
    return "\n".join(lines)
