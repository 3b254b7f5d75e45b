"""Which pages a dump left with its processes, numbered alike at both ends."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from phaul_runtime.memory.fill_plan import PAGE
from phaul_runtime.memory.pagemap import is_remote, pagemap_path, processes, read_pagemap


@dataclass(frozen=True)
class RemotePages:
    """The pages that are in no image, of all processes of a dump.

    Page numbers, from 0 to `total - 1`, count through the runs. Marks that a lazy restore adds to
    the page maps (`lazyimages.plan_lazy`) split entries and change none of this.

    Attributes:
        runs: (pid as in the images, address, pages), sorted by pid, then address; neighbours are
            one run.
    """

    runs: list[tuple[int, int, int]]
    _firsts: list[int] = field(init=False, repr=False, compare=False)
    total: int = field(init=False)

    def __post_init__(self) -> None:
        *firsts, total = accumulate((pages for _, _, pages in self.runs), initial=0)
        object.__setattr__(self, "_firsts", firsts)
        object.__setattr__(self, "total", total)

    @classmethod
    def of(cls, images_dir: Path) -> RemotePages:
        """Those of a directory's page maps.

        Raises:
            DestinationError: a page map is missing or malformed.
        """
        runs: list[tuple[int, int, int]] = []
        for pid in processes(images_dir):
            begin = behind = 0
            for vaddr, pages, flags in read_pagemap(pagemap_path(images_dir, pid)).entries:
                if not is_remote(flags):
                    continue
                if vaddr != behind or begin == behind:
                    if begin < behind:
                        runs.append((pid, begin, (behind - begin) // PAGE))
                    begin = vaddr
                behind = vaddr + pages * PAGE
            if begin < behind:
                runs.append((pid, begin, (behind - begin) // PAGE))
        return cls(runs)

    def pieces(self, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Where pages lie that have adjacent numbers: (pid, address, pages) of each run's part.

        Raises:
            ValueError: there are no such pages.
        """
        if first < 0 or count < 0 or first + count > self.total:
            raise ValueError(f"no pages {first} to {first + count - 1} among {self.total}")
        at = bisect_right(self._firsts, first) - 1
        while count:
            pid, vaddr, pages = self.runs[at]
            skipped = first - self._firsts[at]
            part = min(count, pages - skipped)
            yield pid, vaddr + skipped * PAGE, part
            first, count, at = first + part, count - part, at + 1
