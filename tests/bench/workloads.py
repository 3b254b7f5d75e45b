"""What is moved: memory of a size of which a share is hot, or redis with a client."""

from __future__ import annotations

from dataclasses import dataclass

# The hot region is rewritten once in that time; a page in it is as dirty on any size.
CYCLE_S = 8
# Pages verified a second while it moves; after the move all are, at once.
VERIFIES = 1000


@dataclass(frozen=True)
class Workload:
    """A victim.

    Attributes:
        key: how it is selected, as `256-10`: MiB, and the hot share in percent.
        redis: redis with so much data and a client, and no piggie-dirty.
    """

    key: str
    mib: int
    hot_percent: float = 0
    redis: bool = False

    @property
    def title(self) -> str:
        """For people."""
        if self.redis:
            return f"redis, {self.mib} MiB, one client writing"
        return f"{self.mib} MiB, " + (f"{self.hot_percent:g} % hot" if self.hot_percent else "idle")

    @property
    def flags(self) -> tuple[str, ...]:
        """For piggie-dirty."""
        hot = self.mib * self.hot_percent / 100
        writes = round(hot * 256 / CYCLE_S)
        words = {"mib": self.mib, "hot-mib": f"{hot:g}", "writes": writes, "verifies": VERIFIES}
        return tuple(word for name, value in words.items() for word in (f"--{name}", str(value)))


def parse(key: str) -> Workload:
    """A workload by its key: idle-MIB, MIB-PERCENT, redis or redis-MIB.

    Raises:
        ValueError: there is no such thing.
    """
    first, _, second = key.partition("-")
    try:
        if first == "redis":
            return Workload(key, int(second or 64), redis=True)
        if first == "idle":
            return Workload(key, int(second))
        percent = float(second)
        if not 0 < percent <= 100:
            raise ValueError(percent)
        return Workload(key, int(first), percent)
    except ValueError:
        raise ValueError(f"no workload {key!r}: idle-64, 256-10 (10 % hot), redis") from None


# Which method moves what unless something else is asked for: all where they are compared side by
# side, few for the growth with memory and for hot regions.
SIZES = ("phaul-lazy", "phaul-tcp", "phaul-full", "criu", "runc")
HOT = ("phaul-lazy", "phaul-full", "phaul-policy")
LATE = ("phaul-lazy", "phaul-hybrid", "phaul-post")
# What takes long and is no close call, or is compared by another workload, is measured once.
ENGINES = ("podman-pre", "podman", "phaul-docker-lazy", "phaul-docker", "docker")
ONCE: dict[str, tuple[str, ...]] = {
    "idle-64": (*ENGINES, "criu", "runc", "phaul-local", "phaul-go"),
    "idle-256": ("criu", "runc"),
    "idle-1024": ("criu", "runc"),
    "256-10": ("criu", "podman", "phaul-docker", "docker"),
    "redis": ("phaul-docker-lazy", "phaul-docker", "docker", "podman-pre", "podman"),
}
PLAN: dict[str, tuple[str, ...] | None] = {
    "idle-64": None,
    "idle-256": SIZES,
    "idle-1024": SIZES,
    "256-1": HOT,
    "256-10": None,
    "256-50": HOT,
    "512-100": LATE,
    "redis": None,
}
