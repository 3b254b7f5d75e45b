"""The store of pages that come after the commit has its room before."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from phaul_runtime.errors import DestinationError
from phaul_runtime.memory.fill_plan import PAGE
from phaul_runtime.memory.preallocate import Preallocation
from phaul_runtime.postcopy.store import PageStore

PAGES = 256


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A memory file system with room for twice the pages."""
    argv = ["mount", "-t", "tmpfs", "-o", f"size={2 * PAGES * PAGE}", "none", str(tmp_path)]
    if subprocess.run(argv, check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def fill(place: Path) -> None:
    there = os.statvfs(place)
    (place / "fill").write_bytes(bytes(there.f_bavail * there.f_frsize))


def hold_all(store: PageStore) -> None:
    for page in range(PAGES):
        store.put(page, bytes([page]) * PAGE)
    assert store.complete
    store.close()


def test_what_fills_the_file_system_later_is_in_nobodys_way(small: Path) -> None:
    store = PageStore.create(small, PAGES)
    fill(small)
    hold_all(store)


def test_a_full_file_system_is_told_before_the_commit(small: Path) -> None:
    fill(small)
    with pytest.raises(DestinationError, match="No space left on device"):
        PageStore.create(small, PAGES)


@pytest.mark.parametrize("expected", [PAGES - 7, PAGES, PAGES + 9])
def test_room_that_was_made_ahead_is_used(small: Path, expected: int) -> None:
    room = Preallocation(small / "late.img", expected * PAGE)
    room.begin()
    assert room.claim()
    while room.allocated < expected * PAGE:
        assert room.step()
    store = PageStore.create(small, PAGES, room)
    room.drop()
    there = os.statvfs(small)
    assert not (small / "late.img").exists()
    # Exactly what is needed, and the map beside it.
    assert there.f_blocks - there.f_bfree == PAGES + 1
    fill(small)
    hold_all(store)
