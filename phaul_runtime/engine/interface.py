"""The Engine interface and its lookup by entry point (`phaul_runtime.engines`).

An engine has two halves. The source half runs beside the client, the destination half inside the
agent; what the one has to tell the other travels as a JSON manifest that the core does not read.
A third party's engine installs an entry point and needs no change here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from phaul_runtime.engine.findings import Finding
from phaul_runtime.engine.targets import FileFact, Tree
from phaul_runtime.errors import Refused, UsageError
from phaul_runtime.library.api import Outcome, PhaulLocal
from phaul_runtime.system.cancel import Cancellation

if TYPE_CHECKING:
    from pydantic import BaseModel

    from phaul_runtime.criu.session import Criu

GROUP = "phaul_runtime.engines"


@dataclass(frozen=True)
class Inspection:
    """What the source half found out about a target, before anything is touched.

    Attributes:
        pid: root of the tree to dump.
        memory: resident bytes of the whole tree.
        files: what has to exist at the destination.
        manifest: for the engine's other half; JSON values only.
        findings: of its own checks, those that passed among them.
        trees: directories that are carried, unless the two hosts share their storage. The core
            tells which to both sides: the manifest that it sends has `rootfs`: shared | rsync.
            A tree with `first` is carried in either case, wherever the destination's half has a
            place for it: it is made for the move, and lies in no storage that the hosts share.
    """

    pid: int
    memory: int
    files: Sequence[FileFact] = ()
    manifest: Mapping[str, Any] = field(default_factory=dict)
    findings: Sequence[Finding] = ()
    trees: Sequence[Tree] = ()


class Handover(Protocol):
    """The cut-over as an engine's source half drives it; see `cutover.cutover.CutOver`."""

    @property
    def committing(self) -> bool:
        """`prepare` has returned: the source's copy lives only if CRIU did not hear of it."""

    @property
    def post_copy(self) -> bool:
        """The final dump is to leave out the contents of lazy pages (CRIU's `lazy-pages`), without
        a page server.
        """

    @property
    def held(self) -> bool:
        """Of a post-copy move: `prepare` has frozen the tree by a cgroup and killed CRIU. So the
        dump fails, and `commit` is next all the same.
        """

    def freezing(self, identity: Mapping[str, Any]) -> None:
        """The final dump begins; `identity` as of `SourceHalf`, now.

        Raises `Cancelled` if that was asked for.
        """

    def stopped(self) -> None:
        """All of the tree is known to stand still, and the dump goes on: what can be carried beside
        it is. From any thread; need not be called.
        """

    def prepare(self, images_dir: Path, identity: Mapping[str, Any] | None = None) -> int:
        """With the tree frozen: carry files and images over, have it restored and held.

        `identity` is the tree's as it stands still, if it may differ from that told to `freezing`:
        it may have forked in between.

        Returns the held root's pid. Raising means that the source must run on.
        """

    def commit(self, source_is_dead: Callable[[], bool], frozen_at: float | None = None) -> Outcome:
        """Once the source's copy is dead: let the destination's run; returns what was measured.

        `frozen_at` is the `time.monotonic()` at which CRIU froze the tree, where it is known.

        Raises `OutcomeUnknown` if the destination does not confirm it. Never undoes anything.
        """


class SourceHalf(ABC):
    """An engine on the source host, for one target."""

    @abstractmethod
    def inspect(self) -> Inspection:
        """Look at the target; changes nothing, may be repeated.

        Raises:
            NoSuchTarget: there is none.
        """

    @abstractmethod
    def local(self, handover: Handover, cancellation: Cancellation) -> PhaulLocal:
        """The engine's `PhaulLocal` for the target last inspected."""

    @abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """What finds the target last inspected again after this process's end; JSON values."""

    @abstractmethod
    def recall(self, identity: Mapping[str, Any]) -> None:
        """Be the half that said `identity`, in another process: for the methods below."""

    def stage(self, name: str, cancellation: Cancellation) -> None:  # noqa: B027 - most have none
        """Make the contents of a tree with `first`, at its path; the target runs.

        Called only if the destination has a place for it. May take long, and ends on a request.

        Raises:
            Cancelled: that was asked for.
            PhaulError: it cannot be made; `unstage` follows as ever.
        """

    def unstage(self, name: str) -> None:  # noqa: B027 - most have none
        """Remove what `stage` made, or began to make; idempotent, whether that succeeded or not.

        After this process's end a recovery calls it, of a half that has recalled an identity.

        Raises:
            PhaulError: something is left; that is a warning, the move goes on.
        """

    def mapped(self) -> Mapping[str, Iterable[str]]:
        """In the freeze: files that are mapped shared and writable now; adds to `Tree.always`.

        By the trees' names, relative to their paths.
        """
        return {}

    no_post_copy = "its engine cannot leave pages at the source"
    """Why not; empty for a half whose dump follows `Handover.post_copy`."""

    def processes(self) -> Sequence[int]:
        """In the freeze: the pids of all of the tree, on this host, its root first."""
        raise Refused(self.no_post_copy)

    def throttle_cgroup(self) -> Path:
        """The directory of a cgroup v2 that holds the target last inspected and nothing else.

        Its cpu.max may be lowered while the target runs, and is set back. Changes nothing, may be
        repeated; `throttle.own_cgroup` finds it for a tree of processes.

        Raises:
            Refused: why the target cannot be slowed; the move goes on without.
        """
        raise Refused("its engine cannot slow it")

    @abstractmethod
    def gone(self) -> bool:
        """Whether the root of the target has ended, once CRIU has let go of it; may be repeated.

        Ended is a process that can run nothing any more, though the kernel may still free its
        memory (`system.process.Member`).

        Raises:
            OutcomeUnknown: it is traced, or dying, and stays so.
        """

    @abstractmethod
    def end_rest(self) -> None:
        """The root was killed: end what CRIU did not live to kill. Idempotent."""

    @abstractmethod
    def finish(self) -> Sequence[str]:
        """After the commit: clean the source; idempotent. Returns warnings, raises nothing."""

    @abstractmethod
    def rollback(self) -> None:
        """After a failure: whatever the engine changed is undone, the target runs; idempotent."""


