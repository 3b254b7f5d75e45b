"""Makes the last images of a chain fit for a lazy restore, and says which pages it leaves out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from phaul_runtime.errors import DestinationError
from phaul_runtime.memory.fill_plan import PAGE, FillPlan, Runs
from phaul_runtime.memory.page_index import PageIndex
from phaul_runtime.memory.pagemap import (
    IN_PARENT,
    LAZY,
    Entry,
    Vma,
    is_remote,
    pagemap_path,
    processes,
    read_pagemap,
    read_vmas,
    write_pagemap,
)

_FULL = ".full"
MAP = "remote.map"
"""Beside the file of pages that come over the network: which are there, a byte each."""


def plan_lazy(index: PageIndex, images_dir: Path, remote: Path | None = None) -> FillPlan:
    """Mark in the page maps what may be lazy, and plan it; may be repeated.

    The directory is added to the index if it is not yet. Its small images (`mm-*`) must be there.
    `criu restore --lazy-pages` then neither reads nor looks up a page that is marked, and a
    restore without that option reads all as before: marks change no place of a page. A page that
    CRIU dumped as not lazy (a thread's stack pointer is in it) stays so.

    Args:
        index: of the chain.
        images_dir: the last of it.
        remote: where the pages come that the dump left with the process, in the order of
            `postcopy.pages.RemotePages`; which of them are there stands beside it. None: there
            must be none.

    Raises:
        DestinationError: an image is missing or malformed, or a page is in no file of the chain:
            it would become zero in silence; or one that was left with the process may not be
            lazy. Page maps of some processes may be marked then.
    """
    index.add(images_dir)
    plan = FillPlan(index.files)
    file = -1 if remote is None else len(plan.files)
    far = _Far(file)
    for pid in processes(images_dir):
        path = pagemap_path(images_dir, pid)
        pagemap = read_pagemap(path)
        vmas = read_vmas(images_dir / f"mm-{pid}.img")
        entries = list(_marked(pid, pagemap.entries, vmas))
        plan.tasks[pid] = _lazy_runs(pid, entries, index.runs(pid), far)
        if entries != pagemap.entries:
            _keep(path)
            pagemap.entries = entries
            write_pagemap(path, pagemap)
    if remote is not None and far.pages:
        plan.files.append(str(remote))
        plan.remote, plan.remote_file = str(remote.with_name(MAP)), file
        plan.remote_pages = far.pages
    return plan


@dataclass
class _Far:
    """How many pages that were left with their process came before, and the file for them."""

    file: int
    pages: int = 0


def restore_full(images_dir: Path) -> None:
    """Put back the page maps as CRIU wrote them; idempotent.

    Raises:
        DestinationError: the directory cannot be read or written.
    """
    for pid in processes(images_dir):
        path = pagemap_path(images_dir, pid)
        kept = path.with_name(path.name + _FULL)
        try:
            if kept.exists():
                kept.replace(path)
        except OSError as error:
            raise DestinationError(f"cannot put back {path}: {error.strerror}") from error


def _keep(path: Path) -> None:
    try:
        os.link(path, path.with_name(path.name + _FULL))
    except FileExistsError:
        return  # an earlier attempt's: the original
    except OSError as error:
        raise DestinationError(f"cannot keep {path}: {error.strerror}") from error


def _marked(pid: int, entries: list[Entry], vmas: list[Vma]) -> Iterator[Entry]:
    """The entries, split where areas begin and end, flagged lazy where they may be."""
    areas = [(vma.start, vma.end, vma.lazy) for vma in vmas]
    areas.append((1 << 64, 1 << 64, False))
    at = 0
    for vaddr, pages, flags in entries:
        begin, behind = vaddr, vaddr + pages * PAGE
        eager = flags & ~LAZY
        # What CRIU itself marks in its dump; what is in the parent it leaves to the reader.
        may = flags & LAZY or flags & IN_PARENT
        while begin < behind:
            while areas[at][1] <= begin:
                at += 1
            start, end, lazy = areas[at]
            # Outside of all areas CRIU will refuse it, as it would have.
            end, lazy = (end, lazy) if start <= begin else (start, False)
            end = min(end, behind)
            if not lazy and is_remote(flags):
                raise DestinationError(
                    f"process {pid}: the page at {begin:#x} was left with the process, and its "
                    "area cannot be lazy"
                )
            yield begin, (end - begin) // PAGE, eager | LAZY if lazy and may else eager
            begin = end


def _lazy_runs(pid: int, entries: list[Entry], known: Runs, far: _Far) -> Runs:
    runs, at = Runs(), 0
    for vaddr, pages, flags in entries:
        if not flags & LAZY:
            continue
        if is_remote(flags):
            if far.file < 0:
                raise DestinationError(f"process {pid}: no image has the page at {vaddr:#x}")
            runs.add(vaddr, pages, far.file, far.pages * PAGE)
            far.pages += pages
            continue
        found, at = runs.copy(known, vaddr, vaddr + pages * PAGE, at)
        if found != pages:
            missing = _first_missing(known, vaddr)
            raise DestinationError(f"process {pid}: no image has the page at {missing:#x}")
    return runs


def _first_missing(known: Runs, vaddr: int) -> int:
    for number in range(known.find(vaddr), len(known)):
        run = known[number]
        if run.vaddr > vaddr:
            break
        vaddr = run.vaddr + run.pages * PAGE
    return vaddr
