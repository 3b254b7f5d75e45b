"""What became of each page that a pager was given to bring: exactly one thing.

Changed only together with a space, by what stands in the journal too: a twin that goes on has
counted what the dead one had counted, no page twice and none left out.
"""

from __future__ import annotations

from enum import IntEnum


class Fate(IntEnum):
    """What became of a page that was missing."""

    FILLED = 1
    """Its content was put in its place."""
    PRESENT = 2
    """A page was there already: a dead twin's last copy, which it did not live to note."""
    DROPPED = 3
    """Its process gave it up; the kernel announced that."""
    ENDED = 4
    """Its process ended."""
    UNSHARED = 5
    """A forked child never had its area (MADV_DONTFORK)."""
    GONE = 6
    """Its area is gone, and nobody had announced that."""
    UNSURE = 7
    """The process had touched it before its area was registered: it may have read zeros."""


_LOUD = {
    Fate.GONE: "have no place any more, and the kernel has announced nothing "
    "(shmat with SHM_REMAP does that); otherwise they read as zeros",
    Fate.UNSURE: "were touched before they could be served: it may have read zeros there",
}
_LATE = "were in areas that could be served only while it ran"
_MOST_NOTES = 8


class Account:
    """The pages of all tasks, sorted by what became of them."""

    def __init__(self) -> None:
        self.total = 0
        """Pages that were ever missing, those that forked children miss among them."""
        self._pages = dict.fromkeys(Fate, 0)
        # By process and what is told of it: the first address, pages.
        self._told: dict[tuple[int, str], tuple[int, int]] = {}

    def owe(self, pages: int) -> None:
        """More pages are missing from now on."""
        self.total += pages

    def settle(self, fate: Fate, pages: int, pid: int, address: int) -> None:
        """These are not missing any more."""
        self._pages[fate] += pages
        if fate in _LOUD and pages:
            self._tell(pid, _LOUD[fate], address, pages)

    def late(self, pid: int, address: int, pages: int) -> None:
        """An area was found unregistered while its process ran."""
        self._tell(pid, _LATE, address, pages)

    def _tell(self, pid: int, what: str, address: int, pages: int) -> None:
        first, before = self._told.get((pid, what), (address, 0))
        self._told[pid, what] = first, before + pages

    def notes(self, unaccounted: int, *, taken_over: bool) -> list[str]:
        """What must not stay unnoticed, a line each; process ids are those of the images."""
        lines = [
            f"process {pid}: {pages} pages from {first:#x} on {what}"
            for (pid, what), (first, pages) in self._told.items()
        ]
        present = self._pages[Fate.PRESENT]
        if present and not taken_over:
            lines.append(
                f"{present} pages were there before they were filled; what they hold is not known"
            )
        if unaccounted:
            lines.append(f"of {unaccounted} pages it is not known what became of them")
        more = len(lines) - _MOST_NOTES
        return lines if more <= 0 else [*lines[:_MOST_NOTES], f"and {more} more of that kind"]

    def numbers(self, missing: int, *, taken_over: bool) -> dict[str, object]:
        """For a status.

        Args:
            missing: pages that are missing now, as the spaces say.
            taken_over: a twin has gone on for a dead one.
        """
        pages = self._pages
        unaccounted = self.total - missing - sum(pages.values())
        return {
            "pages": self.total,
            "missing": missing,
            "filled": pages[Fate.FILLED],
            "present": pages[Fate.PRESENT],
            "dropped": pages[Fate.DROPPED],
            "ended": pages[Fate.ENDED],
            "unshared": pages[Fate.UNSHARED],
            "lost": pages[Fate.GONE] + pages[Fate.UNSURE],
            "notes": self.notes(unaccounted, taken_over=taken_over),
        }


__all__ = ["Account", "Fate"]
