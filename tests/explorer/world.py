"""What lies outside of phaul-runtime: processes, CRIU, the network and the clock, as facts.

A `World` is one victim on two hosts. Every step that the code takes on it is a *point*, at which a
fault may come: the process that takes it is killed, the disk refuses, a message is lost. What the
kernel and CRIU do then is done here: a CRIU whose client ends lets go of the tree that it stopped
(states.py, fact 1), and ends the copy that it holds.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from phaul_runtime.criu.session import Criu
from phaul_runtime.engine import (
    DestinationHalf,
    Engine,
    Finding,
    Handover,
    Inspection,
    SourceHalf,
)
from phaul_runtime.errors import MigrationFailed, PhaulError
from phaul_runtime.library.api import Outcome, PhaulConfig, PhaulLocal
from phaul_runtime.memory.image_dirs import RESUMED, new_directory
from phaul_runtime.system.cancel import Cancellation

CRASH, DISK, LOST, NO_REPLY, TWICE, CRIU_DIES = (
    "killed", "disk refuses", "message lost", "answer lost", "message twice", "CRIU killed",
)  # fmt: skip


class Crash(BaseException):
    """The process that runs now was killed."""


class Wrong(AssertionError):
    """Both copies run, or one that ran was ended."""


@dataclass
class Process:
    """A phaul-runtime: of a command, or an agent."""

    name: str
    alive: bool = True
    at_death: list[Callable[[], object]] = field(default_factory=list)


@dataclass
class World:
    """One victim on two hosts.

    Attributes:
        members: of the source's tree, root first: `runs`, `stopped` by CRIU, or `dead`.
        frozen: the cgroup of a post-copy move holds them.
        copy: at the destination: empty, `held` by CRIU, or `runs`.
        whole: the copy of a post-copy move has all pages.
        fault: at which point of the current command what happens.
        points: of the current command, what may happen at each.
    """

    members: dict[str, str] = field(default_factory=lambda: {"root": "runs", "child": "runs"})
    frozen: bool = False
    copy: str = ""
    whole: bool = False
    now: float = 0.0
    fault: tuple[int, str] | None = None
    points: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    process: Process = field(default_factory=lambda: Process("nobody"))
    on_sleep: list[Callable[[], object]] = field(default_factory=list)
    announced: set[str] = field(default_factory=set)

    # -- points ----------------------------------------------------------------------------

    def point(self, label: str, *more: str) -> str:
        """A step is about to be taken; returns which of `more` happens, if anything does."""
        if not self.process.alive:
            raise Crash
        self.check()
        self.points.append((f"{self.process.name}: {label}", (CRASH, *more)))
        if self.fault is None or self.fault[0] != len(self.points) - 1:
            return ""
        what = self.fault[1]
        if what == CRASH:
            self.kill(self.process)
            raise Crash
        return what

    def kill(self, process: Process) -> None:
        """What its death does to others."""
        process.alive = False
        for then in reversed(process.at_death):
            then()
        process.at_death.clear()
        self.check()

    @contextlib.contextmanager
    def running(self, process: Process) -> Iterator[None]:
        """The steps in here are that process's."""
        before, self.process = self.process, process
        try:
            yield
        finally:
            self.process = before

    # -- the kernel ------------------------------------------------------------------------

    @property
    def source_runs(self) -> bool:
        return not self.frozen and "runs" in self.members.values()

    @property
    def source_lives(self) -> bool:
        return any(state != "dead" for state in self.members.values())

    def check(self) -> None:
        """The promise: never two."""
        if self.source_runs and self.copy == "runs":
            raise Wrong(f"both run: {self.members}, {self.copy}")

    def stop(self) -> None:
        for name, state in self.members.items():
            if state == "runs":
                self.members[name] = "stopped"

    def let_go(self) -> None:
        """CRIU has ended, or says no: what it stopped runs, unless its cgroup is frozen."""
        for name, state in self.members.items():
            if state == "stopped":
                self.members[name] = "runs"

    # -- the clock -------------------------------------------------------------------------

    def monotonic(self) -> float:
        self.now += 1e-6
        return self.now

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for then in list(self.on_sleep):
            then()


class Options(BaseModel):
    """There are none."""


class ModelEngine(Engine):
    """An engine over a `World`."""

    name = "model"
    options_model = Options

    def __init__(self, world: World) -> None:
        self.world = world

    def source(self, target: str, options: Any, *, criu_log_level: int) -> SourceHalf:
        return ModelSource(self.world)

    def destination(self, options: Any, *, criu_log_level: int, hold_s: float) -> DestinationHalf:
        return ModelDestination(self.world)


