"""Whether a process can still run: the question on which a cut-over turns.

A process that was killed stays in /proc while the kernel frees its memory: 124 ms for 1 GiB, 612 ms
for 4 GiB of small pages, measured. It runs nothing of its own in that time: the kernel has set
PF_EXITING, and nothing takes that back (include/linux/sched.h). And one whose first thread has
ended looks like a zombie although its other threads run: each thread is asked.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from phaul_runtime.errors import OutcomeUnknown
from phaul_runtime.system.procfs import PROC, START, stat_fields, status_words

_SIGKILL = 1 << (signal.SIGKILL - 1)
_EXITING = 0x4
_DOOMED_FOR_S = 20.0
_POLL_S = 0.002
# Of /proc/PID/stat, counted from the state, which is the third: flags, number 9; start, number 22.
_FLAGS = 6


class Life(Enum):
    """What a process can still do."""

    RUNS = "runs"
    DOOMED = "was told to die"
    OVER = "runs nothing any more"


@dataclass(frozen=True)
class Member:
    """Enough of a process to tell it from a later one with its pid.

    Attributes:
        pid: on this host.
        start_time: clock ticks since boot.
    """

    pid: int
    start_time: int

    def life(self, proc: Path = PROC) -> Life:
        """What it can do now; `proc` is where the kernel shows processes."""
        home = proc / str(self.pid)
        fields = stat_fields(home)
        if not fields or int(fields[START]) != self.start_time:
            return Life.OVER
        found = Life.OVER
        for thread in _threads(home):
            life = _life(thread)
            if life is Life.RUNS:
                return Life.RUNS
            if life is Life.DOOMED:
                found = Life.DOOMED
        return found

    def alive(self, proc: Path = PROC) -> bool:
        """Whether it may still run something."""
        return self.life(proc) is not Life.OVER

    def exists(self, proc: Path = PROC) -> bool:
        """Whether the kernel still keeps it, with its cgroup and its memory."""
        fields = stat_fields(proc / str(self.pid))
        if not fields or int(fields[START]) != self.start_time:
            return False
        return fields[0] not in "ZX" or self.alive(proc)

    def kill(self) -> None:
        """End it, if it still exists."""
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            # The handle is of the process that has the pid now: look which that is only afterwards.
            if self.alive():
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        except ProcessLookupError:
            pass
        finally:
            os.close(handle)

    def settled(self, within_s: float = _DOOMED_FOR_S) -> bool:
        """Whether it runs, once it is not on its way between the two.

        Raises:
            OutcomeUnknown: it was told to die, and after `within_s` seconds has not begun to.
        """
        deadline = time.monotonic() + within_s
        while (life := self.life()) is Life.DOOMED:
            if time.monotonic() > deadline:
                raise OutcomeUnknown(
                    f"process {self.pid} was killed and has not ended within {within_s:g} s",
                    hint="ask again once it has; /proc/PID/wchan says what it waits for",
                )
            time.sleep(_POLL_S)
        return life is Life.RUNS


def _threads(home: Path) -> Iterator[Path]:
    """The process itself first: mostly it is the only one, or says enough."""
    yield home
    names: list[str] = []
    with contextlib.suppress(OSError):
        names = os.listdir(home / "task")
    yield from (home / "task" / name for name in names if name != home.name)


def _life(thread: Path) -> Life:
    fields = stat_fields(thread)
    if not fields or fields[0] in "ZX" or int(fields[_FLAGS]) & _EXITING:
        return Life.OVER
    if not _is_killed(thread):
        return Life.RUNS
    # In an uninterruptible wait: it dies when that ends, and runs nothing before.
    return Life.OVER if fields[0] == "D" else Life.DOOMED


def _is_killed(thread: Path) -> bool:
    """Whether a SIGKILL waits for it; the kernel gives each thread its own."""
    return any(int(word, 16) & _SIGKILL for word in status_words(thread, "SigPnd"))


__all__ = ["Life", "Member"]
