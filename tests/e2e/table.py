"""The table of what moves: a row for each laboratory, direction and engine, a column for each mode.

`test_table.py` fills it in; it is printed at the end of the run, and written to the file $TABLE.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.e2e import labs

MODES = {
    "lazy": ("--restore", "lazy"),
    "full": ("--restore", "full"),
    "hybrid": ("--mode", "hybrid"),
    "post-copy": ("--mode", "post-copy"),
}
HEAD = ("laboratory", "direction", "engine", *MODES)


@dataclass(frozen=True)
class Cell:
    """One move: where, of what, and how."""

    lab: str
    source: str
    destination: str
    engine: str
    mode: str

    @property
    def row(self) -> tuple[str, str, str]:
        """The row that it stands in."""
        kind = labs.LABS[self.lab]
        ends = (f"{host} {kind.suite_of(host)}" for host in (self.source, self.destination))
        return self.lab, " > ".join(ends), self.engine


@dataclass
class Table:
    """What became of each cell, and what is true of a laboratory's."""

    cells: dict[Cell, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """For people: a head, and the rows in the order in which they were filled in."""
        rows: dict[tuple[str, str, str], dict[str, str]] = {}
        for cell, text in self.cells.items():
            rows.setdefault(cell.row, {})[cell.mode] = text
        texts = [HEAD, *((*row, *(found.get(m, "") for m in MODES)) for row, found in rows.items())]
        widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
        lines = [
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
            for row in texts
        ]
        return lines + [f"{lab}: {note}" for lab, note in self.notes.items()]


TABLE = Table()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not TABLE.cells:
        return
    lines = TABLE.lines()
    terminalreporter.section("what moves")
    for line in lines:
        terminalreporter.write_line(line)
    path = os.environ.get("TABLE")
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
