"""Before a restored tree runs: whatever is planned for it can be served, and nothing is there yet.

CRIU's restorer leaves out an area when it registers the others, if it mapped that one beforehand
where it belongs (`vma_remap`: source and destination are the same, criu/pie/restorer.c, v4.1.1 to
v4.2). Nobody can fill a page of such an area, and nobody waits for one: it reads as zeros. While
CRIU holds the tree everything is mapped, and registered as far as it ever will be. So now the
kernel is asked (/proc/PID/smaps, `um`), and what is not registered is: a userfaultfd does that from
outside, too.

A planned page that is there already, put there by the kernel for somebody's writing, would be left
alone by a copy: it is overwritten with what it must hold (/proc/PID/mem). Where that is still at
the source it has to come first.

All of it may be repeated, by another process as well: each time it looks at everything anew.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from phaul_runtime.errors import DestinationError
from phaul_runtime.pager import smaps, uffd
from phaul_runtime.pager.account import Fate
from phaul_runtime.pager.missing_ranges import MissingRanges
from phaul_runtime.pager.network_pages import NetworkPages
from phaul_runtime.pager.smaps import Area, areas, present
from phaul_runtime.pager.task import Task, Tasks
from phaul_runtime.pager.uffd import PAGE

# Ranges so near to each other are looked at in one go.
_NEAR = 2 << 20
_ALL = 1 << 64


@dataclass
class Verified:
    """What was found and done.

    Attributes:
        registered: areas that CRIU had left out.
        overwritten: pages that were there, and hold now what they must.
        wants: pages that are there and whose content is still at the source, by number.
        again: there was too much to do for one go.
    """

    registered: int = 0
    overwritten: int = 0
    wants: set[int] = field(default_factory=set)
    again: bool = False

    @property
    def pending(self) -> bool:
        """Whether to come again."""
        return self.again or bool(self.wants)

    def add(self, other: Verified) -> None:
        """One more process."""
        self.registered += other.registered
        self.overwritten += other.overwritten
        self.wants |= other.wants
        self.again |= other.again


def missing_and_there(pid: int, space: MissingRanges, area: Area) -> list[int]:
    """Pages of an area that are missing by the plan, and there all the same.

    Raises:
        OSError: as `present`.
    """
    ranges: list[tuple[int, int]] = []
    for start, end in space.between(area.start, area.end):
        if ranges and start - ranges[-1][1] <= _NEAR:
            ranges[-1] = ranges[-1][0], end
        else:
            ranges.append((start, end))
    return [address for address in present(pid, ranges) if space.find(address) is not None]


class Verifying:
    """One held task, made fit to run: all that is planned for it can be served.

    Args:
        task: handed by CRIU, which holds it.
        host: its pid on this host.
        remote: what of the plan's pages is here.
        filled: told the address of each page that was overwritten; False ends this go.
    """

    def __init__(
        self, task: Task, host: int, remote: NetworkPages | None, filled: Callable[[int], bool]
    ) -> None:
        self._task = task
        self._host = host
        self._remote = remote
        self._filled = filled
        self._done = Verified()

    def run(self) -> Verified:
        """Look, and do what is to be done.

        Raises:
            DestinationError: it cannot be made fit.
        """
        done = self._done
        try:
            while True:
                left = self._look()
                if done.pending or not left:
                    return done
                if done.registered:
                    raise self._error(left[0].start, "does not stay registered")
                for area in left:
                    code = uffd.register(self._task.fd, area.start, area.end - area.start)
                    if code:
                        why = f"cannot be registered: {os.strerror(code)}"
                        raise self._error(area.start, why)
                    done.registered += 1
                # What was registered just now is looked at once more.
        except OSError as error:
            raise DestinationError(
                f"the memory of process {self._task.pid}, {self._host} on this host, cannot be "
                f"verified: {error.strerror or error}"
            ) from error

    def _error(self, address: int, what: str) -> DestinationError:
        return DestinationError(f"the area at {address:#x} of process {self._task.pid} {what}")

    def _look(self) -> list[Area]:
        """Overwrite what is there already; returns areas that are not registered."""
        left: list[Area] = []
        space, behind = self._task.space, 0
        for area in [*areas(self._host), Area(_ALL, _ALL, False, False, False)]:
            lacking = space.first(behind, area.start)
            behind = area.end
            if lacking is not None:
                raise self._error(lacking, "does not exist")
            first = space.first(area.start, area.end)
            if first is None:
                continue
            if not area.private:
                raise self._error(first, "is not its own alone")
            if not area.registered:
                left.append(area)
            if area.touched and not self._done.again:
                self._overwrite(area)
        return left

    def _overwrite(self, area: Area) -> None:
        done, remote, memory = self._done, self._remote, -1
        try:
            for address in missing_and_there(self._host, self._task.space, area):
                _, source = self._task.space.find(address) or (0, 0)
                if remote is not None and remote.holds(source) and not remote.here(source, PAGE):
                    done.wants.add(remote.page(source))
                    continue
                if memory < 0:
                    memory = os.open(
                        smaps.PROC / str(self._host) / "mem", os.O_WRONLY | os.O_CLOEXEC
                    )
                # Rights of the area do not matter to it; the page is there: nothing faults.
                if os.pwrite(memory, ctypes.string_at(source, PAGE), address) != PAGE:
                    raise OSError(f"the page at {address:#x} cannot be written")
                done.overwritten += 1
                if not self._filled(address):
                    done.again = True
                    return
        finally:
            if memory >= 0:
                os.close(memory)


def verify(tasks: Tasks, pids: Mapping[int, int], remote: NetworkPages | None) -> Verified:
    """See that all that is planned for the tasks of a held tree can be served, or make it so.

    Args:
        tasks: as CRIU handed them over.
        pids: those of this host by those of the images.
        remote: what of the plan's pages is here.

    Raises:
        DestinationError: it cannot be.
    """
    total = Verified()
    for index, task in enumerate(tasks):
        if task.forked or task.fd < 0 or not task.space:
            continue
        if tasks.journal.full:
            # The twin is made anew between two goes.
            total.again = True
            break
        host = pids.get(task.pid, 0)
        if not host:
            raise DestinationError(f"process {task.pid} is not below the restored root")
        tasks.know(index, host)

        def filled(address: int, index: int = index) -> bool:
            tasks.settle(index, address, PAGE, Fate.FILLED)
            return not tasks.journal.full

        total.add(Verifying(task, host, remote, filled).run())
    return total


__all__ = [
    "Verified",
    "Verifying",
    "missing_and_there",
    "verify",
]
