"""The cells of the table: a fault at a moment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# In the order of a migration. The first three and the last four stop the command there; the
# others are seen happening, and are not stopped.
MOMENTS = (
    "opened",  # before the first pre-dump
    "predump",  # in it
    "between",  # between two rounds
    "dump",  # in the final dump
    "copy",  # in the copy of the images
    "restore",  # in the restore
    "prepared",
    "committing",  # the source's copy is dead, commit not yet sent
    "committed",
)
# A post-copy move has no rounds, and one moment more.
LATE_MOMENTS = ("dump", "copy", "restore", "prepared", "committing", "committed", "serving")
EVERYWHERE = MOMENTS
FAULTS: dict[str, tuple[str, ...]] = {
    "kill-cli": EVERYWHERE,
    "kill-agent": EVERYWHERE,
    "kill-ssh": EVERYWHERE,
    # Where there is a CRIU to be killed.
    "kill-criu-a": ("predump", "dump", "copy", "restore", "prepared"),
    "kill-criu-b": ("predump", "between", "dump", "copy", "restore", "prepared", "committing"),
    "cut-5s": EVERYWHERE,
    "cut-for-good": EVERYWHERE,
    "full-tmpfs-b": EVERYWHERE,
    "full-disk-b": ("opened", "between", "copy", "prepared", "committing"),
    # Of the two processes that give a copy its pages: one, or both while nothing runs yet.
    "kill-pager-b": ("restore", "prepared", "committing"),
    "kill-pagers-b": ("restore", "prepared", "committing"),
    # A container's runtime: between phaul-runtime and CRIU.
    "kill-runtime-a": ("dump", "copy", "prepared"),
    "kill-runtime-b": ("restore", "prepared", "committing"),
    "restore-refused": ("between",),
    "criu-refuses-b": ("copy",),
    # Docker's: what runs the runtime. A dockerd that is killed is started again.
    "kill-shim-b": ("restore", "prepared", "committing"),
    "kill-dockerd-b": ("restore", "prepared", "committing"),
    "kill-dockerd-a": ("committing",),
    "clock-forward": ("predump", "prepared", "committing"),
    "clock-back": ("between", "restore", "committing"),
}
LATE_FAULTS: dict[str, tuple[str, ...]] = {
    "kill-cli": LATE_MOMENTS,
    "kill-agent": LATE_MOMENTS,
    "kill-ssh": LATE_MOMENTS,
    "kill-criu-a": ("dump", "copy", "restore", "prepared"),
    "kill-criu-b": ("copy", "restore", "prepared", "committing"),
    "cut-5s": LATE_MOMENTS,
    "cut-for-good": LATE_MOMENTS,
    "full-tmpfs-b": ("dump", "prepared", "committing"),
    "full-disk-b": ("copy", "prepared", "committing", "serving"),
    "kill-pager-b": ("restore", "prepared", "committing", "serving"),
    "kill-pagers-b": ("restore", "prepared", "committing"),
    "kill-runtime-a": ("dump", "copy", "prepared"),
    "kill-runtime-b": ("restore", "prepared", "committing"),
    "criu-refuses-b": ("copy",),
    "kill-shim-b": ("restore", "prepared", "committing"),
    "kill-dockerd-b": ("restore", "prepared", "committing"),
    "kill-dockerd-a": ("committing",),
}
BY_MODE = {"pre-copy": FAULTS, "post-copy": LATE_FAULTS}
# With more memory, whose release takes the kernel a while: what asks meanwhile whether the source's
# copy lives.
LARGE_MIB = 256
LARGE = {
    ("pre-copy", "kill-cli", "committing"),
    ("pre-copy", "kill-agent", "committing"),
    ("pre-copy", "kill-criu-a", "prepared"),
    ("pre-copy", "kill-ssh", "committed"),
    ("post-copy", "kill-cli", "committing"),
}
QUICK = {
    ("kill-cli", "dump"),
    ("kill-cli", "committing"),
    ("kill-agent", "restore"),
    ("kill-agent", "committing"),
    ("kill-ssh", "prepared"),
    ("kill-criu-a", "predump"),
    ("kill-criu-b", "prepared"),
    ("cut-5s", "committing"),
    ("cut-for-good", "committing"),
    ("full-tmpfs-b", "predump"),
    ("restore-refused", "between"),
    ("kill-pager-b", "restore"),
    ("kill-pagers-b", "committing"),
}
# A container's own way through the same moments: its runtime, its gate, its files.
QUICK_CONTAINER = {
    ("kill-cli", "committing"),
    ("kill-agent", "restore"),
    ("kill-criu-a", "copy"),
    ("kill-runtime-a", "prepared"),
    ("kill-runtime-b", "committing"),
}
# Underneath its daemon: what could lose the copy between the two hosts' daemons.
QUICK_DOCKER = {
    ("kill-cli", "committing"),
    ("kill-agent", "restore"),
    ("kill-criu-a", "copy"),
    ("kill-criu-b", "prepared"),
    ("kill-runtime-a", "prepared"),
    ("kill-runtime-b", "committing"),
    ("kill-shim-b", "prepared"),
    ("kill-dockerd-b", "prepared"),
    ("restore-refused", "between"),
    ("cut-for-good", "committing"),
}
# Of a post-copy move, for each engine.
QUICK_LATE = {
    ("kill-cli", "committing"),
    ("kill-agent", "serving"),
    ("kill-cli", "serving"),
    ("kill-criu-a", "prepared"),
    ("kill-pager-b", "serving"),
}
# CI's share of those, and of the large ones.
CI_LATE = {"process": {("kill-cli", "committing"), ("kill-agent", "serving")}}
CI_LARGE = {("pre-copy", "kill-cli", "committing")}
CI = {
    "process": {
        ("kill-pagers-b", "committing"),
        ("kill-cli", "dump"),
        ("kill-agent", "restore"),
        ("kill-agent", "committing"),
        ("kill-criu-b", "prepared"),
        ("cut-for-good", "committing"),
        ("full-tmpfs-b", "predump"),
    },
    "runc": {("kill-criu-a", "copy"), ("kill-runtime-b", "committing")},
    "docker": {
        ("kill-cli", "committing"),
        ("kill-criu-b", "prepared"),
        ("kill-shim-b", "prepared"),
        ("kill-dockerd-b", "prepared"),
    },
}
QUICK_BY_ENGINE = {"process": QUICK, "docker": QUICK_DOCKER}
DOCKERS = ("kill-shim-b", "kill-dockerd-a", "kill-dockerd-b")


@dataclass(frozen=True)
class Cell:
    """One fault at one moment of a move by one engine."""

    engine: str
    fault: str
    moment: str
    mode: str = "pre-copy"
    large: bool = False

    @property
    def in_ci(self) -> bool:
        """It is of those that CI runs."""
        if self.large:
            return self.engine == "process" and (self.mode, self.fault, self.moment) in CI_LARGE
        share = CI if self.mode == "pre-copy" else CI_LATE
        return (self.fault, self.moment) in share.get(self.engine, ())

    @property
    def needs(self) -> tuple[str, ...]:
        """What it needs of the hosts."""
        rounds = ("dirty-tracking",) if self.moment in ("opened", "predump", "between") else ()
        return rounds + (("own-kernel",) if self.fault.startswith("clock") else ())

    def __str__(self) -> str:
        mode = "" if self.mode == "pre-copy" else f"-{self.mode}"
        return f"{self.engine}{mode}:{self.fault}@{self.moment}{'-large' * self.large}"


def cells(engine: str, *, quick: bool, modes: Sequence[str] = tuple(BY_MODE)) -> list[Cell]:
    """All cells of an engine, or those that tell most."""
    return [
        cell
        for mode in modes
        for fault, moments in BY_MODE[mode].items()
        for moment in moments
        if (engine != "process" or "runtime" not in fault)
        and (engine == "docker" or fault not in DOCKERS)
        for cell in _sizes(engine, fault, moment, mode, quick=quick)
    ]


def _sizes(engine: str, fault: str, moment: str, mode: str, *, quick: bool) -> Iterator[Cell]:
    chosen = QUICK_LATE
    if mode == "pre-copy":
        chosen = QUICK_BY_ENGINE.get(engine, QUICK_CONTAINER)
    if not quick or (fault, moment) in chosen:
        yield Cell(engine, fault, moment, mode)
    if (mode, fault, moment) in LARGE and (not quick or engine == "process"):
        yield Cell(engine, fault, moment, mode, large=True)
