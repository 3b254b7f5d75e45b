"""Answering page faults and filling what is missing: one task's page, or one piece, at a time.

Before CRIU has finished only faults are served: the restorer may touch lazy memory, but until a
task has registered its areas, a page of them cannot be told from one that is gone. Afterwards the
rest is filled in pieces of `CHUNK`: a fault waits for one piece at most. A fault brings `WINDOW`.

A page that comes over the network (`network_pages`) is filled once it is here, and so is the fault
that waits for it.
"""

from __future__ import annotations

import errno
import math
import os
import time

from phaul_runtime.pager import uffd
from phaul_runtime.pager.account import Fate
from phaul_runtime.pager.network_pages import NetworkPages, Sweep, Waiting, found_missing
from phaul_runtime.pager.poller import Poller
from phaul_runtime.pager.shared_log import FAULTS, RUNNING, STAGE, WORST_NS, Board, Kind
from phaul_runtime.pager.task import Task, Tasks
from phaul_runtime.pager.uffd import PAGE

CHUNK = 128 * PAGE
WINDOW = 32 * PAGE
_EVENTS_AT_ONCE = 16
_BACK_OFF_MS = 1
_TROUBLE_MS = 100
# Who waits for the network is asked now and then whether it still lives.
_ALIVE_S = 1.0


