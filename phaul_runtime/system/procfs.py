"""What /proc says of processes, threads and mounts: the one place that parses it.

A home is the directory of a process or thread, as /proc/4711 or /proc/4711/task/4712. Of one that
has ended nothing is found.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
_OCTAL = re.compile(rb"\\([0-7]{3})")
START = 19
"""Of `stat_fields`: the start time (proc_pid_stat(5), field 22; they begin with the third)."""


class Mount(NamedTuple):
    """A line of /proc/self/mountinfo (proc_pid_mountinfo(5)).

    Attributes:
        id: as in /proc/PID/fdinfo.
        point: where it is mounted.
        type: of its file system.
        options: of its superblock.
    """

    id: bytes
    point: str
    type: str
    options: str


def stat_fields(home: Path) -> list[str]:
    """The words of `stat` from the state on; none if it has ended."""
    try:
        text = (home / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    # The field before, a name in brackets, may hold anything.
    return text.rpartition(")")[2].split()


def start_time(home: Path) -> int:
    """When it was started, clock ticks since boot; 0 if it has ended."""
    fields = stat_fields(home)
    return int(fields[START]) if fields else 0


def status_words(home: Path, name: str) -> list[str]:
    """What `status` says under a name; nothing if it has ended."""
    try:
        text = (home / "status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    for line in text.splitlines():
        if line.startswith(f"{name}:"):
            return line.split()[1:]
    return []


def tracer_of(home: Path) -> int:
    """The pid of its tracer; 0 if it has none."""
    return int(next(iter(status_words(home, "TracerPid")), 0))


def children(home: Path) -> Iterator[int]:
    """The pids of a process's children, of all its threads."""
    try:
        threads = os.listdir(home / "task")
    except OSError:
        return
    for thread in threads:
        try:
            text = (home / "task" / thread / "children").read_text(encoding="ascii")
        except OSError:
            continue
        yield from map(int, text.split())


def cgroup_of(home: Path) -> str:
    """Its cgroup v2 path, as `/web`; empty if there is none."""
    try:
        lines = (home / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line[3:] for line in lines if line.startswith("0::")), "")


def mounts() -> Iterator[Mount]:
    """What this process has mounted, the innermost last."""
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        before, _, after = line.partition(b" - ")
        words = before.split(b" ")
        kind, _, rest = after.partition(b" ")
        # Spaces and the like are octal escapes there.
        point = _OCTAL.sub(lambda found: bytes([int(found[1], 8)]), words[4])
        options = rest.rpartition(b" ")[2]
        yield Mount(words[0], os.fsdecode(point), os.fsdecode(kind), os.fsdecode(options))
