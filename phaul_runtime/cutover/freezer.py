"""The source's copy in a post-copy move: frozen by a cgroup, for good.

CRIU stops a tree by tracing it, and lets it run when it or its client ends. Here the tree has to
stand still for as long as its memory is served, whatever becomes of either: the cgroup v2 freezer
keeps it from running (Documentation/admin-guide/cgroup-v2.rst, `cgroup.freeze`), and CRIU, which
would undo its network lock, is killed. What is frozen so can still be read (/proc/PID/mem) and
killed. Only root thaws it, and here nobody does but `release`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phaul_runtime.engine.findings import OK, REFUSED, Finding
from phaul_runtime.errors import MigrationFailed
from phaul_runtime.system import cgroup
from phaul_runtime.system.host import boot_id
from phaul_runtime.system.process import Life, Member
from phaul_runtime.system.procfs import cgroup_of, start_time, status_words, tracer_of

FACT = "hold"
_ROOT = Path("/sys/fs/cgroup")
_PROC = Path("/proc")
_WITHIN_S = 20.0
_POLL_S = 0.002


@dataclass
class Freezer:
    """The cgroup that holds a tree, and what finds the tree in it again.

    Attributes:
        group: directory of the cgroup.
        pids: of the tree, its root first, with the time at which each started (clock ticks since
            boot) and its pid as CRIU's images name it.
        back: where each came from, by pid; empty where the group is the tree's own.
        boot: the boot of this host that all this is about.
        tracers: what traced the tree when it was planned, CRIU, with its start: only that is ended.
        thawed: `thaw_dying` has thawed the group.
    """

    group: Path
    pids: list[tuple[int, int, int]]
    back: dict[int, str] = field(default_factory=dict)
    boot: str = field(default_factory=boot_id)
    tracers: list[tuple[int, int]] = field(default_factory=list)
    thawed: bool = False

    @classmethod
    def plan(cls, name: str, pids: Sequence[int]) -> Freezer:
        """For a tree that stands still now; changes nothing.

        Args:
            name: of the cgroup, `phaul-runtime/NAME`, where the tree has none of its own.
            pids: all of the tree, its root first.

        Raises:
            MigrationFailed: it has ended.
        """
        depth = len(_inner_pids(pids[0]))
        facts = [(pid, _start(pid), _inner_pids(pid)[depth - 1]) for pid in pids]
        tracing = sorted({_tracer(pid) for pid in pids} - {0})
        tracers = [(pid, _start(pid)) for pid in tracing]
        group, back = _own_group(pids), {}
        if group is None:
            group = _ROOT / cgroup.GROUP / name
            back = {pid: _group_of(pid).as_posix() for pid in pids}
        return cls(group, facts, back, tracers=tracers)

    def require(self, images: Iterable[int]) -> None:
        """That all processes of the images are held.

        Args:
            images: their pids, as the images name them.

        Raises:
            MigrationFailed: one is not: it would run here and there.
        """
        if missing := sorted(set(images) - set(self.by_image)):
            raise MigrationFailed(
                f"process {missing[0]} of the images is not among those that can be held: it was "
                "begun while the tree was being frozen"
            )

    def facts(self) -> dict[str, Any]:
        """For `recall`; JSON values."""
        return {
            "group": str(self.group),
            "pids": self.pids,
            "back": [[pid, path] for pid, path in self.back.items()],
            "boot_id": self.boot,
            "tracers": self.tracers,
        }

    @classmethod
    def recall(cls, facts: Mapping[str, Any] | None) -> Freezer | None:
        """What a journal has under `FACT`; None if it has nothing."""
        if not facts:
            return None
        return cls(
            Path(facts["group"]),
            [(int(pid), int(start), int(inner)) for pid, start, inner in facts["pids"]],
            {int(pid): str(path) for pid, path in facts["back"]},
            str(facts["boot_id"]),
            [(int(pid), int(start)) for pid, start in facts.get("tracers", [])],
        )

    # -- taking ----------------------------------------------------------------------------

    def take(self) -> None:
        """Freeze the tree, then end who traces it; on return nothing can make it run.

        Raises:
            MigrationFailed: it cannot be frozen, and CRIU still has it; or CRIU has not: it has run
                since it was dumped, and its memory is not what belongs to the images any more.
        """
        try:
            if self.back:
                self.group.parent.mkdir(exist_ok=True)
                self.group.mkdir(exist_ok=True)
            (self.group / "cgroup.freeze").write_text("1", encoding="ascii")
            for pid, _, _ in self.pids if self.back else ():
                (self.group / "cgroup.procs").write_text(str(pid), encoding="ascii")
        except OSError as error:
            raise MigrationFailed(
                f"the cgroup {self.group} cannot freeze the target: {error.strerror}"
            ) from error
        self._await_frozen()
        ours = self._criu()
        for pid, start, _ in self.pids:
            if _is(pid, start) and _tracer(pid) not in ours:
                raise MigrationFailed(
                    f"CRIU ended before the target was held: process {pid} has run since its dump"
                )
        self.cut_loose()

    def _await_frozen(self) -> None:
        deadline = time.monotonic() + _WITHIN_S
        while not self.frozen():
            if time.monotonic() > deadline:
                raise MigrationFailed(f"{self.group} does not freeze within {_WITHIN_S:g} s")
            time.sleep(_POLL_S)

    def cut_loose(self) -> None:
        """End a CRIU that has not let go of the tree, which stays frozen; idempotent.

        What else traces it, an operator's debugger say, is let be: it cannot make it run.

        Raises:
            MigrationFailed: it does not end.
        """
        deadline = time.monotonic() + _WITHIN_S
        ours = self._criu()
        while tracers := {_tracer(pid) for pid, _, _ in self.pids} & ours:
            if time.monotonic() > deadline:
                raise MigrationFailed(f"pid {min(tracers)} does not let go of the target")
            for tracer in tracers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(tracer, signal.SIGKILL)
            time.sleep(_POLL_S)

    def _criu(self) -> set[int]:
        """What traced the tree when this was planned, as far as it lives."""
        return {pid for pid, start in self.tracers if _start(pid) == start}

    # -- looking ---------------------------------------------------------------------------

    def lives(self) -> bool:
        """Whether any of the tree exists."""
        return self.boot == boot_id() and any(_is(pid, start) for pid, start, _ in self.pids)

    def exists(self) -> bool:
        """Whether the kernel still keeps any of the tree: dead, it is in the group for a while."""
        return self.boot == boot_id() and any(
            Member(pid, start).exists(_PROC) for pid, start, _ in self.pids
        )

    def frozen(self) -> bool:
        """Whether what lives of the tree is in the group, and the group is frozen."""
        try:
            events = (self.group / "cgroup.events").read_text(encoding="ascii")
            wanted = (self.group / "cgroup.freeze").read_text(encoding="ascii").strip()
        except OSError:
            return False
        inside = all(
            _group_of(pid).is_relative_to(self.group)
            for pid, start, _ in self.pids
            if _is(pid, start)
        )
        return wanted == "1" and "frozen 1" in events and inside

    @property
    def by_image(self) -> dict[int, int]:
        """The pids of this host by those of CRIU's images."""
        return {inner: pid for pid, _, inner in self.pids}

    # -- ending ----------------------------------------------------------------------------

    def release(self) -> None:
        """Let the tree run again, where it was; idempotent.

        Only before the destination was told to run its copy.
        """
        if self.boot != boot_id():
            return
        for pid, path in self.back.items():
            home = Path(path)
            with contextlib.suppress(OSError):
                home.mkdir(exist_ok=True)
                (home / "cgroup.procs").write_text(str(pid), encoding="ascii")
        with contextlib.suppress(OSError):
            (self.group / "cgroup.freeze").write_text("0", encoding="ascii")
        self.remove()

    def thaw_dying(self) -> None:
        """Thaw the tree's own group at once when all of the tree was killed; idempotent.

        What a killed process has left to do is to end. Later it would be too late: the runtime
        hears of the end, freezes the group itself to put it away, and waits in vain for that if
        somebody thaws it (runc for 10 s; docker then keeps the task and its shim for good).
        """
        if self.back or self.thawed or self.boot != boot_id():
            return
        if any(Member(pid, start).life(_PROC) is Life.RUNS for pid, start, _ in self.pids):
            return
        with contextlib.suppress(OSError):
            (self.group / "cgroup.freeze").write_text("0", encoding="ascii")
        self.thawed = True

    def remove(self) -> None:
        """Nothing is held any more: the group is as it was, or gone if it was made for this.

        Idempotent; nothing is done while the kernel keeps any of the tree in it.
        """
        if self.back:
            cgroup.remove(self.group)
        elif not self.thawed and not self.exists():
            # An empty cgroup that is frozen is a paused container to its runtime.
            with contextlib.suppress(OSError):
                (self.group / "cgroup.freeze").write_text("0", encoding="ascii")