class Filler:
    """What is done for the tasks' memory.

    Args:
        board: of both processes of the pager.
        poller: that has the tasks' userfaultfds.
        pause_ms: between two pieces of the filling, milliseconds.

    Attributes:
        tasks: whose pages are missing.
        remote: the pages of the plan that are not here from the beginning; None before a plan, and
            where there are none.
        deferred: faults that are to be answered again: task, address, since when (monotonic, ns).
        waiting: faults that wait for the network.
        back_off_ms: how long the next turn of the loop may sleep.
        looked_ns: when the loop last looked for faults.
        trouble: the last thing that went wrong; empty if nothing has.
    """

    def __init__(self, board: Board, poller: Poller, pause_ms: int) -> None:
        self.tasks = Tasks(self._look_again)
        self.remote: NetworkPages | None = None
        self.deferred: list[tuple[int, int, int]] = []
        self.waiting = Waiting()
        self.back_off_ms = 0
        self.looked_ns = 0
        self.trouble = ""
        self._board = board
        self._poller = poller
        self._pause_ms = pause_ms
        self._sweep = Sweep()
        self._ask_alive_at = 0.0

    def _look_again(self) -> None:
        self.waiting.due = True

    def forget(self) -> None:
        """The restore failed: nothing of it runs."""
        self.tasks.forget()
        self.deferred = []
        self.waiting.clear()
        self._sweep = Sweep()

    def inherit(self, now: int) -> None:
        """Put off every fault that was read from the journal and may not be answered yet.

        A fault that does not wait for the network was answered by the dead process, or would have
        been now: it has waited since `now` (monotonic, ns).
        """
        old = self.deferred + self.waiting.ended(self.tasks, self.remote)
        self.deferred = [
            (index, address, since if self._lacks(index, address) else now)
            for index, address, since in old
        ]

    def watch_task(self, index: int, task: Task) -> None:
        """Hear what the kernel says of a task, unless it is done."""
        if task.fd >= 0:
            self._poller.watch(task.fd, lambda _fd: self._events(index, task))

    def _events(self, index: int, task: Task) -> None:
        """Read and answer what the kernel says of one task, a few words at a time."""
        journal = self.tasks.journal
        for _ in range(_EVENTS_AT_ONCE):
            if task.fd < 0 or journal.full:
                return
            journal.expect(Kind.EVENT, index)
            message = journal.message
            try:
                size = os.readv(task.fd, [message])
            except BlockingIOError:
                return
            except OSError as error:
                self._note_trouble("read", error.errno or 0)
                return
            if size != uffd.MESSAGE_SIZE:
                return
            if message[0] == uffd.EVENT_PAGEFAULT:
                address = uffd.ADDRESS.unpack_from(message)[0] & -PAGE
                self._board[FAULTS] += 1
                if not self._fault(index, task, address, self.looked_ns):
                    # Something else is to be read first, which must not go over it.
                    journal.keep(self.looked_ns)
            else:
                body = bytes(message)
                journal.keep()
                fork = self.tasks.apply(index, body)
                if fork >= 0:
                    self.watch_task(fork, self.tasks[fork])

    def again(self) -> None:
        """Try the faults that were put off."""
        deferred, self.deferred = self.deferred, []
        for index, address, since in deferred:
            if self.tasks[index].fd >= 0:
                self._fault(index, self.tasks[index], address, since)
        if self.deferred:
            self.back_off_ms = max(self.back_off_ms, _BACK_OFF_MS)

    def look_at_remote(self) -> None:
        """Answer those that do not wait for the network any more, ask for the others' pages."""
        waiting = self.waiting
        if waiting.due:
            self._sweep.wake()
            for index, address, since in waiting.ended(self.tasks, self.remote):
                if self.tasks[index].fd >= 0:
                    self._fault(index, self.tasks[index], address, since)
        if waiting:
            waiting.ask(self.tasks, self.remote)

    def _fault(self, index: int, task: Task, address: int, since: int) -> bool:
        """Answer a page fault or put it off; False if it is put off and was not before."""
        if self._lacks(index, address):
            return not self.waiting.add(index, address, since)
        if self._answer(index, task, address):
            self._answered(since)
            return True
        self.deferred.append((index, address, since))
        return False

    def _answered(self, since: int) -> None:
        """Keep the longest that a fault can have waited: since before it was looked for."""
        board = self._board
        board[WORST_NS] = max(board[WORST_NS], time.monotonic_ns() - since)

    def _answer(self, index: int, task: Task, address: int) -> bool:
        """Answer a page fault; False if it has to wait."""
        fd = task.fd
        found = task.space.find(address)
        if found is None:
            code = uffd.zero(fd, address)
        else:
            size = found[0] - address
            if size > PAGE:
                most = WINDOW if self._board[STAGE] == RUNNING else PAGE
                size = min(size, most)
            if self.remote is not None and self.remote.holds(found[1]):
                # At least its own page is here (`_fault`).
                size = self.remote.here(found[1], size)
            done, code = uffd.copy(fd, address, found[1], size)
            if code == errno.ENOENT and size > PAGE:
                # The run goes on in another area, or where none is any more.
                done, code = uffd.copy(fd, address, found[1], PAGE)
            if done:
                self.tasks.settle(index, address, done, Fate.FILLED)
                return True
            if code == errno.EEXIST:
                self.tasks.settle_present(index, address)
            elif code == errno.ENOENT and not self.tasks.settle_absent(index, address):
                return False
        if not code:
            return True
        if code in (errno.EEXIST, errno.ENOENT):
            # There already, or the area is gone: trying again tells who waits.
            uffd.wake(fd, address)
            return True
        if code == errno.ESRCH:
            self._end(index)
            return True
        if code != errno.EAGAIN:
            self._note_trouble("fault", code)
        return False

    def _lacks(self, index: int, address: int) -> bool:
        return found_missing(self.remote, self.tasks[index].space, address) is not None

    def fill(self) -> None:
        """One piece of what is missing and here."""
        now = time.monotonic()
        if not self._sweep.rest(now):
            found = self._sweep.next(self.tasks, self.remote, now)
            if found is not None:
                index, start, end, source = found
                if start < end:
                    self._fill_task(index, start, min(CHUNK, end - start), source)
                else:
                    # Nothing is missing: no page that it faults on from now on needs us.
                    self._end(index)
                return
        rest = self._sweep.rest(now)
        if rest:
            self._ask_alive(now)
            if not self.deferred:
                self.back_off_ms = math.ceil(rest * 1000)

    def _ask_alive(self, now: float) -> None:
        """Notice by a copy of nothing that a process has ended that only waits for the network."""
        if self.remote is None or now < self._ask_alive_at:
            return
        self._ask_alive_at = now + _ALIVE_S
        for index, task in enumerate(self.tasks):
            if task.fd >= 0 and task.space:
                address, _, _ = task.space.run(0)
                _, code = uffd.copy(task.fd, address, self.remote.nowhere, PAGE)
                if code == errno.ESRCH:
                    self._end(index)

    def _fill_task(self, index: int, start: int, size: int, source: int) -> None:
        task = self.tasks[index]
        while True:
            done, code = uffd.copy(task.fd, start, source, size)
            if code != errno.ENOENT or done or size == PAGE:
                break
            # The run goes on in another area: a copy must lie in one.
            size = size // 2 & -PAGE
        if done:
            self.tasks.settle(index, start, done, Fate.FILLED)
            self.back_off_ms = self._pause_ms
        elif code == errno.EEXIST:
            self.tasks.settle_present(index, start)
        elif code == errno.ENOENT:
            self.tasks.settle_absent(index, start)
        elif code == errno.ESRCH:
            self._end(index)
        elif code == errno.EAGAIN:
            self.back_off_ms = _BACK_OFF_MS
        else:
            self._note_trouble("copy", code)

    def _note_trouble(self, what: str, code: int) -> None:
        """The process waits for its page, which is better than a wrong one; try again."""
        self.trouble = f"{what}: {os.strerror(code)}"
        self.back_off_ms = _TROUBLE_MS

    def _end(self, index: int) -> None:
        self._poller.close(self.tasks.end(index))
