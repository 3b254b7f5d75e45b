"""The results as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.bench.methods import METHODS
from tests.bench.result import Results
from tests.bench.table import (
    HOT,
    Pick,
    dumped_bytes,
    freeze_ms,
    methods,
    spread,
    total_s,
    workloads,
)


def draw(results: Results, path: Path) -> bool:
    """Write it; False if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    # The same figures give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "bench"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(13, 10), layout="constrained")
    _bars(axes[0][0], results)
    _growth(axes[0][1], results, freeze_ms, "downtime, ms")
    _growth(axes[1][0], results, total_s, "total, s")
    _wire(axes[1][1], results)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return True


def _bars(axis: Any, results: Results) -> None:
    """Downtime side by side, at the workload that has most methods."""
    tried = [workload.key for workload in workloads(results) if not workload.redis]
    if not tried:
        return
    key = HOT if HOT in tried else max(tried, key=lambda one: len(methods(results, one)))
    found = [(name, spread(results, key, name, freeze_ms)) for name in methods(results, key)]
    shown = [(name, one) for name, one in found if one is not None][::-1]
    medians = [one.median for _, one in shown]
    errors = [
        [one.median - one.low for _, one in shown],
        [one.high - one.median for _, one in shown],
    ]
    axis.barh([name for name, _ in shown], medians, xerr=errors, capsize=3)
    axis.set_title(f"downtime, ms: {key} (median, lowest, highest)")


def _growth(axis: Any, results: Results, pick: Pick, title: str) -> None:
    """With memory that is idle."""
    idle = [w for w in workloads(results) if not w.hot_percent and not w.redis]
    for key in METHODS:
        found = [(w.mib, spread(results, w.key, key, pick)) for w in idle]
        points = sorted((mib, one.median) for mib, one in found if one is not None)
        if len(points) > 1:
            axis.plot([mib for mib, _ in points], [value for _, value in points], "o-", label=key)
    axis.set(title=f"{title}: idle memory", xlabel="MiB", ylim=(0, None))
    if axis.lines:
        axis.legend()


def _wire(axis: Any, results: Results) -> None:
    """Bytes on the wire against bytes of pages that were dumped."""
    for key, method in METHODS.items():
        runs = (
            [] if method.local else [r for w in workloads(results) for r in results.of(w.key, key)]
        )
        if runs:
            dumped = [dumped_bytes(run) / 1e6 for run in runs]
            axis.scatter(dumped, [run.wire_bytes / 1e6 for run in runs], label=key, s=18)
    low, high = 0, max([*axis.get_xlim(), *axis.get_ylim()])
    axis.plot([low, high], [low, high], ":", color="grey")
    axis.set(title="wire against dumped pages", xlabel="dumped, MB", ylabel="on the wire, MB")
    if axis.collections:
        axis.legend(fontsize="small")
