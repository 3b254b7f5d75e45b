"""What a test needs of its hosts, and which laboratory has it.

A test says it by `@pytest.mark.needs(...)`; without, hosts of namespaces do, at native speed.
"""

from __future__ import annotations

import mmap
import os
import shutil
import struct
from functools import cache
from pathlib import Path

from phaul_lab.lab import Kind
from phaul_lab.native import cgroup_root

# By the name that tests and `--labs` have for it.
LABS = {
    "native": Kind(native=True),
    "emulated": Kind(),
    "emulated-forky": Kind(suite="forky"),
    "emulated-mixed": Kind(suites={"a": "trixie", "b": "forky"}),
    "native-mixed": Kind(native=True, suites={"a": "trixie", "b": "forky"}),
}
NEEDS = {
    "dirty-tracking": "a kernel with soft-dirty, for pre-copy",
    "controllers": "cgroup2 with the controllers cpu, memory and pids",
    "own-kernel": "hosts whose clock and settings are their own",
    "fixed-addresses": "a kernel that gives programs the same addresses each time",
}
_SOFT_DIRTY = 1 << 55
_CONTROLLERS = {"cpu", "memory", "pids"}


@cache
def soft_dirty() -> bool:
    """Whether this machine's kernel tells which pages were written to."""
    with mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        page[0] = 1
        address = _address(page)
        with Path("/proc/self/pagemap").open("rb") as pagemap:
            pagemap.seek(address // mmap.PAGESIZE * 8)
            (entry,) = struct.unpack("<Q", pagemap.read(8))
    return bool(entry & _SOFT_DIRTY)


def _address(page: mmap.mmap) -> int:
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(page))


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


def _native_has(need: str) -> bool:
    """Whether hosts of namespaces have it on this machine."""
    root = cgroup_root()
    if need == "controllers" and root is not None:
        return set((root / "cgroup.controllers").read_text().split()) >= _CONTROLLERS
    return need == "dirty-tracking" and soft_dirty()


def choose(needs: set[str]) -> tuple[str, str]:
    """The laboratory that has it all, by its name; or why none has, on this machine."""
    if unknown := needs - NEEDS.keys():
        raise ValueError(f"no such need: {sorted(unknown)}; there are {sorted(NEEDS)}")
    lacks = [need for need in sorted(needs) if not _native_has(need)]
    if not lacks and not why_not_native():
        return "native", ""
    if not why_not_emulated():
        return "emulated", ""
    wanted = ", ".join(NEEDS[need] for need in lacks) or "a host"
    return "", f"needs {wanted}: {why_not_native() or why_not_emulated()}"
