"""What is made of a held task's areas, against files that stand for the kernel's."""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from phaul_runtime.errors import DestinationError
from phaul_runtime.pager import smaps, uffd
from phaul_runtime.pager.missing_ranges import MissingRanges
from phaul_runtime.pager.network_pages import NetworkPages
from phaul_runtime.pager.smaps import Area, areas
from phaul_runtime.pager.task import Task
from phaul_runtime.pager.uffd import PAGE as P
from phaul_runtime.pager.verify import Verified, Verifying

HOST = 4711
PRESENT, SWAPPED, SOFT_DIRTY = 1 << 63, 1 << 62, 1 << 55
# As Linux 6.18 has it, shortened.
ENTRY = """{start:x}-{end:x} {rights} 00000000 00:00 {inode:<26} {name}
Size:                  8 kB
Rss:                 {rss:>5} kB
Pss:                   0 kB
Swap:                {swap:>5} kB
SwapPss:               0 kB
VmFlags: rd wr mr mw me ac{um} sd
"""


@dataclass
class Kernel:
    """A process: its areas, what is there, and who registers."""

    home: Path
    areas: list[Area] = field(default_factory=list)
    there: dict[int, int] = field(default_factory=dict)
    asked: list[tuple[int, int]] = field(default_factory=list)
    refuses: int = 0
    forgets: bool = False

    def area(self, first: int, end: int, *, um: bool = True, private: bool = True) -> None:
        touched = any(first <= page < end for page in self.there)
        self.areas.append(Area(first * P, end * P, um, private, touched))
        self.write()

    def write(self) -> None:
        self.home.mkdir(exist_ok=True)
        entries = [
            ENTRY.format(
                start=area.start,
                end=area.end,
                rights="rw-p" if area.private else "rw-s",
                inode=0 if area.private else 1234,
                name="/dev/zero VmFlags: um (deleted)" if not area.private else "[heap]",
                rss=4 if area.touched else 0,
                swap=0,
                um=" um" if area.registered else "",
            )
            for area in self.areas
        ]
        (self.home / "smaps").write_text("".join(entries))
        with (self.home / "pagemap").open("wb") as file:
            file.write(SOFT_DIRTY.to_bytes(8, "little") * 64)
            for page, entry in self.there.items():
                file.seek(page * 8)
                file.write(entry.to_bytes(8, "little"))
        if not (self.home / "mem").exists():
            (self.home / "mem").write_bytes(bytes(64 * P))

    def register(self, fd: int, start: int, size: int) -> int:
        assert fd == 9
        self.asked.append((start // P, size // P))
        if not self.refuses and not self.forgets:
            self.areas = [
                Area(a.start, a.end, a.registered or a.start == start, a.private, a.touched)
                for a in self.areas
            ]
            self.write()
        return self.refuses

    def page(self, number: int) -> bytes:
        with (self.home / "mem").open("rb") as file:
            return os.pread(file.fileno(), P, number * P)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel(tmp_path / str(HOST))
    monkeypatch.setattr(smaps, "PROC", tmp_path)
    monkeypatch.setattr(uffd, "register", made.register)
    return made


class Content:
    """Pages 8 to 23 of a task, each with its number in all of its bytes."""

    def __init__(self) -> None:
        data = b"".join(bytes([number]) * P for number in range(24))
        self.kept = ctypes.create_string_buffer(data, len(data))
        self.base = ctypes.addressof(self.kept)
        # Two runs side by side, as of two files.
        starts = [8 * P, 16 * P]
        self.task = Task(
            9, MissingRanges(starts, [16 * P, 24 * P], [self.base + at for at in starts]), pid=42
        )

    def run(self, remote: NetworkPages | None = None, most: int = 99) -> Verified:
        def filled(address: int) -> bool:
            self.task.space.drop(address, address + P)
            self.most -= 1
            return self.most > 0

        self.most = most
        return Verifying(self.task, HOST, remote, filled).run()


def test_areas_are_read(kernel: Kernel) -> None:
    kernel.there = {3: PRESENT}
    kernel.area(2, 4)
    kernel.area(4, 5, um=False)
    kernel.area(6, 9, private=False)
    assert areas(HOST) == kernel.areas
    assert smaps.area_at(HOST, 4 * P) == kernel.areas[1]
    assert smaps.area_at(HOST, 5 * P) is None


def test_what_is_well_is_left_alone(kernel: Kernel) -> None:
    # Pages are there, and others are not registered: none that are planned.
    kernel.there = {2: PRESENT, 26: PRESENT}
    kernel.area(0, 3, um=False)
    kernel.area(8, 12)
    kernel.area(12, 30)
    kernel.area(40, 50, um=False, private=False)
    assert Content().run() == Verified()
    assert kernel.asked == []


def test_what_is_not_registered_is_and_what_is_there_is_overwritten(kernel: Kernel) -> None:
    kernel.there = {7: PRESENT, 10: PRESENT, 11: SWAPPED, 22: PRESENT}
    kernel.area(6, 12, um=False)
    kernel.area(12, 20)
    kernel.area(20, 30, um=False)
    content = Content()
    assert content.run() == Verified(registered=2, overwritten=3)
    assert kernel.asked == [(6, 6), (20, 10)]
    for page in (7, 8, 9, 12, 23):
        assert kernel.page(page) == bytes(P), page
    for page in (10, 11, 22):
        assert kernel.page(page) == bytes([page]) * P
    assert content.run() == Verified()


def test_a_page_that_is_there_in_a_registered_area_is_overwritten(kernel: Kernel) -> None:
    kernel.there = {9: PRESENT}
    kernel.area(8, 24)
    assert Content().run() == Verified(overwritten=1)
    assert kernel.page(9) == bytes([9]) * P


def test_what_is_still_at_the_source_is_waited_for(kernel: Kernel) -> None:
    kernel.there = {9: PRESENT, 20: PRESENT}
    kernel.area(8, 24, um=False)
    content = Content()
    flags = ctypes.create_string_buffer(bytes(8), 8)
    remote = NetworkPages(content.base + 16 * P, ctypes.addressof(flags), 8, 0)
    for _ in range(2):
        found = content.run(remote)
        assert (found.wants, found.pending, found.registered) == ({4}, True, 0)
    # Before it is right, nothing is registered: so it is the same for whoever comes next.
    assert kernel.asked == []
    flags[4] = b"\1"
    assert content.run(remote) == Verified(registered=1, overwritten=1)
    assert kernel.page(20) == bytes([20]) * P


def test_much_is_done_in_several_goes(kernel: Kernel) -> None:
    kernel.there = dict.fromkeys(range(8, 24), PRESENT)
    kernel.area(8, 24, um=False)
    content = Content()
    found = content.run(most=10)
    assert (found.overwritten, found.pending, kernel.asked) == (10, True, [])
    assert content.run() == Verified(registered=1, overwritten=6)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ("hole", "the area at 0xb000 of process 42 does not exist"),
        ("end", "the area at 0x17000 of process 42 does not exist"),
        ("shared", "the area at 0xb000 of process 42 is not its own alone"),
        ("refused", "area at 0x8000 of process 42 cannot be registered: Device or resource busy"),
        ("forgotten", "the area at 0x8000 of process 42 does not stay registered"),
        ("gone", "memory of process 42, 4711 on this host, cannot be verified: No such file"),
    ],
)
def test_what_cannot_be_made_fit_is_named(kernel: Kernel, wrong: str, why: str) -> None:
    kernel.refuses = errno.EBUSY if wrong == "refused" else 0
    kernel.forgets = wrong == "forgotten"
    if wrong != "gone":
        kernel.area(8, 11, um=wrong not in ("refused", "forgotten"))
        if wrong != "hole":
            kernel.area(11, 12, private=wrong != "shared")
        kernel.area(12, 23 if wrong == "end" else 24)
    with pytest.raises(DestinationError, match=why):
        Content().run()


def test_a_page_that_cannot_be_written_is_an_error(kernel: Kernel) -> None:
    kernel.there = {9: PRESENT}
    kernel.area(8, 24)
    (kernel.home / "mem").unlink()
    with pytest.raises(DestinationError, match="process 42, .* be verified: No such"):  # noqa: RUF043
        Content().run()
