"""What this machine's own kernel and programs can do for a laboratory."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import struct
from functools import cache
from pathlib import Path

_SOFT_DIRTY = 1 << 55
_CAP_SYS_RESOURCE = 24
CONTROLLERS = {"cpu", "memory", "pids"}


@cache
def cgroup_root() -> Path | None:
    """Where cgroup2 is mounted."""
    for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        _source, place, kind, *_ = line.split(" ")
        if kind == "cgroup2":
            return Path(place)
    return None


@cache
def controllers() -> bool:
    """Whether cgroup2 has the controllers that containers' limits need."""
    root = cgroup_root()
    return root is not None and (
        set((root / "cgroup.controllers").read_text().split()) >= CONTROLLERS
    )


@cache
def sys_resource() -> bool:
    """Whether root has CAP_SYS_RESOURCE, which some sandboxes take away."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    effective = status.partition("CapEff:")[2].split()[0]
    return bool(int(effective, 16) >> _CAP_SYS_RESOURCE & 1)


@cache
def soft_dirty() -> bool:
    """Whether this machine's kernel tells which pages were written to."""
    with mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        page[0] = 1
        address = ctypes.addressof(ctypes.c_char.from_buffer(page))
        with Path("/proc/self/pagemap").open("rb") as pagemap:
            pagemap.seek(address // mmap.PAGESIZE * 8)
            (entry,) = struct.unpack("<Q", pagemap.read(8))
    return bool(entry & _SOFT_DIRTY)


@cache
def why_not_native() -> str:
    """Why hosts of namespaces cannot be had on this machine; empty if they can."""
    if os.geteuid() != 0:
        return "hosts need root"
    if cgroup_root() is None:
        return "no cgroup2 is mounted"
    missing = [tool for tool in ("unshare", "nsenter", "setpriv", "ip") if not shutil.which(tool)]
    return f"not installed: {', '.join(missing)}" if missing else ""


@cache
def why_not_emulated() -> str:
    """Why emulated hosts cannot be had on this machine; empty if they can."""
    if os.geteuid() != 0:
        return "hosts need root"
    return "" if shutil.which("qemu-system-x86_64") else "not installed: qemu-system-x86"


def what_native_lacks() -> list[str]:
    """Why hosts of namespaces here cannot do all that emulated ones can; empty if they can."""
    if why := why_not_native():
        return [why]
    found = [] if soft_dirty() else ["its kernel has no dirty tracking (CONFIG_MEM_SOFT_DIRTY)"]
    found += [] if controllers() else ["its cgroup2 lacks controllers"]
    return found + ([] if sys_resource() else ["root lacks CAP_SYS_RESOURCE"])
