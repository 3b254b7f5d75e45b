"""Which pages a restored process gets after it runs, and where they lie: the pager's work list.

Written at the destination when the final images are there, read by the pager (`pager`).
"""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from phaul_runtime.boundedjson import read_json
from phaul_runtime.errors import DestinationError

PAGE = 4096
_NUMBERS = "Q"
_FIELDS = 4
_NEAR = 3


class Run(NamedTuple):
    """Adjacent pages of a process that lie side by side in one file.

    Attributes:
        vaddr: of the first, bytes.
        pages: how many.
        file: index in `FillPlan.files`.
        offset: of the first in that file, bytes.
    """

    vaddr: int
    pages: int
    file: int
    offset: int


class Runs:
    """The runs of one process, sorted by address, without overlaps; 32 bytes each."""

    def __init__(self, numbers: array[int] | None = None) -> None:
        self._numbers = array(_NUMBERS) if numbers is None else numbers

    def append(self, run: Run) -> None:
        """Add a run behind the last; one that continues it, in memory and file, is merged."""
        self.add(*run)

    def add(self, vaddr: int, pages: int, file: int, offset: int) -> None:
        """As `append`, for many: no object is made."""
        numbers = self._numbers
        if numbers and numbers[-2] == file:
            size = numbers[-3] * PAGE
            if numbers[-1] + size == offset and numbers[-4] + size == vaddr:
                numbers[-3] += pages
                return
        numbers.extend((vaddr, pages, file, offset))

    def find(self, vaddr: int, at: int = 0) -> int:
        """The first run, from the run `at` on, that ends behind an address; `len` if none does."""
        numbers, count = self._numbers, len(self._numbers) // _FIELDS
        # A walk through all of it finds the next one here.
        near = at + _NEAR
        near = min(count, near)
        while at < near:
            if numbers[at * _FIELDS] + numbers[at * _FIELDS + 1] * PAGE > vaddr:
                return at
            at += 1

        def end(index: int) -> int:
            return numbers[index * _FIELDS] + numbers[index * _FIELDS + 1] * PAGE

        return bisect_right(range(count), vaddr, at, key=end)

    def copy(self, source: Runs, vaddr: int, end: int, at: int = 0) -> tuple[int, int]:
        """Append what another has of a range that lies behind all runs of this.

        Args:
            source: what to copy from.
            vaddr: of the range.
            end: of the range.
            at: none of the source's runs before this one reaches into the range.

        Returns:
            How many pages there were, and `at` for a range behind this one.
        """
        first = source.find(vaddr, at)
        last = source.find(end, first)
        pages = 0
        if first < last:
            pages += self._add_part(source, first, vaddr, end)
            whole = source._numbers[(first + 1) * _FIELDS : last * _FIELDS]
            self._numbers.extend(whole)
            pages += sum(whole[1::_FIELDS])
        pages += self._add_part(source, last, vaddr, end)
        return pages, last

    def _add_part(self, source: Runs, index: int, vaddr: int, end: int) -> int:
        if index == len(source):
            return 0
        start, pages, file, offset = source._numbers[index * _FIELDS : (index + 1) * _FIELDS]
        behind = start + pages * PAGE
        if start < vaddr:
            offset += vaddr - start
            start = vaddr
        behind = min(behind, end)
        if behind <= start:
            return 0
        self.add(start, (behind - start) // PAGE, file, offset)
        return (behind - start) // PAGE

    def __len__(self) -> int:
        return len(self._numbers) // _FIELDS

    def __getitem__(self, index: int) -> Run:
        at = index * _FIELDS
        return Run(*self._numbers[at : at + _FIELDS])

    def __iter__(self) -> Iterator[Run]:
        return (self[index] for index in range(len(self)))

    @property
    def pages(self) -> int:
        """Pages in all runs."""
        return sum(self._numbers[1::_FIELDS])

    def to_bytes(self) -> bytes:
        """In this machine's byte order."""
        return self._numbers.tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> Runs:
        """What `to_bytes` made."""
        numbers = array(_NUMBERS)
        numbers.frombytes(data)
        return cls(numbers)


@dataclass
class FillPlan:
    """The lazy pages of a process tree.

    Attributes:
        files: the pages files that the runs name, absolute paths.
        tasks: by pid, as CRIU's images name it: in the tree's own pid namespace.
        remote: which pages of one of the files are there, as more come over the network: the
            map of a `postcopy.store.PageStore`, absolute path; empty if all files are whole.
        remote_file: index of that file, -1 if there is none.
        remote_pages: how many there will be in it.
    """

    files: list[str] = field(default_factory=list)
    tasks: dict[int, Runs] = field(default_factory=dict)
    remote: str = ""
    remote_file: int = -1
    remote_pages: int = 0

    @property
    def pages(self) -> int:
        """Pages of all tasks."""
        return sum(runs.pages for runs in self.tasks.values())

    def save(self, path: Path) -> None:
        """Write it: a line of JSON with files and sizes, then the runs; complete or not at all."""
        tasks = {str(pid): runs.to_bytes() for pid, runs in self.tasks.items()}
        head = {
            "files": self.files,
            "tasks": {pid: len(data) for pid, data in tasks.items()},
            "remote": self.remote,
            "remote_file": self.remote_file,
            "remote_pages": self.remote_pages,
        }
        new = path.with_name(f"{path.name}.new")
        new.write_bytes(json.dumps(head).encode() + b"\n" + b"".join(tasks.values()))
        new.replace(path)

    @classmethod
    def load(cls, path: Path) -> FillPlan:
        """Read what `save` wrote.

        Raises:
            DestinationError: it is not there, or malformed.
        """
        try:
            first, _, rest = path.read_bytes().partition(b"\n")
            head = read_json(first)
            tasks = {}
            for pid, size in head["tasks"].items():
                tasks[int(pid)] = Runs.from_bytes(rest[:size])
                rest = rest[size:]
            files = [str(path) for path in head["files"]]
            remote, number = str(head.get("remote", "")), int(head.get("remote_file", -1))
            if number not in (range(len(files)) if remote else (-1,)):
                raise ValueError(f"no file {number}")
            return cls(files, tasks, remote, number, int(head.get("remote_pages", 0)))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise DestinationError(f"cannot read the plan of lazy pages {path}: {error}") from error
