"""A process that gets pages."""

from __future__ import annotations

from dataclasses import dataclass, field

from phaul_runtime.pager.space import Space


@dataclass
class Task:
    """One userfaultfd, and what its process misses.

    Attributes:
        fd: -1 once there is nothing more to do for it.
        space: what it misses.
        pid: as CRIU's images name it; of a forked child its parent's.
        host: its pid on this host; 0: not known, as of all forked children.
        forked: it came with a fork; otherwise CRIU handed it over.
        late: ranges that were registered while it ran: what is there was touched before.
    """

    fd: int
    space: Space
    pid: int = 0
    host: int = 0
    forked: bool = False
    late: list[tuple[int, int]] = field(default_factory=list)

    def was_late(self, address: int) -> bool:
        """Whether an address is in one of `late`."""
        return any(start <= address < end for start, end in self.late)


__all__ = ["Task"]
