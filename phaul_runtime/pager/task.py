"""The processes that get pages, and what becomes of each page that one of them misses.

What changes here stands in the journal too, if it is not read from there: by an event of the
kernel's, or by a note that is made together with the change. So a twin has the same afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

from phaul_runtime.pager import uffd
from phaul_runtime.pager.account import Account, Fate
from phaul_runtime.pager.missing_ranges import MissingRanges
from phaul_runtime.pager.shared_log import Kind, Record, SharedLog
from phaul_runtime.pager.smaps import area_at
from phaul_runtime.pager.uffd import PAGE


@dataclass
class Task:
    """One userfaultfd, and what its process misses.

    Attributes:
        fd: -1 once there is nothing more to do for it.
        space: what it misses.
        pid: as CRIU's images name it; of a forked child its parent's.
        host: its pid on this host; 0: not known, as of all forked children.
        forked: it came with a fork; otherwise CRIU handed it over.
        late: ranges that were registered while it ran: what is there was touched before.
    """

    fd: int
    space: MissingRanges
    pid: int = 0
    host: int = 0
    forked: bool = False
    late: list[tuple[int, int]] = field(default_factory=list)

    def was_late(self, address: int) -> bool:
        """Whether an address is in one of `late`."""
        return any(start <= address < end for start, end in self.late)


class Tasks(list[Task]):
    """All tasks, by the number that they have in the journal.

    Args:
        changed: called when somebody misses other pages than before.

    Attributes:
        journal: since the twin's birth.
        account: what became of pages.
    """

    def __init__(self, changed: Callable[[], object]) -> None:
        super().__init__()
        self._changed = changed
        self.journal = SharedLog()
        self.account = Account()

    def forget(self) -> None:
        """The attempt failed: nothing of it runs."""
        self.clear()
        self.account = Account()

    def add(self, task: Task) -> None:
        """One more."""
        self.append(task)
        self.account.owe(task.space.missing // PAGE)

    @property
    def missing(self) -> int:
        """Pages that are missing now."""
        return sum(task.space.missing for task in self) // PAGE

    def apply(self, index: int, body: bytes) -> int:
        """What a process did to its memory; the index of a forked child's task, or -1."""
        event, space = body[0], self[index].space
        self._changed()
        if event == uffd.EVENT_FORK:
            (fd,) = uffd.FORK.unpack_from(body)
            task = self[index]
            self.add(Task(fd, space.copy(), task.pid, forked=True, late=[*task.late]))
            return len(self) - 1
        if event == uffd.EVENT_REMAP:
            start, to, size = uffd.REMAP.unpack_from(body)
            self._count(index, Fate.DROPPED, to, space.move(start, to, size))
        elif event in (uffd.EVENT_REMOVE, uffd.EVENT_UNMAP):
            start, end = uffd.REMOVE.unpack_from(body)
            self._take(index, start, end, Fate.DROPPED)
        return -1

    def replay(self, record: Record) -> None:
        """What a note of the dead one's tells; other records are nothing to this."""
        kind, index, _ = record
        if kind == Kind.SETTLED:
            self._take(index, *record.range, Fate(record.fate))
        elif kind == Kind.ENDED:
            self._ended(index)
        elif kind == Kind.KNOWN:
            self[index].host = record.range[0]
        elif kind == Kind.LATE:
            self._late(index, *record.range)

    def settle(self, index: int, start: int, size: int, fate: Fate) -> None:
        """Nothing of a range is missing any more."""
        self._take(index, start, start + size, fate)
        self.journal.settled(index, start, start + size, fate)
        self._changed()

    def settle_present(self, index: int, address: int) -> None:
        """A missing page is there."""
        late = self[index].was_late(address)
        self.settle(index, address, PAGE, Fate.UNSURE if late else Fate.PRESENT)

    def settle_absent(self, index: int, address: int) -> bool:
        """A missing page has no area that is registered, and no event has told why.

        Returns:
            Whether it is settled; otherwise its area is registered now: try again.
        """
        task = self[index]
        if task.forked:
            # Its parent may have left an area out of the fork, which nobody announces.
            self.settle(index, address, PAGE, Fate.UNSHARED)
            return True
        area = None
        if task.host and not task.was_late(address):
            with contextlib.suppress(OSError):
                area = area_at(task.host, address)
        # Not if it is another's memory too: that is no place for a page of this process.
        if area is not None and area.private:
            # Noted before it is done: the other process must know that it was.
            self.journal.note(Kind.LATE, index, area.start, area.end)
            self._late(index, area.start, area.end)
            if not uffd.register(task.fd, area.start, area.end - area.start):
                return False
        self.settle(index, address, PAGE, Fate.GONE)
        return True

    def know(self, index: int, host: int) -> None:
        """Which pid a task has on this host."""
        if self[index].host != host:
            self.journal.note(Kind.KNOWN, index, host)
            self[index].host = host

    def end(self, index: int) -> int:
        """There is nothing more to do for a task; returns its descriptor, to be closed."""
        self.journal.note(Kind.ENDED, index)
        return self._ended(index)

    def _take(self, index: int, start: int, end: int, fate: Fate) -> None:
        self._count(index, fate, start, self[index].space.drop(start, end))

    def _count(self, index: int, fate: Fate, start: int, size: int) -> None:
        self.account.settle(fate, size // PAGE, self[index].pid, start)

    def _late(self, index: int, start: int, end: int) -> None:
        task = self[index]
        task.late.append((start, end))
        pages = sum(high - low for low, high in task.space.between(start, end)) // PAGE
        self.account.late(task.pid, start, pages)

    def _ended(self, index: int) -> int:
        task = self[index]
        self._count(index, Fate.ENDED, 0, task.space.missing)
        fd, task.fd, task.space = task.fd, -1, MissingRanges()
        return fd


__all__ = ["Task", "Tasks"]
