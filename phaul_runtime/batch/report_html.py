"""A batch as one HTML file that needs nothing else: a timeline of every move, and a table."""

from __future__ import annotations

import html
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from phaul_runtime.batch.record import BatchRecord
from phaul_runtime.printable import one_line

_COLOURS = {
    "moved": "#2e7d32",
    "failed": "#c62828",
    "refused": "#ef6c00",
    "unknown": "#6a1b9a",
    "cancelled": "#757575",
    "error": "#c62828",
    "running": "#1565c0",
}
_STYLE = (
    "body{font-family:sans-serif;margin:2em}table{border-collapse:collapse}"
    "td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #ddd}"
    "td.n{text-align:right;font-variant-numeric:tabular-nums}"
)
_ROW_PX, _MIN_PX, _MAX_PX = 18, 300, 20000


def write_report(record: BatchRecord, path: Path) -> None:
    """Write the report.

    Raises:
        OSError: the file cannot be written.
    """
    path.write_text(page(record), encoding="utf-8")


def page(record: BatchRecord) -> str:
    """The report as text."""
    title = f"Batch {record.id}"
    began = datetime.fromtimestamp(record.began, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    states = ", ".join(f"{count} {name}" for name, count in sorted(record.counts().items()))
    duration = f", {record.ended - record.began:.1f} s" if record.ended else ", not at its end"
    return (
        f"<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'><title>{_escaped(title)}"
        f"</title><style>{_STYLE}</style></head><body><h1>{_escaped(title)}</h1>"
        f"<p>{began}{duration}: {_escaped(states)}.</p>{_timeline(record)}{_table(record)}"
        "</body></html>"
    )


def _escaped(text: str) -> str:
    return html.escape(one_line(text))


def _timeline(record: BatchRecord) -> str:
    import plotly.graph_objects as go  # noqa: PLC0415 - large, and of the extra

    figure = go.Figure()
    bars: dict[str, dict[str, list[Any]]] = {}
    for move in record.batch.moves:
        for attempt in record.attempts.get(move.name, []):
            bar = bars.setdefault(
                attempt.state, {"y": [], "base": [], "x": [], "text": [], "hover": []}
            )
            length = max(0.001, attempt.ended - attempt.began)
            bar["y"].append(move.name)
            bar["base"].append(attempt.began - record.began)
            bar["x"].append(length)
            downtime = attempt.report.get("downtime_ms")
            bar["text"].append("" if downtime is None else f"{downtime:.0f} ms")
            bar["hover"].append(
                f"{_escaped(move.from_)} &gt; {_escaped(move.to)}<br>attempt "
                f"{attempt.number}, {length:.1f} s, by {_escaped(attempt.controller)}"
                + (f"<br>downtime {downtime:.0f} ms" if downtime is not None else "")
                + (f"<br>{_escaped(attempt.error[:200])}" if attempt.error else "")
            )
    for state, bar in bars.items():
        figure.add_bar(
            orientation="h",
            name=state,
            marker_color=_COLOURS.get(state, "#455a64"),
            y=bar["y"],
            base=bar["base"],
            x=bar["x"],
            text=bar["text"],
            hovertext=bar["hover"],
            hoverinfo="text+name",
        )
    names = [move.name for move in record.batch.moves]
    figure.update_layout(
        barmode="overlay",
        height=min(_MAX_PX, max(_MIN_PX, 120 + _ROW_PX * len(names))),
        xaxis_title="seconds since the batch began",
        yaxis={"categoryorder": "array", "categoryarray": names[::-1], "automargin": True},
        margin={"l": 20, "r": 20, "t": 30, "b": 40},
    )
    text: str = figure.to_html(full_html=False, include_plotlyjs="inline")
    return text


def _table(record: BatchRecord) -> str:
    heads = ("move", "engine", "target", "from", "to", "state", "attempts", "downtime ms",
             "total s", "MiB", "error")  # fmt: skip
    rows = ["<tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"]
    for move in record.batch.moves:
        attempts = record.attempts.get(move.name, [])
        last = attempts[-1] if attempts else None
        report = last.report if last else {}
        total = report.get("total_ms")
        sent = report.get("bytes_transferred")
        downtime = report.get("downtime_ms")
        cells = [
            (move.name, ""), (move.engine, ""), (move.target, ""), (move.from_, ""),
            (move.to, ""), (record.states[move.name].value, ""), (str(len(attempts)), "n"),
            ("" if downtime is None else f"{downtime:.0f}", "n"),
            ("" if total is None else f"{total / 1000:.1f}", "n"),
            ("" if sent is None else f"{sent / (1 << 20):.1f}", "n"),
            (last.error if last else "", ""),
        ]  # fmt: skip
        rows.append(
            "<tr>"
            + "".join(f"<td class='{kind}'>{_escaped(text)}</td>" for text, kind in cells)
            + "</tr>"
        )
    return f"<table>{''.join(rows)}</table>"
