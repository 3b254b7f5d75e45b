"""A cgroup of its own for what the agent restores.

A restored tree inherits the cgroup of the `criu swrk` that rebuilt it. Left in the agent's, it
would die with the agent's service or the ssh session that started it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

_ROOTS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup/systemd"))
GROUP = "phaul-runtime"
_TRIES = 5
_POLL_S = 0.02


def _root() -> Path | None:
    for root in _ROOTS:
        if (root / "cgroup.procs").exists():
            return root
    return None


def adopt(name: str, pid: int) -> Path | None:
    """Move `pid` to the cgroup `phaul-runtime/NAME`; None where that is not possible.

    Children that `pid` starts afterwards are in it too. Groups of trees that have ended since
    are removed on the way.
    """
    root = _root()
    if root is None:
        return None
    parent = root / GROUP
    group = parent / name
    sweep()
    for _ in range(_TRIES):
        try:
            parent.mkdir(exist_ok=True)
            group.mkdir(exist_ok=True)
            with contextlib.suppress(OSError):  # so that it can be slowed when it moves on
                (parent / "cgroup.subtree_control").write_text("+cpu", encoding="ascii")
            (group / "cgroup.procs").write_text(str(pid), encoding="ascii")
        except FileNotFoundError:
            continue  # another migration's sweep took the empty group
        except OSError:
            return None
        return group
    return None


def members(name: str) -> list[int]:
    """The pids in `phaul-runtime/NAME`; empty if there is no such group."""
    root = _root()
    if root is None:
        return []
    try:
        text = (root / GROUP / name / "cgroup.procs").read_text(encoding="ascii")
    except OSError:
        return []
    return [int(pid) for pid in text.split()]


def below(group: Path) -> set[int]:
    """The pids in a group and in all below it.

    Raises:
        OSError: it cannot be read.
    """
    return {
        int(pid)
        for file in group.rglob("cgroup.procs")
        for pid in file.read_text(encoding="ascii").split()
    }


def kill(name: str, *, within_s: float = 10.0) -> None:
    """End everything in `phaul-runtime/NAME`, and remove the group; idempotent."""
    root = _root()
    if root is not None:
        # All at once, by the kernel, where it can: no number can become another's meanwhile.
        with contextlib.suppress(OSError):
            (root / GROUP / name / "cgroup.kill").write_text("1", encoding="ascii")
    kill_all(lambda: members(name), within_s=within_s)
    remove(None if root is None else root / GROUP / name)


def kill_all(find: Callable[[], Iterable[int]], *, within_s: float) -> None:
    """End the processes that `find` finds, until it finds none or the time is up."""
    deadline = time.monotonic() + within_s
    while (pids := list(find())) and time.monotonic() < deadline:
        # One of another pid namespace is told as 0, by which kill() means our own process group.
        for pid in (pid for pid in pids if pid > 0):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)


def sweep() -> None:
    """Remove the groups of trees that have ended, and the common parent with the last."""
    root = _root()
    if root is None or not (root / GROUP).is_dir():
        return
    for group in (*filter(Path.is_dir, (root / GROUP).iterdir()), root / GROUP):
        with contextlib.suppress(OSError):  # busy: something lives in it
            group.rmdir()


def remove_once_empty(name: str, *, within_s: float = 10.0) -> None:
    """Remove `phaul-runtime/NAME` as soon as what was told to end in it has ended; idempotent."""
    root = _root()
    if root is None:
        return
    group = root / GROUP / name
    deadline = time.monotonic() + within_s
    while group.exists() and time.monotonic() < deadline:
        remove(group)
        time.sleep(_POLL_S)


def remove(group: Path | None) -> None:
    """Remove a group if nothing lives in it, and the common parent with the last; idempotent."""
    if group is not None:
        with contextlib.suppress(OSError):
            group.rmdir()
            group.parent.rmdir()
