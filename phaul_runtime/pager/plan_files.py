"""A plan's pages files, mapped: they may be removed while the pager works.

One of them may still be written (`network_pages`): its pages count from when its map says so.
"""

from __future__ import annotations

import ctypes
import os
from array import array
from operator import add, le
from pathlib import Path

from phaul_runtime.errors import DestinationError
from phaul_runtime.memory.fill_plan import FillPlan, Runs
from phaul_runtime.pager.missing_ranges import MissingRanges
from phaul_runtime.pager.network_pages import NetworkPages
from phaul_runtime.pager.uffd import PAGE, libc

_PROT_NONE, _PROT_READ = 0, 1
_MAP_SHARED, _MAP_PRIVATE, _MAP_ANONYMOUS = 1, 2, 0x20
_FAILED = ctypes.c_void_p(-1).value

# Not `mmap.mmap`: it keeps a descriptor and hides the address.
_mmap = libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_munmap = libc.munmap
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class PlanFiles:
    """The files of a plan, and what each process misses at its start."""

    def __init__(self, path: Path) -> None:
        plan = FillPlan.load(path)
        self._maps: list[tuple[int, int]] = []
        self._spaces: dict[int, MissingRanges] = {}
        self.remote: NetworkPages | None = None
        """What of the file that is still written is here; None if there is none."""
        try:
            self._files = len(plan.files)
            for number, name in enumerate(plan.files):
                self._maps.append(_map(name, written=number == plan.remote_file))
            if plan.remote:
                self.remote = self._know_remote(plan)
            for pid, runs in plan.tasks.items():
                space = self._place(runs)
                if space is None:
                    raise DestinationError(f"the plan {path} has bad runs of process {pid}")
                self._spaces[pid] = space
        except BaseException:
            self.close()
            raise

    def _know_remote(self, plan: FillPlan) -> NetworkPages:
        base, size = self._maps[plan.remote_file]
        flags, pages = _map(plan.remote, written=True)
        # Behind the files of the plan, to be unmapped with them.
        self._maps.append((flags, pages))
        if pages != plan.remote_pages or size != pages * PAGE:
            raise DestinationError(f"{plan.remote} is not the map of its file")
        nowhere = _mmap(None, PAGE, _PROT_NONE, _MAP_PRIVATE | _MAP_ANONYMOUS, -1, 0)
        if nowhere == _FAILED:
            raise DestinationError("no memory for the map of what comes over the network")
        self._maps.append((int(nowhere), PAGE))
        return NetworkPages(base, flags, pages, int(nowhere))

    def _place(self, runs: Runs) -> MissingRanges | None:
        """The runs with addresses of ours; None if they are not sorted or not in the files."""
        # Whole columns at a time: it happens while the process is frozen.
        numbers = array("Q")
        numbers.frombytes(runs.to_bytes())
        starts, counts, files, offsets = (numbers[at::4].tolist() for at in range(4))
        sizes = [count * PAGE for count in counts]
        ends = list(map(add, starts, sizes))
        if not starts:
            return MissingRanges()
        if max(files) >= self._files:
            return None
        limits = [self._maps[file][1] for file in files]
        if (
            not all(map(le, map(add, offsets, sizes), limits))
            or not all(map(le, ends, starts[1:]))
            or any((start | offset) % PAGE for start, offset in zip(starts, offsets, strict=True))
        ):
            return None
        bases = [self._maps[file][0] for file in files]
        return MissingRanges(starts, ends, list(map(add, bases, offsets)))

    @property
    def pids(self) -> set[int]:
        """The processes that miss something at their start."""
        return {pid for pid, space in self._spaces.items() if space}

    def space(self, pid: int) -> MissingRanges:
        """What a process misses: a copy, as another attempt may begin anew."""
        space = self._spaces.get(pid)
        return MissingRanges() if space is None else space.copy()

    def close(self) -> None:
        """Unmap the files; nothing may be served from them any more. Idempotent."""
        maps, self._maps = self._maps, []
        for base, size in maps:
            if size:
                _munmap(base, size)


def _map(name: str, *, written: bool) -> tuple[int, int]:
    """Address and size of a file in memory; of one that is still written, what it becomes.

    Raises:
        DestinationError: it cannot be mapped.
    """
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size
            if not size:
                return 0, 0
            kind = _MAP_SHARED if written else _MAP_PRIVATE
            base = _mmap(None, size, _PROT_READ, kind, fd, 0)
            if base == _FAILED:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code))
            return int(base), size
        finally:
            os.close(fd)
    except OSError as error:
        raise DestinationError(f"cannot map the pages file {name}: {error.strerror}") from error
