"""Slowing a target by its cgroup's cpu.max (cgroup v2), and undoing it whatever happens.

What cpu.max was is remembered (in the journal) before it is changed for the first time; `undo` puts
it back after this process's death. While CRIU traces the target it runs at full speed: it is CRIU
that works in its place then, in pre-dumps and in the freeze.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from phaul_runtime.errors import PhaulError, Refused
from phaul_runtime.system.cgroup import below
from phaul_runtime.system.host import boot_id
from phaul_runtime.system.procfs import PROC, tracer_of

ROOT = Path("/sys/fs/cgroup")
PERIOD_US = 100_000
# Each step halves what the target uses of the CPUs; 5 % of one CPU is the least.
STEP = 0.5
FLOOR = 0.05
FACT = "throttled"
_MAX = "cpu.max"
_POLL_S = 0.005


def next_share(used: float, limit: float | None) -> float | None:
    """One step down, in CPUs; None at the floor.

    Args:
        used: CPUs used since the step before.
        limit: CPUs allowed since then; None for no limit.
    """
    now = used if limit is None else min(used, limit)
    return None if now <= FLOOR else max(now * STEP, FLOOR)


def limit_of(cpu_max: str) -> float | None:
    """The CPUs that a cpu.max allows; None for no limit."""
    quota, _, period = cpu_max.partition(" ")
    return None if quota == "max" else int(quota) / int(period or PERIOD_US)


def own_cgroup(pids: Iterable[int], root: Path = ROOT, proc: Path = Path("/proc")) -> Path:
    """The directory of the cgroup that holds these processes, and no others.

    Args:
        pids: of a tree, its root first.
        root: where cgroup v2 is mounted.
        proc: where the kernel tells of processes.

    Raises:
        Refused: there is no such cgroup, or its CPUs cannot be limited.
    """
    if not (root / "cgroup.controllers").exists():
        raise Refused("this host has no cgroup v2")
    tree = list(pids)
    try:
        lines = (proc / str(tree[0]) / "cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, IndexError):
        raise Refused("the target has ended") from None
    path = next((line[3:] for line in lines if line.startswith("0::")), "/")
    group = root / path.lstrip("/")
    if group == root:
        raise Refused("the target is in the root cgroup")
    if not (group / _MAX).exists():
        raise Refused(f"the cgroup {path} has no cpu controller")
    try:
        inside = below(group)
    except OSError as error:
        raise Refused(f"the cgroup {path} cannot be read: {error.strerror}") from error
    if others := inside - set(tree):
        raise Refused(f"the target shares its cgroup {path} with others, as pid {min(others)}")
    if strays := set(tree) - inside:
        raise Refused(f"pid {min(strays)} of the target is in another cgroup than {path}")
    return group


def undo(fact: Mapping[str, Any] | None) -> str:
    """Put back what a `Throttle` of a dead process remembered; idempotent.

    Returns:
        a warning if that cannot be done, empty if it is done or there is nothing to do.
    """
    if not fact or fact["boot_id"] != boot_id():
        return ""
    return _put_back(Path(fact["cgroup"]), fact["cpu_max"])


def _put_back(group: Path, cpu_max: str) -> str:
    try:
        (group / _MAX).write_text(cpu_max, encoding="ascii")
    except OSError as error:
        if not group.exists():
            return ""  # it has ended with its last process
        return f"{group / _MAX} could not be set back to {cpu_max!r}: {error.strerror}"
    return ""


class Throttle:
    """Slows one target; a context manager that undoes it at the end, to be used again.

    `share` says how many CPUs were left to it last; None if it was not slowed.

    Args:
        group: directory of the cgroup that is the target's own.
        pid: the target's root.
        remember: told what `undo` needs before anything is changed, and None once it is undone.
        warn: told what could not be undone.
    """

    def __init__(
        self,
        group: Path,
        pid: int,
        *,
        remember: Callable[[Mapping[str, Any] | None], None] = lambda _: None,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.group = group
        self.share: float | None = None
        self._pid = pid
        self._remember = remember
        self._warn = warn
        self._lock = threading.RLock()
        self._before: str | None = None
        self._slowed = ""
        self._written = ""
        self._usage: tuple[float, float] | None = None
        self._lifted = threading.Event()
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> Throttle:
        self.share = None
        self._usage = self._read_usage()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.lift()

    def slow_down(self) -> float | None:
        """Slow the target by one step.

        Returns:
            the CPUs that it may use from now on; None if it is at the floor already, or gone.

        Raises:
            MigrationFailed: what cpu.max was cannot be remembered; it was not changed.
        """
        used = self._used()
        with self._lock:
            try:
                before = self._before or (self.group / _MAX).read_text(encoding="ascii").strip()
                share = None if used is None else next_share(used, limit_of(self._slowed or before))
            except (OSError, ValueError):
                return None
            if share is None:
                return None
            if self._before is None:
                self._remember({"cgroup": str(self.group), "cpu_max": before, "boot_id": boot_id()})
                self._before = before
            self._slowed = f"{round(share * PERIOD_US)} {PERIOD_US}"
            if not self._write(self._slowed):
                return None
            self.share = share
        if self._watcher is None:
            self._lifted.clear()
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()
        return share

    def lift(self) -> None:
        """Set cpu.max back to what it was; idempotent, raises nothing."""
        self._lifted.set()
        if self._watcher is not None:
            self._watcher.join()
            self._watcher = None
        with self._lock:
            if self._before is None:
                return
            trouble = _put_back(self.group, self._before)
            self._before, self._slowed, self._written = None, "", ""
        if trouble:
            self._warn(trouble)
            return
        # A journal that cannot be written costs a recovery a second undoing, no more.
        with contextlib.suppress(PhaulError):
            self._remember(None)

    # -- small parts -----------------------------------------------------------------------

    def _watch(self) -> None:
        """At full speed while CRIU traces the target, slowed otherwise."""
        while not self._lifted.wait(_POLL_S):
            traced = bool(tracer_of(PROC / str(self._pid)))
            with self._lock:
                if self._before is not None and not self._lifted.is_set():
                    self._write(self._before if traced else self._slowed)

    def _write(self, value: str) -> bool:
        if value != self._written:
            try:
                (self.group / _MAX).write_text(value, encoding="ascii")
            except OSError:
                return False
            self._written = value
        return True

    def _read_usage(self) -> tuple[float, float] | None:
        """The time now, and the CPU seconds used so far."""
        try:
            text = (self.group / "cpu.stat").read_text(encoding="ascii")
            used = next(int(line.split()[1]) for line in text.splitlines() if "usage_usec" in line)
        except (OSError, StopIteration, ValueError):
            return None
        return time.monotonic(), used / 1e6

    def _used(self) -> float | None:
        """The CPUs used since this was last asked."""
        before, now = self._usage, self._read_usage()
        self._usage = now
        if before is None or now is None or now[0] <= before[0]:
            return None
        return (now[1] - before[1]) / (now[0] - before[0])
