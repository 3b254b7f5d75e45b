"""This host, as its kernel describes it."""

from __future__ import annotations

from pathlib import Path

from phaul_runtime.system.procfs import mounts


def boot_id() -> str:
    """What tells one boot of this kernel from another, and one kernel from another."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def memory_available() -> int:
    """Bytes that new work can have without swapping, as the kernel estimates."""
    return _meminfo().get("MemAvailable", 0) * 1024


def _meminfo() -> dict[str, int]:
    """/proc/meminfo, KiB by name."""
    values = {}
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        if rest.split():
            values[name] = int(rest.split()[0])
    return values


def filesystem_of(path: Path) -> str:
    """The type of the file system that holds `path`, as `tmpfs`; empty if unknown."""
    best, kind = "", ""
    resolved = str(path.resolve())
    for mount in mounts():
        inside = mount.point in ("/", resolved) or resolved.startswith(f"{mount.point}/")
        if inside and len(mount.point) >= len(best):
            best, kind = mount.point, mount.type
    return kind