@dataclass(frozen=True)
class Claim:
    """What a manifest wants of this host that `agent.allow` may be about.

    Attributes:
        name: that the target will have here; empty if it has none, as a process.
        programs: that it brings along and that are run outside of it, as a container's hooks.
    """

    name: str = ""
    programs: tuple[str, ...] = ()


class DestinationHalf(ABC):
    """An engine on the destination host, for one migration."""

    def claim(self, manifest: Mapping[str, Any]) -> Claim | None:
        """Read from what is acted upon here, not from what the source calls it; changes nothing.

        None where it cannot be told: a host that limits names or programs then refuses it.
        """
        return None

    @abstractmethod
    def check(self, manifest: Mapping[str, Any]) -> Sequence[Finding]:
        """Hold a target's manifest against this host; changes nothing, may be repeated."""

    @abstractmethod
    def prepare(self, manifest: Mapping[str, Any], migration_id: str) -> None:
        """Set up what the target needs (bundle, container, network); nothing runs.

        Called again, with the same arguments, where a recovery goes on after an agent's death.
        """

    can_be_lazy = False
    """`restore` can have CRIU leave out the pages that are marked as lazy."""

    @abstractmethod
    def restore(self, criu: Criu, images_dir: Path, *, lazy: bool = False) -> int:
        """Rebuild the target and hold it in post-restore; returns its root's pid.

        Raising means that nothing of it is left. May be repeated after `discard`.

        Args:
            criu: a session factory.
            images_dir: the final images; CRIU's work directory as well.
            lazy: CRIU's `lazy-pages`; their pager listens in that directory. Only if
                `can_be_lazy`.
        """

    @abstractmethod
    def resume(self) -> float:
        """Let the held copy run; returns the `time.monotonic()` at which it did.

        Raises if it does not run. To be called once for each restore.
        """

    @abstractmethod
    def wait_let_go(self) -> None:
        """Wait until no CRIU of an earlier process works on this migration's restore any more.

        If the copy runs then, what only the move needed is put away. Idempotent.
        """

    @abstractmethod
    def discard(self) -> None:
        """End and remove all that was restored and not resumed, by this process or an earlier one.

        Idempotent; after it `restore` may be called again. Once this object's `resume` has returned
        it does nothing. Of what an earlier process resumed, the core does not call it.
        """

    def trees(self) -> Mapping[str, Path]:
        """Where each tree of the manifest given to `prepare` lies on this host.

        A directory that is missing is made when its tree arrives, and removed after `undo` if the
        migration is given up; one that was there before keeps what was carried into it.

        Asked after `prepare`, and again after each `arrived`. A tree with `first` that has no place
        is not needed here. The others may get theirs as late as by the last `arrived`.
        """
        return {}

    def arrived(self, name: str, cancellation: Cancellation) -> None:  # noqa: B027 - most have none
        """A tree with `first` is whole at its place, and none of the others has been begun.

        Make of it what it was carried for; then `trees` may know more places. May take long, and
        ends on a request: the migration is given up. What was carried is this half's to remove.
        `prepare`, where a recovery calls it again, may find what was done here.

        Raises:
            Cancelled: that was asked for.
            PhaulError: it is of no use; the move fails, `discard` and `undo` follow.
        """

    def undo(self) -> None:  # noqa: B027 - most engines make nothing
        """After `discard`, when the migration is given up: remove what was made, by `prepare` or in
        `arrived`.

        Idempotent; may come without `prepare`, or after one that failed. Nothing may be left
        mounted in a tree.
        """


class Engine(ABC):
    """An engine: its options and its two halves."""

    name: str
    options_model: type[BaseModel]

    @abstractmethod
    def source(
        self,
        target: str,
        options: Any,
        *,
        criu_log_level: int,
    ) -> SourceHalf:
        """The source half for `target`; `options` is an instance of `options_model`."""

    @abstractmethod
    def destination(
        self,
        options: Any,
        *,
        criu_log_level: int,
        hold_s: float,
    ) -> DestinationHalf:
        """The destination half."""


Engines = Callable[[str], Engine]
"""Find an engine by its name, as `load_engine`."""


def engine_names() -> list[str]:
    """The engines that are installed, sorted."""
    return sorted(entry.name for entry in entry_points(group=GROUP))


def load_engine(name: str) -> Engine:
    """Load the engine called `name`.

    Raises:
        UsageError: there is none; the message names those that there are.
    """
    for entry in entry_points(group=GROUP, name=name):
        engine: Engine = entry.load()()
        return engine
    raise UsageError(
        f"unknown engine {name!r}", hint=f"installed engines: {', '.join(engine_names()) or 'none'}"
    )
