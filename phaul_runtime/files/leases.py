"""Leases on files (fcntl(2), F_SETLEASE): opening such a file disturbs, or ends, the holder.

The holder gets a signal, which by default kills it, and the opening process waits up to 45 seconds.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

LOCKS = Path("/proc/locks")
# 1: LEASE  ACTIVE    WRITE 1234 fe:00:5678 0 EOF
_LEASE = re.compile(r"LEASE\s+\S+\s+(\S+)\s+-?[0-9]+\s+[0-9a-f]+:[0-9a-f]+:([0-9]+)\s")


def leased_inodes() -> frozenset[int]:
    """The inodes that cannot be opened for reading without breaking a lease.

    Of any file system: the device in /proc/locks is not the one that stat tells (btrfs, overlayfs).
    A lease that allows reading (F_RDLCK) is not broken by it.
    """
    return _inodes(LOCKS)


def has_lease(descriptor: str) -> bool:
    """Whether a lease was taken by a descriptor that another process has, as `/proc/4711/fd/3`."""
    process, kind, number = descriptor.rpartition("/fd/")
    return bool(kind) and bool(_inodes(Path(process) / "fdinfo" / number))


def _inodes(path: Path) -> frozenset[int]:
    text = ""
    with contextlib.suppress(OSError):
        text = os.fsdecode(path.read_bytes())
    return frozenset(int(inode) for kind, inode in _LEASE.findall(text) if kind != "READ")
