"""Pages that are in no image: their numbers, their store, a plan of them."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phaul_runtime.errors import DestinationError
from phaul_runtime.memory.fill_plan import PAGE, FillPlan
from phaul_runtime.memory.mark_lazy import plan_lazy
from phaul_runtime.memory.page_index import PageIndex
from phaul_runtime.memory.pagemap import IN_PARENT, LAZY, PRESENT, Entry, Pagemap, write_pagemap
from phaul_runtime.postcopy.pages import RemotePages
from phaul_runtime.postcopy.store import PageStore

BASE = 0x7F12_3456_7000


def varint(number: int) -> bytes:
    out = b""
    while number > 0x7F:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + bytes([number])


def mm_image(areas: list[tuple[int, int, int, int]]) -> bytes:
    mm = b""
    for first, behind, flags, status in areas:
        fields = ((1, BASE + first * PAGE), (2, BASE + behind * PAGE), (6, flags), (7, status))
        vma = b"".join(varint(number << 3) + varint(value) for number, value in fields)
        mm += varint(14 << 3 | 2) + varint(len(vma)) + vma
    return struct.pack("<III", 0x54564319, 0x57492820, len(mm)) + mm


def directory(wdir: Path, number: int, tasks: dict[int, list[Entry]]) -> Path:
    """Page maps by page number; one area in two parts, both of which may be lazy."""
    images_dir = wdir / str(number)
    images_dir.mkdir()
    if number > 1:
        (images_dir / "parent").symlink_to(f"../{number - 1}")
    for pid, pieces in tasks.items():
        entries = [(BASE + first * PAGE, count, flags) for first, count, flags in pieces]
        write_pagemap(images_dir / f"pagemap-{pid}.img", Pagemap(pid, entries))
        here = sum(count for _, count, flags in pieces if flags & PRESENT)
        data = b"".join(bytes([number, at]) * (PAGE // 2) for at in range(here))
        (images_dir / f"pages-{pid}.img").write_bytes(data)
        areas = [(0, 6, 0x22, 0x201), (6, 40, 0x22, 0x201)]
        (images_dir / f"mm-{pid}.img").write_bytes(mm_image(areas))
    return images_dir


def test_the_numbers_count_through_runs_and_marks_change_nothing(tmp_path: Path) -> None:
    directory(tmp_path, 1, {7: [(0, 20, PRESENT)], 9: [(0, 3, PRESENT)]})
    last = directory(
        tmp_path,
        2,
        {
            9: [(0, 2, IN_PARENT), (2, 3, LAZY)],
            7: [(0, 1, PRESENT | LAZY), (4, 4, LAZY), (8, 2, LAZY), (10, 2, IN_PARENT), (12, 1, 2)],
        },
    )
    before = RemotePages.of(last)
    assert before.runs == [
        (7, BASE + 4 * PAGE, 6),
        (7, BASE + 12 * PAGE, 1),
        (9, BASE + 2 * PAGE, 3),
    ]
    assert before.total == 10
    assert list(before.pieces(5, 4)) == [
        (7, BASE + 9 * PAGE, 1),
        (7, BASE + 12 * PAGE, 1),
        (9, BASE + 2 * PAGE, 2),
    ]
    assert list(before.pieces(10, 0)) == []
    with pytest.raises(ValueError, match="no pages"):
        list(before.pieces(9, 2))

    index = PageIndex()
    index.add(tmp_path / "1")
    plan = plan_lazy(index, last, tmp_path / "remote.pages")
    plan.save(tmp_path / "plan")
    plan = FillPlan.load(tmp_path / "plan")
    assert (last / "pagemap-7.img.full").exists()
    assert RemotePages.of(last) == before
    assert plan.remote == str(tmp_path / "remote.map")
    assert plan.remote_pages == 10
    assert plan.files[plan.remote_file] == str(tmp_path / "remote.pages")
    far = [
        (pid, vaddr, pages, offset)
        for pid, runs in sorted(plan.tasks.items())
        for vaddr, pages, file, offset in runs
        if file == plan.remote_file
    ]
    assert far == [
        (7, BASE + 4 * PAGE, 6, 0),
        (7, BASE + 12 * PAGE, 1, 6 * PAGE),
        (9, BASE + 2 * PAGE, 3, 7 * PAGE),
    ]
    # An older copy of a page that was left with the process is not that page.
    assert index.runs(7).pages == 3
    again = plan_lazy(index, last, tmp_path / "remote.pages")
    assert {pid: runs.to_bytes() for pid, runs in again.tasks.items()} == {
        pid: runs.to_bytes() for pid, runs in plan.tasks.items()
    }


def test_without_pages_that_were_left_there_is_no_such_file(tmp_path: Path) -> None:
    last = directory(tmp_path, 1, {7: [(0, 20, PRESENT | LAZY)]})
    plan = plan_lazy(PageIndex(), last, tmp_path / "remote.pages")
    assert (plan.remote, plan.remote_file, len(plan.files)) == ("", -1, 1)
    assert RemotePages.of(last).total == 0


def test_a_page_that_was_left_and_cannot_come_is_refused(tmp_path: Path) -> None:
    last = directory(tmp_path, 1, {7: [(0, 2, PRESENT), (3, 2, LAZY)]})
    with pytest.raises(DestinationError, match=f"no image has the page at {BASE + 3 * PAGE:#x}"):
        plan_lazy(PageIndex(), last)
    areas = [(0, 4, 0x22, 0x201), (4, 9, 0x2022, 0x201)]
    (last / "mm-7.img").write_bytes(mm_image(areas))
    with pytest.raises(DestinationError, match=f"{BASE + 4 * PAGE:#x} .*cannot be lazy"):
        plan_lazy(PageIndex(), last, tmp_path / "remote.pages")


def test_a_plan_with_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    FillPlan(["/a"], {}, "/remote.map", 1).save(tmp_path / "plan")
    with pytest.raises(DestinationError, match="cannot read the plan"):
        FillPlan.load(tmp_path / "plan")


@given(st.integers(0, 60), st.data())
def test_the_store_as_the_model(
    tmp_path_factory: pytest.TempPathFactory, pages: int, data: st.DataObject
) -> None:
    place = tmp_path_factory.mktemp("store")
    store, model = PageStore.create(place, pages), dict.fromkeys(range(pages), 0)
    assert store.complete == (pages == 0)
    for step in range(1, data.draw(st.integers(0, 8)) + 1):
        first = data.draw(st.integers(0, pages))
        count = data.draw(st.integers(0, pages - first))
        store.put(first, bytes([step]) * count * PAGE)
        model.update((page, step) for page in range(first, first + count))
        if data.draw(st.booleans()):
            store.close()
            store = PageStore.open(place)
        lacking = {page for first, n in store.missing() for page in range(first, first + n)}
        assert lacking == {page for page, content in model.items() if not content}
        assert store.missing_pages == len(lacking)
        assert store.total == pages
        assert store.flags() == bytes(min(1, content) for content in model.values())
    wanted = b"".join(bytes([content]) * PAGE for content in model.values())
    assert (place / "remote.pages").read_bytes() == wanted
    store.close()
    store.close()


def test_the_store_refuses_what_has_no_place(tmp_path: Path) -> None:
    with pytest.raises(DestinationError, match="No such file"):
        PageStore.open(tmp_path)
    store = PageStore.create(tmp_path, 4)
    for name in ("remote.pages", "remote.map"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "remote.pages").stat().st_blocks * 512 == 4 * PAGE
    for first, size in ((3, 2 * PAGE), (-1, PAGE), (0, 100), (5, 0)):
        with pytest.raises(DestinationError, match="no place"):
            store.put(first, bytes(size))
    assert store.missing() == [(0, 4)]
    store.close()
    with pytest.raises(DestinationError, match="closed"):
        store.put(0, bytes(PAGE))
    os.truncate(tmp_path / "remote.pages", PAGE)
    with pytest.raises(DestinationError, match="cut short"):
        PageStore.open(tmp_path)
    with pytest.raises(DestinationError, match="cannot make"):
        PageStore.create(tmp_path / "nowhere", 1)
