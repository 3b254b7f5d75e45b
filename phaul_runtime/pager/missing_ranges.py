"""Which pages of a process are missing yet, and where their bytes lie.

Pure: addresses and numbers only. What the kernel tells of the process's own doings (unmap, remap,
fork) is applied here, so that no page is filled with what it must not hold any more.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator


class MissingRanges:
    """The missing runs of one process, sorted, without overlaps.

    Three lists side by side: a fault costs one bisection and no object.
    """

    def __init__(
        self,
        starts: list[int] | None = None,
        ends: list[int] | None = None,
        sources: list[int] | None = None,
    ) -> None:
        self._starts = starts or []
        self._ends = ends or []
        self._sources = sources or []

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def missing(self) -> int:
        """Bytes that are missing."""
        return sum(self._ends) - sum(self._starts)

    def runs(self) -> list[tuple[int, int, int]]:
        """(start, end, source) of each run."""
        return list(zip(self._starts, self._ends, self._sources, strict=True))

    def copy(self) -> MissingRanges:
        """A forked child's: it misses what its parent misses."""
        return MissingRanges(self._starts[:], self._ends[:], self._sources[:])

    def find(self, address: int) -> tuple[int, int] | None:
        """The end of the run that holds an address, and the source of that address."""
        at = bisect_right(self._starts, address) - 1
        if at < 0 or address >= self._ends[at]:
            return None
        return self._ends[at], self._sources[at] + address - self._starts[at]

    def run(self, at: int) -> tuple[int, int, int]:
        """(start, end, source) of one run."""
        return self._starts[at], self._ends[at], self._sources[at]

    def first(self, start: int, end: int) -> int | None:
        """The lowest address between that is missing; None if nothing is."""
        at = bisect_right(self._ends, start)
        if start >= end or at == len(self._starts) or self._starts[at] >= end:
            return None
        return max(start, self._starts[at])

    def between(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """(start, end) of what is missing between."""
        at = bisect_right(self._ends, start)
        while at < len(self._starts) and self._starts[at] < end:
            yield max(start, self._starts[at]), min(end, self._ends[at])
            at += 1

    def drop(self, start: int, end: int) -> int:
        """Nothing between is missing any more: it was filled, or the process gave it up.

        Returns:
            Bytes that were missing.
        """
        starts, ends = self._starts, self._ends
        at = bisect_right(starts, start) - 1
        if at >= 0 and starts[at] == start and start < end < ends[at]:
            # By far the most frequent: the front of a run was filled.
            starts[at] = end
            self._sources[at] += end - start
            return end - start
        return _bytes(self._cut(start, end))

    def move(self, start: int, to: int, size: int) -> int:
        """The process moved a piece of its memory; what was there before is gone.

        Returns:
            Bytes that were missing where it is now.
        """
        pieces = self._cut(start, start + size)
        gone = _bytes(self._cut(to, to + size))
        if not pieces:
            return gone
        by = to - start
        at = bisect_right(self._starts, to)
        self._starts[at:at] = [piece[0] + by for piece in pieces]
        self._ends[at:at] = [piece[1] + by for piece in pieces]
        self._sources[at:at] = [piece[2] for piece in pieces]
        return gone

    def _cut(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """Take out what lies between; returns it."""
        if start >= end:
            return []
        starts, ends, sources = self._starts, self._ends, self._sources
        first = max(0, bisect_right(starts, start) - 1)
        if first < len(ends) and ends[first] <= start:
            first += 1
        stop = first
        taken: list[tuple[int, int, int]] = []
        kept: list[tuple[int, int, int]] = []
        while stop < len(starts) and starts[stop] < end:
            low, high, source = starts[stop], ends[stop], sources[stop]
            if low < start:
                kept.append((low, start, source))
            cut = max(low, start), min(high, end)
            taken.append((*cut, source + cut[0] - low))
            if high > end:
                kept.append((end, high, source + end - low))
            stop += 1
        starts[first:stop] = [piece[0] for piece in kept]
        ends[first:stop] = [piece[1] for piece in kept]
        sources[first:stop] = [piece[2] for piece in kept]
        return taken


def _bytes(pieces: list[tuple[int, int, int]]) -> int:
    return sum(end - start for start, end, _ in pieces)
