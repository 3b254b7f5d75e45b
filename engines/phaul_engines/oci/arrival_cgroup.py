"""The cgroup that a restored container lives in: this migration's alone, or left alone.

Its path is the source's word, in the manifest and again in CRIU's images. Another container of this
host may live there, and neither its processes nor its limits are a migration's to touch.
"""

from __future__ import annotations

import os
from pathlib import PurePosixPath

from phaul_engines.common.proctree import ancestors
from phaul_engines.oci.runtime import cgroup_pids
from phaul_runtime.errors import DestinationError, NoSuchTarget
from phaul_runtime.system.process import Member
from phaul_runtime.system.procfs import PROC, start_time


def require_free(path: str) -> None:
    """Before a restore into a cgroup: nobody lives there.

    Raises:
        DestinationError: somebody does, or it is no path of a cgroup below the root.
    """
    if not path.strip("/"):
        return
    if not path.startswith("/") or ".." in PurePosixPath(path).parts:
        raise DestinationError(f"malformed manifest: cgroup {path[:80]!a}")
    if pids := cgroup_pids(path):
        raise DestinationError(
            f"cgroup {path} is in use here, by pid {pids[0]}",
            hint="end that, or give the container another cgroupsPath at the source",
        )


def require_own(path: str, root: int) -> None:
    """While a restored tree is held: nothing else lives in the cgroup that CRIU has put it into.

    The runtime has put CRIU into it, too: what descends from this process belongs to the restore.

    Args:
        path: of the cgroup of the tree's root.
        root: its pid.

    Raises:
        DestinationError: something else does.
    """
    ours = {root, os.getpid()}
    for pid in cgroup_pids(path) if path.strip("/") else ():
        if not _descends(pid, ours):
            raise DestinationError(
                f"CRIU has put it into cgroup {path}, in which pid {pid} lives that is not of it",
                hint="give the container a cgroupsPath of its own at the source",
            )


def member(pid: int) -> Member | None:
    """A process, told from later ones with its pid; None if it has ended."""
    started = start_time(PROC / str(pid)) if pid > 0 else 0
    return Member(pid, started) if started else None


def _descends(pid: int, roots: set[int]) -> bool:
    """Whether one of `roots` is `pid` or above it; so is one that has ended meanwhile."""
    if pid in roots:
        return True
    try:
        return any(above.pid in roots for above in ancestors(pid))
    except NoSuchTarget:
        return True