def check_hold() -> Finding:
    """Whether this host can hold a tree."""
    if (_ROOT / "cgroup.controllers").exists():
        return Finding("hold", OK, "cgroup v2 can hold the source's copy")
    return Finding(
        "hold",
        REFUSED,
        "there is no cgroup v2, whose freezer holds the source's copy",
        "--mode pre-copy",
    )


def _own_group(pids: Sequence[int]) -> Path | None:
    """The cgroup that has all of the tree and nothing else, if there is one."""
    group = _group_of(pids[0])
    if group in (_ROOT, Path()):
        return None
    try:
        inside = cgroup.below(group)
    except OSError:
        return None
    return group if inside == set(pids) else None


def _group_of(pid: int) -> Path:
    """The directory of a process's cgroup; the empty path if it has ended."""
    home = _PROC / str(pid)
    if not home.exists():
        return Path()
    path = cgroup_of(home) or "/"
    return _ROOT / path.lstrip("/")


def _tracer(pid: int) -> int:
    return tracer_of(_PROC / str(pid))


def _inner_pids(pid: int) -> list[int]:
    pids = [int(word) for word in status_words(_PROC / str(pid), "NSpid")]
    if not pids:
        raise MigrationFailed(f"pid {pid} of the target has ended")
    return pids


def _start(pid: int) -> int:
    return start_time(_PROC / str(pid))


def _is(pid: int, start: int) -> bool:
    return Member(pid, start).alive(_PROC)


__all__ = ["FACT", "Freezer", "check_hold"]
