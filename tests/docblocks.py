"""The fenced blocks of the documentation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


@dataclass(frozen=True)
class Block:
    """One block: in which file, at which line, what kind, and its text."""

    path: Path
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.path.name}:{self.line}"

    @property
    def host(self) -> str:
        """Where a block of the tutorial is run: `# on a`; empty if it does not say."""
        found = re.match(r"# on ([a-z])\n", self.text)
        return found[1] if found else ""


def blocks(path: Path) -> Iterator[Block]:
    """Those of a page, in their order."""
    kind, begun, lines = "", 0, list[str]()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.startswith("```"):
            lines.append(line)
        elif begun:
            yield Block(path, begun, kind, "\n".join(lines) + "\n")
            begun = 0
        else:
            kind, begun = line[3:], number
            lines.clear()
    assert not begun, f"{path}:{begun}: a block has no end"


def said(expected: str, output: str) -> list[str]:
    """The lines of `expected` that `output` has not; `...` stands for anything, a space for any."""
    lines = [" ".join(line.split()) for line in output.splitlines()]
    missing = []
    for line in filter(None, (" ".join(each.split()) for each in expected.splitlines())):
        pattern = ".*".join(re.escape(part.strip()) for part in line.split("..."))
        if not any(re.search(pattern, each) for each in lines):
            missing.append(line)
    return missing
