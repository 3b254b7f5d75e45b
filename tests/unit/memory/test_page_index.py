"""The index of a chain and the marked page maps, held against a reader that goes page by page.

The images are made here, by no code of the product; so is the reader, after CRIU's `page_read`.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phaul_runtime.criu.page_format import PageFormat
from phaul_runtime.errors import DestinationError
from phaul_runtime.memory.fill_plan import PAGE, FillPlan
from phaul_runtime.memory.mark_lazy import plan_lazy, restore_full
from phaul_runtime.memory.page_index import PageIndex
from phaul_runtime.memory.pagemap import (
    IN_PARENT,
    LAZY,
    PRESENT,
    Entry,
    Pagemap,
    convert_page_maps,
    page_maps,
    read_pagemap,
    read_vmas,
    write_pagemap,
)

BASE = 0x7F12_3456_7000
PAGES = 40
PIDS = [1, 7, 40]
ANONYMOUS = (0x22, 0x201)
# Shared, locked, huge, from a file; vDSO, vvar, an AIO ring, a shadow stack, no area of its own.
EAGER = [(0x21, 0x101), (0x2022, 0x201), (0x40022, 0x201), (0x02, 0x41)]
EAGER += [(0x22, 0x209), (0x22, 0x1201), (0x22, 0x2000), (0x22, 0x8201), (0x08000022, 0x08000201)]

Area = tuple[int, int, int, int]  # start, end, flags, status
Piece = tuple[int, int, int]  # first page, pages, flags


# -- images ------------------------------------------------------------------------------


def varint(number: int) -> bytes:
    out = b""
    while number > 0x7F:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + bytes([number])


def numbers(**fields: int) -> bytes:
    """A message of numbers: `f1=...` is field 1."""
    return b"".join(
        varint(int(name[1:]) << 3) + varint(value) for name, value in sorted(fields.items())
    )


def image(magic: int, *messages: bytes) -> bytes:
    return struct.pack("<II", 0x54564319, magic) + b"".join(
        struct.pack("<I", len(message)) + message for message in messages
    )


def pagemap_image(pages_id: int, pieces: list[Piece], *, wide: bool) -> bytes:
    entries = [
        numbers(f1=BASE + first * PAGE, f2=0, f4=flags, f5=count)
        if wide
        else numbers(f1=BASE + first * PAGE, f2=count, f4=flags)
        for first, count, flags in pieces
    ]
    return image(0x56084025, numbers(f1=pages_id), *entries)


def mm_image(areas: list[Area]) -> bytes:
    mm = numbers(f1=0x400000, f2=0x401000, f12=5)
    for start, end, flags, status in areas:
        vma = numbers(f1=start, f2=end, f3=0, f4=0, f5=3, f6=flags, f7=status, f8=1)
        mm += varint(14 << 3 | 2) + varint(len(vma)) + vma
    return image(0x57492820, mm + numbers(f15=1))


def content(token: int) -> bytes:
    return struct.pack("<Q", token) * (PAGE // 8)


# -- the reader --------------------------------------------------------------------------


def entries_of(images_dir: Path, pid: int) -> tuple[int, list[Entry]] | None:
    path = images_dir / f"pagemap-{pid}.img"
    if not path.exists():
        return None
    pagemap = read_pagemap(path)
    return pagemap.pages_id, pagemap.entries


def read_page(images_dir: Path, pid: int, vaddr: int) -> bytes:
    """One page as CRIU reads it: seek, then here or in the parent."""
    found = entries_of(images_dir, pid)
    assert found, f"no page map of {pid} in {images_dir}"
    pages_id, entries = found
    offset = 0
    for start, pages, flags in entries:
        if start <= vaddr < start + pages * PAGE:
            if flags & IN_PARENT:
                return read_page((images_dir / "parent").resolve(), pid, vaddr)
            data = (images_dir / f"pages-{pages_id}.img").read_bytes()
            at = offset + vaddr - start
            assert at + PAGE <= len(data)
            return data[at : at + PAGE]
        if flags & PRESENT:
            offset += pages * PAGE
    raise AssertionError(f"missing {vaddr:#x} in {images_dir}")


def listed(images_dir: Path, pid: int) -> dict[int, int]:
    """The flags of every page in a page map."""
    found = entries_of(images_dir, pid)
    entries = found[1] if found else []
    return {
        start + number * PAGE: flags for start, pages, flags in entries for number in range(pages)
    }


def planned(plan: FillPlan, pid: int) -> dict[int, bytes]:
    """Every page of the plan."""
    pages = {}
    for vaddr, count, file, offset in plan.tasks[pid]:
        with Path(plan.files[file]).open("rb") as stream:
            for number in range(count):
                stream.seek(offset + number * PAGE)
                assert vaddr + number * PAGE not in pages
                pages[vaddr + number * PAGE] = stream.read(PAGE)
    return pages


# -- a source that changes ---------------------------------------------------------------


@dataclass
class Source:
    """Processes whose pages change, dumped into a chain as CRIU does."""

    wdir: Path
    random: Random
    memory: dict[int, dict[int, int]] = field(default_factory=dict)
    dumped: dict[int, dict[int, int]] = field(default_factory=dict)
    count: int = 0
    token: int = 0

    def __post_init__(self) -> None:
        self.wide = self.random.random() < 0.5

    def fresh(self) -> int:
        self.token += 1
        return self.token

    def live(self) -> None:
        """Processes come and go (a pid may be used again), pages are touched, moved and freed."""
        random = self.random
        for pid in PIDS:
            fate = random.random()
            if fate < 0.15:
                self.memory.pop(pid, None)
            if fate < 0.08 or pid not in self.memory:
                # A pid that is used again has no parent to CRIU.
                self.dumped.pop(pid, None)
                if fate < 0.9:
                    self.memory[pid] = {}
            if pid not in self.memory:
                continue
            pages = self.memory[pid]
            for _ in range(random.randrange(5)):
                begin = random.randrange(PAGES)
                end = min(PAGES, begin + random.randrange(1, 12))
                step = random.choice([1, 1, 2])
                act = random.choice(["touch", "free", "move"])
                for page in range(begin, end, step):
                    if act == "touch":
                        pages[page] = self.fresh()
                    elif act == "free":
                        pages.pop(page, None)
                    elif page in pages:
                        # Moved pages are dirty at their new place.
                        del pages[page]
                        pages[random.randrange(PAGES)] = self.fresh()

    def dump(self, areas: dict[int, list[Area]] | None = None) -> Path:
        """The next directory, by page servers; with `areas` its small images too."""
        random = self.random
        if self.count and random.random() < 0.05:
            self.dumped = {}  # the chain ends: the next has no parent
            linked = False
        else:
            linked = self.count > 0
        self.count += 1
        images_dir = self.wdir / str(self.count)
        images_dir.mkdir()
        if linked:
            (images_dir / "parent").symlink_to(f"../{self.count - 1}")
        first_id = random.randrange(1, 4)
        for number, pid in enumerate(random.sample(sorted(self.memory), len(self.memory))):
            pages_id = first_id + number
            pieces, data = self._pieces(pid, areas[pid] if areas else [])
            path = images_dir / f"pagemap-{pid}.img"
            path.write_bytes(pagemap_image(pages_id, pieces, wide=self.wide))
            (images_dir / f"pages-{pages_id}.img").write_bytes(data)
            if areas:
                (images_dir / f"mm-{pid}.img").write_bytes(mm_image(areas[pid]))
        # Of other kinds, beside them.
        (images_dir / "pagemap-shmem-7.img").write_bytes(pagemap_image(9, [], wide=self.wide))
        self.dumped = {pid: dict(pages) for pid, pages in self.memory.items()}
        return images_dir

    def _pieces(self, pid: int, areas: list[Area]) -> tuple[list[Piece], bytes]:
        random = self.random
        old = self.dumped.get(pid, {})
        pieces: list[Piece] = []
        data = b""
        for page, token in sorted(self.memory[pid].items()):
            if old.get(page) == token and random.random() < 0.95:
                flags = IN_PARENT
            else:
                vaddr = BASE + page * PAGE
                may = any(a <= vaddr < b and (f, s) == ANONYMOUS for a, b, f, s in areas)
                # Some are stacks of threads, which CRIU does not mark.
                flags = PRESENT | LAZY if may and random.random() < 0.9 else PRESENT
                data += content(token)
            if pieces and random.random() < 0.95:
                first, count, before = pieces[-1]
                if (first + count, before) == (page, flags):
                    pieces[-1] = (first, count + 1, flags)
                    continue
            pieces.append((page, 1, flags))
        return pieces, data

    def areas(self) -> dict[int, list[Area]]:
        """Areas that hold all pages, some of them side by side; then a guard inside of them."""
        random = self.random
        return {pid: self._areas_of(set(pages)) for pid, pages in self.memory.items()} | {
            pid: [] for pid in self.memory if not self.memory[pid] and random.random() < 0.5
        }

    def _areas_of(self, pages: set[int]) -> list[Area]:
        random = self.random
        areas = []
        begin = 0
        while begin < PAGES:
            end = min(PAGES, begin + random.randrange(1, 15))
            kind = ANONYMOUS if random.random() < 0.6 else random.choice(EAGER)
            if pages & set(range(begin, end)) or random.random() < 0.5:
                areas.append((BASE + begin * PAGE, BASE + end * PAGE, *kind))
            begin = end
        if random.random() < 0.5:
            areas.append((BASE, BASE + PAGE, 0, 0x10000))
        return areas


@contextmanager
def source(random: Random) -> Iterator[Source]:
    with tempfile.TemporaryDirectory() as wdir:
        yield Source(Path(wdir).resolve(), random)


RANDOMS = st.integers(0, 1 << 64).map(Random)
ITERATIONS = st.integers(1, 7)


@settings(deadline=None, max_examples=100)
@given(RANDOMS, ITERATIONS, st.booleans())
def test_every_page_is_read_the_same_lazy_or_not(
    random: Random, iterations: int, late: bool
) -> None:
    with source(random) as process:
        index = PageIndex()
        for _ in range(iterations - 1):
            process.live()
            index.add(process.dump())
        process.live()
        areas = process.areas()
        last = process.dump(areas)
        before = {pid: (last / f"pagemap-{pid}.img").read_bytes() for pid in process.memory}
        dumped = {pid: listed(last, pid) for pid in process.memory}

        plan = plan_lazy(PageIndex.follow(last) if late else index, last)
        plan.save(last / "plan")
        plan = FillPlan.load(last / "plan")

        assert sorted(plan.tasks) == sorted(process.memory)
        for pid, pages in process.memory.items():
            truth = {BASE + page * PAGE: content(token) for page, token in pages.items()}
            marked = listed(last, pid)
            lazy = planned(plan, pid)
            assert lazy == {vaddr: truth[vaddr] for vaddr, f in marked.items() if f & LAZY}
            # What is eager is read by CRIU, and what is lazy too if the option is not given.
            assert {vaddr: read_page(last, pid, vaddr) for vaddr in marked} == truth
            for vaddr, flags in marked.items():
                kind = next((f, s) for a, b, f, s in areas[pid] if a <= vaddr < b)
                may = kind == ANONYMOUS and dumped[pid][vaddr] != PRESENT
                assert bool(flags & LAZY) == may
            found = entries_of(last, pid)
            assert found
            for start, count, _ in found[1]:
                end = start + count * PAGE
                assert any(a <= start and end <= b for a, b, _f, s in areas[pid] if s != 0x10000)

        again = plan_lazy(index, last) if not late else plan_lazy(PageIndex.follow(last), last)
        assert again.tasks.keys() == plan.tasks.keys()
        for pid in process.memory:
            assert planned(again, pid) == planned(plan, pid)
            assert again.tasks[pid].to_bytes() == plan.tasks[pid].to_bytes()
        for _ in range(2):
            restore_full(last)
            assert before == {
                pid: (last / f"pagemap-{pid}.img").read_bytes() for pid in process.memory
            }


@settings(deadline=None, max_examples=100)
@given(RANDOMS, ITERATIONS)
def test_the_index_after_each_iteration(random: Random, iterations: int) -> None:
    with source(random) as process:
        index = PageIndex()
        for _ in range(iterations):
            process.live()
            images_dir = process.dump()
            index.add(images_dir)
            index.add(images_dir)
            assert sorted(index.pids) == sorted(process.memory)
            plan = FillPlan(index.files, {pid: index.runs(pid) for pid in index.pids})
            for pid, pages in process.memory.items():
                truth = {BASE + page * PAGE: content(token) for page, token in pages.items()}
                assert planned(plan, pid) == truth
                places = [(run.vaddr, run.vaddr + run.pages * PAGE) for run in plan.tasks[pid]]
                assert places == sorted(places)


# -- what is refused ---------------------------------------------------------------------


def directory(
    wdir: Path, number: int, pieces: list[Piece], *, parent: bool = True, data: int | None = None
) -> Path:
    images_dir = wdir / str(number)
    images_dir.mkdir()
    if parent and number > 1:
        (images_dir / "parent").symlink_to(f"../{number - 1}")
    (images_dir / "pagemap-5.img").write_bytes(pagemap_image(1, pieces, wide=False))
    size = sum(count for _, count, flags in pieces if flags & PRESENT) if data is None else data
    (images_dir / "pages-1.img").write_bytes(b"x" * size * PAGE)
    (images_dir / "mm-5.img").write_bytes(mm_image([(BASE, BASE + PAGES * PAGE, *ANONYMOUS)]))
    return images_dir


@pytest.mark.parametrize(
    ("first", "second", "missing"),
    [
        ([(0, 4, PRESENT)], [(2, 3, IN_PARENT)], 4),
        ([(0, 4, PRESENT), (5, 2, PRESENT)], [(0, 7, IN_PARENT)], 4),
        ([(3, 4, PRESENT)], [(0, 7, IN_PARENT)], 0),
        ([], [(0, 1, IN_PARENT)], 0),
        # The one before has not listed it: it was gone in between.
        ([(0, 4, PRESENT)], [(0, 1, PRESENT), (1, 5, IN_PARENT)], 4),
    ],
)
def test_a_page_that_is_nowhere_is_never_zero(
    tmp_path: Path, first: list[Piece], second: list[Piece], missing: int
) -> None:
    index = PageIndex()
    index.add(directory(tmp_path, 1, first))
    last = directory(tmp_path, 2, second)
    with pytest.raises(DestinationError, match=rf"process 5: .* {BASE + missing * PAGE:#x}$"):
        plan_lazy(index, last)


def test_a_page_freed_in_between_is_nowhere(tmp_path: Path) -> None:
    index = PageIndex()
    index.add(directory(tmp_path, 1, [(0, 4, PRESENT)]))
    index.add(directory(tmp_path, 2, [(0, 2, IN_PARENT)]))
    with pytest.raises(DestinationError, match=f"{BASE + 2 * PAGE:#x}"):
        plan_lazy(index, directory(tmp_path, 3, [(0, 4, IN_PARENT)]))


def test_a_directory_of_another_chain_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    index = PageIndex()
    index.add(directory(tmp_path, 1, [(0, 4, PRESENT)]))
    directory(tmp_path, 2, [(0, 4, IN_PARENT)])
    third = directory(tmp_path, 3, [(0, 4, IN_PARENT)])
    with pytest.raises(DestinationError, match="continues"):
        index.add(third)
    index.add(tmp_path / "2")
    index.add(third)
    assert index.runs(5).pages == 4
    index.add(directory(tmp_path, 4, [(0, 1, PRESENT)], parent=False))
    assert index.runs(5).pages == 1
    assert index.files == [str(tmp_path / "4/pages-1.img")]
    # What the earlier chain has is not taken for what this one lacks.
    last = directory(tmp_path, 5, [(0, 1, IN_PARENT)], parent=False)
    with pytest.raises(DestinationError, match="no image has the page"):
        plan_lazy(index, last)


def test_a_pages_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    index = PageIndex()
    with pytest.raises(DestinationError, match="cut short"):
        index.add(directory(tmp_path, 1, [(0, 4, PRESENT)], data=3))
    assert not index.pids


def test_malformed_images_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "pagemap-5.img"
    good = pagemap_image(1, [(0, 4, PRESENT), (6, 1, IN_PARENT)], wide=False)
    flaws = [
        good[:-1],
        good[:10],
        good[:8],
        b"",
        b"\1" + good[1:],
        pagemap_image(1, [(3, 4, PRESENT), (6, 1, PRESENT)], wide=False),
        pagemap_image(1, [(3, 0, PRESENT)], wide=False),
        # Neither here nor in the parent, nor left with the process by a lazy dump.
        pagemap_image(1, [(3, 1, 8)], wide=False),
        pagemap_image(1, [(3, 1, IN_PARENT | PRESENT)], wide=False),
        # Of a later CRIU: what it says of the pages is not known here.
        pagemap_image(1, [(3, 1, PRESENT | 8)], wide=True),
        image(0x56084025, numbers(f1=1), b"\xff\xff"),
    ]
    for flaw in flaws:
        path.write_bytes(flaw)
        with pytest.raises(DestinationError, match=r"pagemap-5\.img"):
            read_pagemap(path)
    path.write_bytes(good)
    with pytest.raises(DestinationError, match="not the image"):
        read_vmas(path)
    with pytest.raises(DestinationError, match="No such file"):
        read_vmas(tmp_path / "mm-5.img")


def test_areas_that_may_be_lazy(tmp_path: Path) -> None:
    path = tmp_path / "mm-5.img"
    # Growing downwards, without reserve, a heap, a stack: no matter.
    good = [ANONYMOUS, (0x122, 0x203), (0x4022, 0x221)]
    kinds = [*good, *EAGER]
    areas = [(BASE + n * PAGE, BASE + (n + 1) * PAGE, *kind) for n, kind in enumerate(kinds)]
    path.write_bytes(mm_image([*areas, (BASE, BASE + PAGE, 0, 0x10000)]))
    vmas = read_vmas(path)
    assert [tuple(vma) for vma in vmas] == areas
    assert [vma.lazy for vma in vmas] == [True] * len(good) + [False] * len(EAGER)


def test_pagemaps_of_before_there_were_flags(tmp_path: Path) -> None:
    path = tmp_path / "pagemap-5.img"
    entries = [numbers(f1=BASE, f2=2), numbers(f1=BASE + 4 * PAGE, f2=1, f3=1)]
    path.write_bytes(image(0x56084025, numbers(f1=3), *entries))
    assert read_pagemap(path) == Pagemap(3, [(BASE, 2, PRESENT), (BASE + 4 * PAGE, 1, IN_PARENT)])


@pytest.mark.parametrize("wide", [False, True])
def test_a_pagemap_is_written_as_it_was_read(tmp_path: Path, wide: bool) -> None:
    path = tmp_path / "pagemap-5.img"
    data = pagemap_image(300, [(0, 1, 6), (1, 1 << 20, 4), ((1 << 20) + 5, 9, 3)], wide=wide)
    path.write_bytes(data)
    pagemap = read_pagemap(path)
    assert pagemap.format is (PageFormat.WIDE if wide else PageFormat.NARROW)
    write_pagemap(path, pagemap)
    assert path.read_bytes() == data


@pytest.mark.parametrize("wanted", PageFormat)
def test_page_maps_are_converted_to_either_format(tmp_path: Path, wanted: PageFormat) -> None:
    pieces = [(0, 1, 6), (1, 1 << 20, 4), ((1 << 20) + 5, 9, 3), ((1 << 20) + 20, 2, LAZY)]
    for wide in (False, True):
        for name in ("pagemap-5.img", "pagemap-shmem-7.img"):
            (tmp_path / name).write_bytes(pagemap_image(300, pieces, wide=wide))
        (tmp_path / "pages-300.img").write_bytes(b"none of a page map's business")
        for _ in range(2):
            convert_page_maps(tmp_path, wanted)
            for path in page_maps(tmp_path):
                found = path.read_bytes()
                assert found == pagemap_image(300, pieces, wide=wanted is PageFormat.WIDE)
        assert len(list(tmp_path.iterdir())) == 3
