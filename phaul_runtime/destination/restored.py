"""The processes of a restored tree, by the pids that CRIU's images have for them."""

from __future__ import annotations

from pathlib import Path

from phaul_runtime.errors import DestinationError
from phaul_runtime.system.procfs import children, status_words

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
        below += children(_PROC / str(pid))
        inner = _pids(pid)
        # What has ended meanwhile is missed by who knows what it was.
        if len(inner) >= depth:
            found[inner[depth - 1]] = pid
    return found


def _pids(pid: int) -> list[int]:
    """A process's pids, in each pid namespace from /proc's inwards; none if it has ended."""
    return [int(word) for word in status_words(_PROC / str(pid), "NSpid")]


__all__ = ["by_image"]
