"""The pager's loop: faults first, what the processes do to their memory, filling in between.

Two processes (`fork_twin`) share one table of descriptors. One works, the other only waits for its
death, and then reads the journal, goes on and makes a twin anew. Why no page is ever wrong:

- *A page that the process gave up or moved is not filled with what it held.* The kernel announces
  each unmap, remap, removal (MADV_DONTNEED, MADV_FREE) and fork. From before the change until the
  announcement was read, and its sender has gone on, UFFDIO_COPY does nothing and says EAGAIN. So
  whatever a copy does, it does with everything known that the process had done before.
- *No announcement is lost*: it is read by a system call straight into the shared journal. The
  process goes on only once it was read.
- *No copy of the dead's comes late*: its pidfd becomes readable when it has left the kernel. What
  it did at last is copied again: the page is there (EEXIST) and is left alone; if the process has
  given it up since, that is in the journal or still to be read.
- *A fault that was read and not answered* is the journal's last record, and is answered again.
- *The userfaultfds stay open*, since the table lives: those that come with a fork and those that
  CRIU hands over are in it, and in the journal, by the same system call.
- *Every missing page has somebody who waits for it, or none at all.* Before the tree runs each area
  that is planned is seen to be registered, and no page of it to be there already (`verify`). From
  then on an area can lose its registration only together with an announcement: a copy that says
  ENOENT without one (`Tasks.settle_absent`) is a page that nobody will ever ask for. It is
  registered again if it still is the process's own, and told in any case: never dropped in silence.
- *Every page is accounted for* (`account`): filled, given up, ended, or lost by name. The numbers
  change with the spaces and with the journal, so a death leaves none out and counts none twice.
- *If CRIU's restore is under way*, the words that it still has to say stay in its connection, which
  is in the table too. If both are dead before CRIU says that it is finished, CRIU cannot say it and
  kills what it restored: a loud failure, nothing has run.

The one hole: both die at once after that (a SIGKILL of the whole control group, the host). Then the
processes run on with zeros where pages were missing, as with `criu lazy-pages`. Both are therefore
exempt from the out-of-memory killer and deaf to SIGINT, SIGTERM and SIGHUP. A smaller one:
MADV_GUARD_INSTALL and MADV_GUARD_REMOVE are not announced; a page that was missing under them comes
back with what it held. Another: a forked child's MADV_WIPEONFORK area gets what its parent missed
there, instead of zeros.

How faults are answered and pages filled is in `filling`. Nothing of what comes over the network is
known to one of the two alone: the pages that are here stand in the map, the faults that wait for
more in the journal, and the socket on which more is announced is in the table.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import select
import signal
import time
from collections.abc import Mapping
from pathlib import Path

from phaul_runtime.errors import DestinationError, PhaulError
from phaul_runtime.pager import (
    ARRIVED_SOCKET,
    LAZY_SOCKET,
    RESULT_FILE,
    criu_socket,
    fork_twin,
    uffd,
)
from phaul_runtime.pager.control import Control
from phaul_runtime.pager.filling import Filler
from phaul_runtime.pager.missing_ranges import MissingRanges
from phaul_runtime.pager.network_pages import ASK_MS
from phaul_runtime.pager.plan_files import PlanFiles
from phaul_runtime.pager.poller import Poller
from phaul_runtime.pager.shared_log import (
    CLEAN,
    DONE,
    FAULTS,
    FINISHED_NS,
    HEIR,
    KEEPER,
    LAST_NS,
    LISTENING,
    PLANS,
    RUNNING,
    STAGE,
    STOPPED,
    TAKEN_OVER,
    WORKER,
    WORST_NS,
    Board,
    Kind,
    SharedLog,
)
from phaul_runtime.pager.task import Task
from phaul_runtime.pager.uffd import PAGE
from phaul_runtime.pager.verify import Verified, verify

GRACE_S = 30.0
_TICK_MS = 1000
_RETRY_S = 1.0
# A twin that has read the plan itself is made when the freeze is over.
_RENEW_S = 1.0

_NAMES = ("waiting", "listening", "filling", "done", "stopped")


class _Inherited(Exception):
    """Raised in the twin when the other is dead: the work is its own now."""


class Pager:
    """One pager, in its working directory, which is the current one.

    Args:
        grace_s: how long it waits without an owner and without a restore, seconds.
        keep: have a twin.
        pause_ms: between two pieces of the filling, milliseconds.
    """

    def __init__(self, *, grace_s: float = GRACE_S, keep: bool = True, pause_ms: int = 0) -> None:
        self._grace_s = grace_s
        self._keep = keep
        self._board = Board()
        self._source: PlanFiles | None = None
        self._plans = 0
        self._renew_at = math.inf
        self._pid = 0
        self._connection = -1
        # From the start: a restore may be begun before the plan is here, it is heard only then.
        self._listener = criu_socket.listen(LAZY_SOCKET)
        self._self_fd = self._keeper_fd = -1
        self._generation = 0
        self._stopping = False
        self._retry_at = 0.0
        self._owned_at = time.monotonic()
        self._poller = Poller()
        self._filler = Filler(self._board, self._poller, pause_ms)
        self._tasks = self._filler.tasks
        self._control = Control(self, self._poller)
        self._control.reserve_result(RESULT_FILE)

    # -- life ------------------------------------------------------------------------------

    def run(self) -> None:
        """Work until the last page is in, or nobody wants it any more."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("-1000")
        with contextlib.suppress(OSError, ValueError):
            _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        inherited = False
        while True:
            try:
                self._begin(inherited)
                while not self._over():
                    self._turn()
                break
            except _Inherited:
                inherited = True
        self._finish()

    def _begin(self, inherited: bool) -> None:
        self._poller.clear()
        known = self._control.forget()
        if inherited:
            self._board[TAKEN_OVER] += 1
            # Of the one before this one: ended and closed long since.
            self._keeper_fd = -1
            self._know_plan()
            self._replay()
        self._self_fd = os.pidfd_open(os.getpid())
        self._board[WORKER] = os.getpid()
        if inherited:
            self._adopt({*known, self._self_fd, self._listener, self._filler.waiting.fd})
        self._poller.watch(self._control.listener, self._control.accept)
        self._poller.watch(self._filler.waiting.fd, self._filler.waiting.heard)
        if self._connection >= 0:
            self._poller.watch(self._connection, self._hear)
        elif self._board[STAGE] == LISTENING:
            if self._tasks or self._pid:
                self._reset()
            else:
                self._poller.watch(self._listener, self._accept)
        for index, task in enumerate(self._tasks):
            self._filler.watch_task(index, task)
        self.renew()

    def _know_plan(self) -> None:
        """Read the plan that the dead one has taken since this one was born.

        It was good when it was taken. While it cannot be read, waiting processes wait on.
        """
        since = time.monotonic()
        while self._plans != self._board[PLANS]:
            try:
                self._take(PlanFiles(Path(self._board.path)))
                self._plans = self._board[PLANS]
            except (PhaulError, OSError):
                late = time.monotonic() - since > self._grace_s
                if self._board[STAGE] < RUNNING and late:
                    raise
                time.sleep(_RETRY_S)

    def _take(self, source: PlanFiles) -> None:
        self._source = source
        self._filler.remote = source.remote

    def _replay(self) -> None:
        """Do in memory what the dead one did since this one was born."""
        now = time.monotonic_ns()
        for record in self._journal:
            kind, index, body = record
            if kind == Kind.EVENT:
                if body[0] == uffd.EVENT_PAGEFAULT:
                    address = uffd.ADDRESS.unpack_from(body)[0] & -PAGE
                    self._filler.deferred.append((index, address, record.since or now))
                else:
                    self._tasks.apply(index, body)
            elif kind == Kind.SAID:
                self._said(criu_socket.said(body))
            elif kind == Kind.HANDED:
                self._handed(criu_socket.handed(body))
            elif kind == Kind.RESET:
                self._forget()
            else:
                self._tasks.replay(record)
        self._filler.inherit(now)

    def _forget(self) -> None:
        self._filler.forget()
        self._pid = 0

    @property
    def _journal(self) -> SharedLog:
        return self._tasks.journal

    @_journal.setter
    def _journal(self, journal: SharedLog) -> None:
        self._tasks.journal = journal

    def _adopt(self, known: set[int]) -> None:
        """Sort out the descriptors: what the dead one opened for itself is closed."""
        known |= {0, 1, 2, *(task.fd for task in self._tasks)}
        self._connection = -1
        for name in os.listdir("/proc/self/fd"):
            fd = int(name)
            if fd in known:
                continue
            if self._connection < 0 and criu_socket.is_connection(fd, LAZY_SOCKET):
                self._connection = fd
                continue
            with contextlib.suppress(OSError):
                os.close(fd)

    def renew(self) -> None:
        """Make a twin that knows all that is known now, then end the one before.

        Between the making and the naming as heir nothing is done that would have to stand in a
        journal: whichever of the two is the heir when this one dies, knows all.
        """
        if not self._keep:
            self._journal = SharedLog()
            return
        journal, before = self._journal, self._keeper_fd
        self._renew_at = math.inf
        self._journal = SharedLog()
        generation = self._generation + 1
        try:
            pid = fork_twin.clone()
        except OSError as error:
            self._filler.trouble = f"no twin: {error.strerror}"
            self._retry_at = time.monotonic() + _RETRY_S
            if not journal.full:
                self._journal = journal
                return
            # Better alone for a while than with an heir that does not know all.
            self._board[HEIR] = -1
            if before >= 0:
                self._poller.unwatch(before)
                fork_twin.end(before)
            self._keeper_fd = -1
            return
        if pid == 0:
            self._generation = generation
            self._wait()
        self._generation = generation
        self._board[KEEPER] = pid
        self._board[HEIR] = generation
        if before >= 0:
            self._poller.unwatch(before)
            fork_twin.end(before)
        self._keeper_fd = os.pidfd_open(pid)
        self._poller.watch(self._keeper_fd, self._bereft)

    def _wait(self) -> None:
        """The twin: nothing but waiting for the other's death, as long as that takes."""
        poll = select.poll()
        poll.register(self._self_fd, select.POLLIN)
        poll.poll()
        if self._board[HEIR] != self._generation:
            os._exit(0)
        if self._board[STAGE] >= DONE:
            self._finish()
        raise _Inherited

    def _bereft(self, fd: int) -> None:
        self._poller.unwatch(fd)
        fork_twin.end(fd)
        self._keeper_fd = -1
        self.renew()

    def _over(self) -> bool:
        stage = self._board[STAGE]
        if stage == RUNNING:
            return not any(task.fd >= 0 for task in self._tasks)
        if self._connection >= 0 or self._control.owned:
            self._owned_at = time.monotonic()
        return self._stopping or time.monotonic() - self._owned_at > self._grace_s

    def _finish(self) -> None:
        """Leave the result behind, and nothing else; then both end."""
        board = self._board
        if board[STAGE] == RUNNING:
            board[LAST_NS] = time.monotonic_ns()
            # The twin, if it has to go on from here, does not read the journal any more.
            board.result = json.dumps(self.status(over=True))
        if board[STAGE] < DONE:
            board[STAGE] = DONE if board[STAGE] == RUNNING else STOPPED
        if not board[CLEAN]:
            if board[STAGE] == DONE:
                self._control.leave_result(RESULT_FILE, board.result)
            for name in (LAZY_SOCKET, ARRIVED_SOCKET, self._control.name):
                with contextlib.suppress(OSError):
                    os.unlink(name)  # noqa: PTH108 - relative to the current directory
            self._control.tell_waiting(board.result)
            # The twin, which ends last, leaves alone what a next pager may have put there.
            board[CLEAN] = 1
        # No clean-up of Python's: the table of descriptors is the twin's too.
        os._exit(0)

    # -- the loop --------------------------------------------------------------------------

    def _turn(self) -> None:
        running = self._board[STAGE] == RUNNING
        now = time.monotonic()
        if (
            self._journal.full
            or now >= self._renew_at
            or (self._keeper_fd < 0 and self._keep and now >= self._retry_at)
        ):
            self.renew()
        looked = time.monotonic_ns()
        filler = self._filler
        timeout = filler.back_off_ms if running or filler.deferred else _TICK_MS
        if filler.waiting:
            timeout = 0 if filler.waiting.due else min(timeout, ASK_MS)
        ready = self._poller.wait(timeout)
        if timeout:
            # It slept until now: what it finds has only just come.
            looked = filler.looked_ns = time.monotonic_ns()
        filler.back_off_ms = 0
        self._poller.call(ready)
        filler.again()
        filler.look_at_remote()
        filler.looked_ns = looked
        if running:
            filler.fill()

    # -- CRIU ------------------------------------------------------------------------------

    def _accept(self, fd: int) -> None:
        # One at a time: the next one waits, and its restore with it.
        if self._connection < 0 and self._board[STAGE] == LISTENING:
            self._connection = criu_socket.accept(fd)
            if self._connection >= 0:
                self._poller.unwatch(fd)
                self._poller.watch(self._connection, self._hear)

    def _hear(self, fd: int) -> None:
        """Take all that CRIU has said so far."""
        while True:
            try:
                got = criu_socket.receive(fd, self._journal, self._pid > 0)
            except OSError as error:
                self._filler.trouble = f"CRIU's connection: {error.strerror}"
                got = None
            if got is None:
                break
            if not got:
                return
            body, handed = self._journal.body, self._pid > 0
            self._journal.keep()
            if handed:
                self._handed(criu_socket.handed(body))
                self._filler.watch_task(len(self._tasks) - 1, self._tasks[-1])
            else:
                self._said(criu_socket.said(body))
        self._poller.close(fd)
        self._connection = -1
        if self._board[STAGE] != RUNNING:
            self._reset()

    def _said(self, number: int) -> None:
        if number == criu_socket.FINISHED:
            if self._board[STAGE] < RUNNING:
                self._board[FINISHED_NS] = time.monotonic_ns()
                self._board[STAGE] = RUNNING
        elif number > 0:
            self._pid = number

    def _handed(self, fd: int) -> None:
        space = MissingRanges() if self._source is None else self._source.space(self._pid)
        self._tasks.add(Task(fd, space, self._pid))
        self._pid = 0

    def _reset(self) -> None:
        """The attempt failed: nothing of it runs, and the next may come."""
        self._journal.note(Kind.RESET, 0)
        tasks = [*self._tasks]
        self._forget()
        for task in tasks:
            if task.fd >= 0:
                self._poller.close(task.fd)
        self._board[FAULTS] = self._board[WORST_NS] = 0
        self._poller.watch(self._listener, self._accept)

    # -- the agent -------------------------------------------------------------------------

    def plan(self, path: str) -> str:
        """Take a plan and hear CRIU; what is wrong with it, or nothing."""
        if self._connection >= 0 or self._board[STAGE] >= RUNNING:
            return "a restore is under way"
        new = PlanFiles(Path(path))
        if self._source is not None:
            self._source.close()
        self._take(new)
        self._poller.watch(self._listener, self._accept)
        self._plans += 1
        self._board.path = path
        # From here on the twin would read it too, if it had to.
        self._board[PLANS] = self._plans
        self._board[STAGE] = LISTENING
        self._renew_at = time.monotonic() + _RENEW_S
        return ""

    def verify(self, pids: Mapping[int, int]) -> Verified:
        """While CRIU holds the tree: see that all that is planned can be served (`verify`).

        Args:
            pids: those of this host by those of the images.

        Raises:
            PhaulError: it cannot be, or no tree is held.
        """
        # All of it was said before the tree was held, and perhaps not heard yet: a restore may
        # begin before the plan is here.
        if self._board[STAGE] == LISTENING:
            self._accept(self._listener)
            if self._connection >= 0:
                self._hear(self._connection)
        if self._source is None or self._connection < 0 or self._board[STAGE] >= RUNNING:
            raise DestinationError("no restored tree is held")
        if left_out := sorted(self._source.pids - {task.pid for task in self._tasks}):
            raise DestinationError(f"CRIU has not handed over the memory of process {left_out[0]}")
        found = verify(self._tasks, pids, self._source.remote)
        self._filler.waiting.want({(page, 1) for page in found.wants})
        return found

    def stop(self) -> str:
        """End, unless a process runs; why not, or nothing."""
        if self._connection >= 0 and self._board[STAGE] < RUNNING:
            # From here on CRIU cannot say that it has finished; it may have.
            criu_socket.shut(self._connection)
            self._hear(self._connection)
        if self._board[STAGE] >= RUNNING:
            return "a restored process still gets its pages"
        self._stopping = True
        return ""

    def status(self, *, over: bool = False) -> dict[str, object]:
        """How far it is; or how it will have ended, as soon as that is left behind."""
        board = self._board
        stage = DONE if over else board[STAGE]
        state = "restoring" if stage == LISTENING and self._connection >= 0 else _NAMES[stage]
        tasks = [] if stage >= DONE else self._tasks
        missing = self._tasks.missing if tasks else 0
        remote = self._filler.remote if stage < DONE else None
        until = board[LAST_NS] or time.monotonic_ns()
        return {
            "state": state,
            **self._tasks.account.numbers(missing, taken_over=board[TAKEN_OVER] > 0),
            "remote_missing": 0 if remote is None else remote.missing,
            "tasks": sum(task.fd >= 0 for task in tasks),
            "faults": board[FAULTS],
            "worst_fault_ms": round(board[WORST_NS] / 1e6, 3),
            "ms": round((until - board[FINISHED_NS]) / 1e6, 1) if board[FINISHED_NS] else 0.0,
            "pids": [board[WORKER], board[KEEPER]],
            "trouble": self._filler.trouble,
        }
