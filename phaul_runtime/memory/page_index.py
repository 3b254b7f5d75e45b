"""Where the newest copy of every page lies in a chain of image directories.

Kept while the source still runs: after the last iteration only its own pages have to be added.
"""

from __future__ import annotations

import os
from pathlib import Path

from phaul_runtime.errors import DestinationError
from phaul_runtime.memory.fill_plan import PAGE, Runs
from phaul_runtime.memory.pagemap import (
    IN_PARENT,
    PRESENT,
    Pagemap,
    pagemap_path,
    processes,
    read_pagemap,
)


class PageIndex:
    """Per process the runs of its pages, as CRIU would read them along the `parent` links.

    A page map lists all pages of its process: here, or in the parent. So a page that it does not
    list is gone, and a process that has none in a directory begins anew in the next. What an
    entry calls in the parent and the parent has not is left out; `plan_lazy` refuses it. Left out
    is, too, what a dump left with the process (`pagemap.is_remote`): no older copy is that page.

    Costs of `add`: the entries of the page maps, and copying the runs that stay (no loop).
    Not for several threads at once.
    """

    def __init__(self) -> None:
        self._files: list[str] = []
        self._tasks: dict[int, Runs] = {}
        self._last = ""

    @classmethod
    def follow(cls, images_dir: Path) -> PageIndex:
        """Index the whole chain that ends in a directory, which was not seen to grow.

        Raises:
            DestinationError: see `add`.
        """
        chain = [os.path.realpath(images_dir)]
        while (parent := _parent(chain[-1])) is not None:
            if parent in chain:
                raise DestinationError(f"{parent} is its own parent")
            chain.append(parent)
        index = cls()
        for directory in reversed(chain):
            index.add(Path(directory))
        return index

    @property
    def files(self) -> list[str]:
        """The pages files that the runs name by their number here, absolute paths."""
        return list(self._files)

    @property
    def pids(self) -> list[int]:
        """The processes of the newest directory."""
        return list(self._tasks)

    def runs(self, pid: int) -> Runs:
        """The pages of a process, not to be changed; none for a process that is not there."""
        return self._tasks.get(pid, Runs())

    def add(self, images_dir: Path) -> None:
        """Take in the next directory, whose page server has ended; the newest again is no change.

        A directory without a parent begins a new chain: what was known is forgotten.

        Raises:
            DestinationError: an image is missing or malformed, or the directory's parent is not
                the newest of this index, which is unchanged then.
        """
        directory = os.path.realpath(images_dir)
        if directory == self._last:
            return
        parent = _parent(directory)
        if parent not in (None, self._last):
            raise DestinationError(f"{directory} continues {parent}, not {self._last or 'nothing'}")
        files = [] if parent is None else self.files
        old = {} if parent is None else self._tasks
        tasks = {}
        for pid in processes(Path(directory)):
            path = pagemap_path(Path(directory), pid)
            pagemap = read_pagemap(path)
            files.append(str(path.with_name(f"pages-{pagemap.pages_id}.img")))
            tasks[pid], size = _merge(old.get(pid, Runs()), pagemap, len(files) - 1)
            _check_size(files[-1], size)
        self._files, self._tasks, self._last = files, tasks, directory


def _merge(old: Runs, pagemap: Pagemap, file: int) -> tuple[Runs, int]:
    """The runs after a page map, and how many bytes its pages file has."""
    runs, offset, at = Runs(), 0, 0
    for vaddr, pages, flags in pagemap.entries:
        size = pages * PAGE
        if flags & PRESENT:
            runs.add(vaddr, pages, file, offset)
            offset += size
        elif flags & IN_PARENT:
            _, at = runs.copy(old, vaddr, vaddr + size, at)
    return runs, offset


def _check_size(path: str, size: int) -> None:
    """A pager that reads behind the end of a file would find out too late."""
    try:
        there = os.stat(path).st_size
    except OSError as error:
        raise DestinationError(f"cannot read {path}: {error.strerror}") from error
    if there < size:
        raise DestinationError(f"{path} is cut short: {there} bytes of {size}")


def _parent(directory: str) -> str | None:
    link = Path(directory, "parent")
    return os.path.realpath(link) if link.is_symlink() else None
