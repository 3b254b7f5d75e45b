"""The areas of a process's memory, and which of its pages are there, as the kernel tells."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from phaul_runtime.pager.uffd import PAGE

PROC = Path("/proc")
# Of smaps: the first line of an area, "Rss", "Swap" and "VmFlags"; no other line has a V in front.
_ENTRIES = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) ...(.) [0-9a-f]+ [0-9a-f:]+ ([0-9]+).*\n"
    rb"(?:[^V].*\n)*?Rss: +([0-9]+) kB\n"
    rb"(?:[^V].*\n)*?Swap: +([0-9]+) kB\n"
    rb"(?:[^V].*\n)*VmFlags:(.*)",
    re.MULTILINE,
)
_ENTRY = 8
_AT_ONCE = 1 << 20
# The highest byte of an entry: bit 63, present, or bit 62, swapped.
_THERE = re.compile(rb"[\x40-\xff]")


class Area(NamedTuple):
    """An area of a process's memory.

    Attributes:
        registered: with a userfaultfd, for missing pages.
        private: private and anonymous: what a plan may have pages of.
        touched: something is in it, in memory or swapped out.
    """

    start: int
    end: int
    registered: bool
    private: bool
    touched: bool


def areas(pid: int) -> list[Area]:
    """All areas of a process, by address.

    Raises:
        OSError: it has ended, or may not be looked at.
    """
    text = (PROC / str(pid) / "smaps").read_bytes()
    # It happens while the tree is held, and areas may be thousands: one expression for all.
    return [
        Area(
            int(start, 16),
            int(end, 16),
            registered=b"um" in flags.split(),
            private=kind == b"p" and inode == b"0",
            touched=resident != b"0" or swapped != b"0",
        )
        for start, end, kind, inode, resident, swapped, flags in _ENTRIES.findall(text)
    ]


def area_at(pid: int, address: int) -> Area | None:
    """The area that an address is in; None if there is none.

    Raises:
        OSError: as `areas`.
    """
    found = (area for area in areas(pid) if area.start <= address < area.end)
    return next(found, None)


def present(pid: int, ranges: list[tuple[int, int]]) -> Iterator[int]:
    """Addresses of pages that are there, in memory or swapped out; rising, as the ranges are.

    Raises:
        OSError: the process has ended, or may not be looked at.
    """
    fd = os.open(PROC / str(pid) / "pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for start, end in ranges:
            at = start
            while at < end:
                size = min(_AT_ONCE, (end - at) // PAGE * _ENTRY)
                data = os.pread(fd, size, at // PAGE * _ENTRY)
                if len(data) != size:
                    raise OSError(f"its page map ends at {at:#x}")
                for match in _THERE.finditer(data[_ENTRY - 1 :: _ENTRY]):
                    yield at + match.start() * PAGE
                at += size // _ENTRY * PAGE
    finally:
        os.close(fd)
