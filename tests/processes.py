"""What a test may look at: its own open files, and the processes that it has started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def open_descriptors() -> set[str]:
    """The open files of this process, by number and what they are.

    Held against those of before, the new ones are what was left open: another thread, of a test
    before, may close its own at any time.
    """
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{number} {Path('/proc/self/fd', number).readlink()}")
        except OSError:
            continue  # that of the list, closed by now
    return found


def processes_with(variable: str) -> Iterator[tuple[int, bytes]]:
    """Pid and command line of each process that has `NAME=value` in its environment.

    By a variable that a test has set, it finds all that it has started, orphans too, and nothing
    of anybody else.
    """
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if variable.encode() in (entry / "environ").read_bytes().split(b"\0"):
                yield int(entry.name), (entry / "cmdline").read_bytes().replace(b"\0", b" ")
        except OSError:
            continue