class ModelSource(SourceHalf):
    """As `TrackedSource`."""

    no_post_copy = ""

    def __init__(self, world: World) -> None:
        self.world = world

    def inspect(self) -> Inspection:
        return Inspection(pid=1, memory=1 << 20, manifest={}, findings=[])

    def local(self, handover: Handover, cancellation: Cancellation) -> PhaulLocal:
        return ModelLocal(self, handover)

    def identity(self) -> Mapping[str, Any]:
        return {"members": list(self.world.members)}

    def recall(self, identity: Mapping[str, Any]) -> None:
        pass

    def processes(self) -> Sequence[int]:
        return [1, 2]

    def gone(self) -> bool:
        return self.world.members["root"] == "dead"

    def dead(self) -> bool:
        return not self.world.source_lives

    def end_rest(self) -> None:
        for name in self.world.members:
            self.world.point(f"ends {name}")
            self.world.members[name] = "dead"

    def finish(self) -> Sequence[str]:
        self.world.point("cleans the source")
        return []

    def rollback(self) -> None:
        self.world.point("rolls the source back")


class ModelLocal(PhaulLocal):
    """As `ProcessLocal`: CRIU's dump, with its client's word in the middle."""

    def __init__(self, source: ModelSource, handover: Handover) -> None:
        self.source, self.handover, self.world = source, handover, source.world

    def dump_copy_restore(
        self, criu: Criu, config: PhaulConfig, last_client_images_dir: str | None
    ) -> Outcome:
        world, images_dir = self.world, new_directory(Path(config.wdir), "final")
        (images_dir / "pagemap-1.img").touch()
        self.handover.freezing(self.source.identity())
        world.stop()
        world.process.at_death.append(world.let_go)
        try:
            self._dump(images_dir)
        except PhaulError:
            # CRIU has ended, as it does with a no, and lets go of what it has not killed.
            world.let_go()
            if self.handover.held:
                pass
            elif self.handover.committing and self.source.gone():
                self.source.end_rest()
            else:
                raise
        world.process.at_death.clear()
        return self.handover.commit(self.source.dead, None)

    def _dump(self, images_dir: Path) -> None:
        self.handover.prepare(images_dir, self.source.identity())
        if self.handover.held:
            raise MigrationFailed("CRIU was killed")
        self.world.point("answers yes")
        # From here on CRIU goes on alone.
        self.world.process.at_death[:] = [self._kill]
        for name in self.world.members:
            if self.world.point(f"CRIU kills {name}", CRIU_DIES):
                raise MigrationFailed("CRIU was killed")
            self.world.members[name] = "dead"

    def _kill(self) -> None:
        for name in self.world.members:
            self.world.members[name] = "dead"


class ModelDestination(DestinationHalf):
    """As `ProcessDestination`: what it discards is what its group has, whoever let it run."""

    can_be_lazy = True

    def __init__(self, world: World) -> None:
        self.world = world
        self._resumed = False
        self._images_dir = Path()

    def check(self, manifest: Mapping[str, Any]) -> Sequence[Finding]:
        return []

    def prepare(self, manifest: Mapping[str, Any], migration_id: str) -> None:
        self.world.point("prepares")

    def restore(self, criu: Criu, images_dir: Path, *, lazy: bool = False) -> int:
        self.world.point("restores")
        self._resumed, self._images_dir = False, images_dir
        assert not self.world.copy
        self.world.copy = "held"
        self.world.process.at_death.append(self._unheld)
        return 7

    def _unheld(self) -> None:
        if self.world.copy == "held":
            self.world.copy = ""

    def resume(self) -> float:
        if self.world.copy != "held":
            raise MigrationFailed("nothing was restored")
        self.world.point("lets it run")
        self.world.copy = "runs"
        (self._images_dir / RESUMED).touch()
        # CRIU has answered, and its client may not live to hear it.
        self.world.point("has let it run")
        self._resumed = True
        return self.world.monotonic()

    def wait_let_go(self) -> None:
        pass

    def discard(self) -> None:
        if self._resumed:
            return
        self.world.point("discards")
        if self.world.copy == "runs":
            raise Wrong("what ran is discarded")
        self.world.copy = ""

    def undo(self) -> None:
        self.world.point("undoes")


@dataclass
class ModelHold:
    """As `freezer.Freezer`."""

    world: World
    group: str = "group"

    def require(self, images: object) -> None:
        pass

    def facts(self) -> dict[str, Any]:
        return {"held": True}

    def take(self) -> None:
        self.world.point("freezes the cgroup")
        self.world.frozen = True
        self.world.point("ends CRIU")
        self.world.let_go()

    def cut_loose(self) -> None:
        self.world.let_go()

    def lives(self) -> bool:
        return self.world.source_lives

    def exists(self) -> bool:
        return self.lives()

    def frozen(self) -> bool:
        return self.world.frozen

    def release(self) -> None:
        self.world.point("thaws the cgroup")
        self.world.frozen = False
        self.world.check()

    def remove(self) -> None:
        if not self.world.source_lives:
            self.world.frozen = False

    def thaw_dying(self) -> None:
        self.remove()


def close_in(directory: Path, numbers: Iterable[int] | None = None) -> None:
    """Close the descriptors of files in a directory: all, or those of some numbers."""
    for number in list(map(int, os.listdir("/proc/self/fd"))) if numbers is None else numbers:
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{number}").startswith(str(directory)):
                os.close(number)
