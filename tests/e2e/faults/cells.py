"""The cells of the table: a fault at a moment."""

from __future__ import annotations

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
# CI's share of those.
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

    @property
    def in_ci(self) -> bool:
        """It is of those that CI runs."""
        return (self.fault, self.moment) in CI.get(self.engine, ())

    @property
    def needs(self) -> tuple[str, ...]:
        """What it needs of the hosts."""
        rounds = ("dirty-tracking",) if self.moment in ("opened", "predump", "between") else ()
        return rounds + (("own-kernel",) if self.fault.startswith("clock") else ())

    def __str__(self) -> str:
        return f"{self.engine}:{self.fault}@{self.moment}"


def cells(engine: str, *, quick: bool) -> list[Cell]:
    """All cells of an engine, or those that tell most."""
    chosen = QUICK_BY_ENGINE.get(engine, QUICK_CONTAINER)
    return [
        Cell(engine, fault, moment)
        for fault, moments in FAULTS.items()
        for moment in moments
        if (not quick or (fault, moment) in chosen)
        and (engine != "process" or "runtime" not in fault)
        and (engine == "docker" or fault not in DOCKERS)
    ]
