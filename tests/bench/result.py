"""What one move was, measured; kept as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = "phaul-runtime/bench/1"


@dataclass(frozen=True)
class Carried:
    """What a move carried, by its own account.

    Attributes:
        pages: of the target.
        final_pages: those of them that were dumped in the freeze.
        bytes: carried.
        steps: of the freeze, ms; the methods' differ.
        dumped_pages: in all rounds; None: `final_pages`.
        rounds: of pre-copy.
        downtime_ms, lazy_complete_ms: as reported.
        first_round_mib_s: the throughput of the first round's pages.
    """

    pages: int
    final_pages: int
    bytes: int
    steps: dict[str, float] = field(default_factory=dict)
    dumped_pages: int | None = None
    rounds: int = 0
    downtime_ms: float | None = None
    lazy_complete_ms: float | None = None
    first_round_mib_s: float | None = None

    @property
    def own_ms(self) -> float | None:
        """The reported downtime without CRIU's dump and restore, of which `kill` and `resume` are
        the last parts."""
        if self.downtime_ms is None or not {"dump", "restore"} <= self.steps.keys():
            return None
        parts = ("dump", "kill", "restore", "resume")
        return self.downtime_ms - sum(self.steps.get(name, 0.0) for name in parts)


@dataclass(frozen=True)
class Run:
    """One move, measured from outside.

    Attributes:
        freeze_ms: from the last sign of life at the source to the first at the destination.
        pause_ms: the longest other silence while the command ran.
        total_s: of the command.
        wire_bytes: on the cable between the hosts, both ways, while the command ran.
        rewritten_pages: by the target while the command ran; a page twice counts twice.
        wrong: pages (redis: entries) that were not what they should be.
    """

    freeze_ms: float
    pause_ms: float
    total_s: float
    wire_bytes: int
    rewritten_pages: int
    wrong: int
    carried: Carried

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Run:
        """As `asdict` gave it."""
        return cls(**{**values, "carried": Carried(**values["carried"])})


@dataclass
class Cell:
    """One method moves one workload, once."""

    workload: str
    method: str
    number: int
    run: Run | None = None
    failure: str = ""


@dataclass
class Results:
    """All of a run of the programme.

    Attributes:
        raw_mib_s: of a plain socket between the hosts, once a turn.
        beside_mib_s: the same while an idle victim of 64 MiB runs at the source, as in each move.
        remarks: why a method was left out.
    """

    runs: int
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""
    cells: list[Cell] = field(default_factory=list)
    raw_mib_s: list[float] = field(default_factory=list)
    beside_mib_s: list[float] = field(default_factory=list)
    remarks: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n")
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> Results:
        """What `save` wrote.

        Raises:
            ValueError: it is of another schema.
        """
        values = json.loads(path.read_text())
        if values.pop("schema", None) != SCHEMA:
            raise ValueError(f"{path} is not {SCHEMA}")
        for cell in values["cells"]:
            cell["run"] = cell["run"] and Run.from_json(cell["run"])
        values["cells"] = [Cell(**cell) for cell in values["cells"]]
        return cls(**values)

    def done(self, workload: str, method: str, number: int) -> bool:
        """Whether that was measured already."""
        return any(
            cell.run and (cell.workload, cell.method, cell.number) == (workload, method, number)
            for cell in self.cells
        )

    def add(self, cell: Cell) -> None:
        """In place of an earlier attempt at the same."""
        same = (cell.workload, cell.method, cell.number)
        self.cells = [c for c in self.cells if (c.workload, c.method, c.number) != same]
        self.cells.append(cell)

    def of(self, workload: str, method: str) -> list[Run]:
        """The runs of one method with one workload that succeeded."""
        return [
            cell.run
            for cell in self.cells
            if cell.run and (cell.workload, cell.method) == (workload, method)
        ]

    @property
    def faults(self) -> list[str]:
        """What failed, and where pages were wrong."""
        found = []
        for cell in self.cells:
            name = f"{cell.workload}, {cell.method}, run {cell.number}"
            if cell.failure:
                found.append(f"{name}: {cell.failure}")
            elif cell.run and cell.run.wrong:
                found.append(f"{name}: {cell.run.wrong} wrong")
        return found


@dataclass(frozen=True)
class Spread:
    """Several measurements of one thing."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """None if there is none."""
        found: Sequence[float] = [value for value in values if value is not None]
        if not found:
            return None
        return cls(float(statistics.median(found)), min(found), max(found))
