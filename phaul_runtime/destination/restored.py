"""The processes of a restored tree, by the pids that CRIU's images have for them."""

from __future__ import annotations

import os
from pathlib import Path

from phaul_runtime.errors import DestinationError
from phaul_runtime.system.process import status_words

_PROC = Path("/proc")


def by_image(root: int) -> dict[int, int]:
    """The pids of this host by those of the images, of a tree that stands still.

    The images name a process as the pid namespace of the root does.

    Args:
        root: of the tree, its pid on this host.

    Raises:
        DestinationError: the root has ended.
    """
    depth = len(_pids(root))
    if not depth:
        raise DestinationError(f"the restored process {root} has ended")
    found, below = {}, [root]
    for pid in below:
        below += _children(pid)
        inner = _pids(pid)
        # What has ended meanwhile is missed by who knows what it was.
        if len(inner) >= depth:
            found[inner[depth - 1]] = pid
    return found


def _pids(pid: int) -> list[int]:
    """A process's pids, in each pid namespace from /proc's inwards; none if it has ended."""
    return [int(word) for word in status_words(_PROC / str(pid), "NSpid")]


def _children(pid: int) -> list[int]:
    """Of all its threads."""
    found: list[int] = []
    try:
        for task in os.listdir(_PROC / str(pid) / "task"):
            path = _PROC / str(pid) / "task" / task / "children"
            found += map(int, path.read_text(encoding="ascii").split())
    except OSError:
        pass  # It has ended; so will who asks for one of them.
    return found


__all__ = ["by_image"]
