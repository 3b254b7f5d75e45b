"""One migration's lazy restore at the destination: the index of its chain, its pager, its plan.

The restored process runs before its memory is in place; a pager beside it fills the rest from the
images on this host, what is touched first. So the freeze does not grow with private anonymous
memory, and nothing depends on the source once the copy runs. Unless the dump left pages with the
source's processes (`postcopy`): they come into a store in the pager's directory, and there is no
other restore.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phaul_runtime.destination.restored import by_image
from phaul_runtime.errors import DestinationError, PhaulError
from phaul_runtime.memory.fill_plan import PAGE
from phaul_runtime.memory.mark_lazy import MAP, plan_lazy
from phaul_runtime.memory.page_index import PageIndex
from phaul_runtime.memory.preallocate import Preallocation
from phaul_runtime.pager import LAZY_SOCKET
from phaul_runtime.pager.client import PagerClient
from phaul_runtime.postcopy import store
from phaul_runtime.postcopy.pages import RemotePages
from phaul_runtime.postcopy.store import PageStore
from phaul_runtime.system import cgroup

log = logging.getLogger(__name__)

MODES = ("auto", "lazy", "full")
# Below that, starting CRIU outweighs reading the pages.
AUTO_FROM = 16 << 20
PLACE = "pager"
_PLAN = "plan"
_START_S = 60.0
_ANSWER_S = 10.0
# Pages may have to come from the source for it.
_VERIFY_S = 60.0
# A pager whose agent is gone and that nothing needs ends after that.
_GRACE_S = 5.0
STALLED_S = 120.0
_ENDS_S = 10.0
_POLL_S = 0.2


@dataclass(frozen=True)
class Filled:
    """How far a pager is: `ms` from the moment when the copy ran, to the last page or to now.

    `remote_missing` pages have not come from the source; the process may not need all of them.

    All `pages`, those that forked children missed among them, are `missing` yet, or were `filled`,
    or were there already (`present`), or were given up (`dropped`), or ended with their process
    (`ended`), or were left out of a fork (`unshared`), or are `lost`. `notes` say what went wrong.
    """

    over: bool
    pages: int
    missing: int
    faults: int
    worst_fault_ms: float
    ms: float
    remote_missing: int = 0
    filled: int = 0
    present: int = 0
    dropped: int = 0
    ended: int = 0
    unshared: int = 0
    lost: int = 0
    notes: list[str] = field(default_factory=list)


class LazyRestore:
    """What the destination does for a lazy restore, from the first iteration to the last page.

    Args:
        mode: `lazy` fails where it cannot be; `auto` then restores in full, as `full` does.
        directory: the migration's, which has the image directories.
        name: of the pager's cgroup: it outlives the agent's.
        cannot: asked, beside the first iterations, why engine or host cannot; empty if they can.
        place: the pager's directory in the migration's: one pager, one place.
        room: for pages that come after the commit, if any was made; its maker drops it.
    """

    def __init__(
        self,
        mode: str,
        directory: Path,
        name: str,
        cannot: Callable[[], str] = str,
        place: str = PLACE,
        *,
        room: Preallocation | None = None,
    ) -> None:
        self._mode = mode
        self._cannot = cannot
        self._place = directory / place
        self._room = room
        self._name = name
        self._why_not = "restore: full" if mode == "full" else ""
        self._index = PageIndex()
        self._pager: PagerClient | None = None
        self._starting: threading.Thread | None = None
        self._handing: threading.Thread | None = None
        self._not_handed: PhaulError | None = None
        # Pages that are still at the source: no full restore has them.
        self._must = mode == "lazy"
        self._store: PageStore | None = None

    @property
    def why_not(self) -> str:
        """Why the restore is a full one; empty if it is lazy, or may yet be."""
        return self._why_not

    @property
    def place(self) -> Path:
        """The pager's directory."""
        return self._place

    @property
    def store(self) -> PageStore | None:
        """Where pages come that are still at the source; None if there are none, or no plan yet.

        The receiver (`postcopy.receiver`) closes it.
        """
        return self._store

    def begin(self) -> None:
        """Start the pager, beside the first iterations: an interpreter takes its time to start."""
        if not self._why_not and self._starting is None:
            self._starting = threading.Thread(target=self._start, name="start pager", daemon=True)
            self._starting.start()

    def _start(self) -> None:
        try:
            self._why_not = self._cannot()
            if self._why_not:
                return
            self._place.mkdir(mode=0o700, exist_ok=True)
            grace = ("--grace", f"{_GRACE_S:g}")
            self._pager = PagerClient.start(self._place, timeout_s=_START_S, extra=grace)
            for pid in filter(None, self._pager.status()["pids"]):
                cgroup.adopt(self._name, pid)
        except (OSError, PhaulError) as error:
            self._why_not = f"the pager does not start: {error}"

    def await_started(self) -> None:
        """Before a freeze that no rounds precede: the pager takes longer to start than it."""
        if self._starting is not None:
            self._starting.join(_START_S)

    def add(self, images_dir: Path) -> None:
        """An iteration is whole: know its pages before the freeze.

        Raises:
            DestinationError: `restore: lazy`, and it cannot be.
        """
        if self._why_not:
            return
        try:
            self._index.add(images_dir)
        except DestinationError as error:
            self._fall_back(error)

    def plan(self, images_dir: Path) -> bool:
        """In the freeze: whether the restore may begin as a lazy one; `handed` follows it.

        If pages are still at the source it is one, and `store` is there, empty: the restore itself
        may wait for some of them.

        Raises:
            DestinationError: `restore: lazy`, or pages are still at the source, and it cannot be.
        """
        self.await_started()
        try:
            if not self._why_not:
                self._make_plan(images_dir)
        except (OSError, DestinationError) as error:
            self._look_for_remote(images_dir)
            self._fall_back(error)
        else:
            if self._why_not:
                self._look_for_remote(images_dir)
        if self._why_not and self._must:
            hint = "restore: auto, or full" if self._mode == "lazy" else ""
            raise DestinationError(self._refusal(self._why_not), hint=hint)
        if self._why_not:
            self.stop()
        return not self._why_not

    def _look_for_remote(self, images_dir: Path) -> None:
        """Before a restore in full: CRIU would read as zero what is still at the source."""
        self._must = self._mode == "lazy" or RemotePages.of(images_dir).total > 0

    def _make_plan(self, images_dir: Path) -> None:
        plan = plan_lazy(self._index, images_dir, self._place / store.PAGES)
        size = plan.pages * PAGE
        self._must = self._mode == "lazy" or bool(plan.remote)
        if self._mode == "auto" and size < AUTO_FROM and not plan.remote:
            self._why_not = f"{size >> 20} MiB are restored as fast at once"
            return
        if plan.remote:
            earlier, self._store = self._store, None
            if earlier is not None:
                earlier.close()
            room, self._room = self._room, None
            self._store = PageStore.create(self._place, plan.remote_pages, room)
        plan.save(self._place / _PLAN)
        if self._pager is None:
            raise DestinationError("there is no pager")
        # CRIU looks for it in its work directory.
        (images_dir / LAZY_SOCKET).unlink(missing_ok=True)
        (images_dir / LAZY_SOCKET).symlink_to(self._place / LAZY_SOCKET)
        # Beside the restore: the pager makes a twin that knows the plan, which takes its time.
        self._handing = threading.Thread(
            target=self._hand_over, args=(self._pager,), name="hand over plan", daemon=True
        )
        self._handing.start()

    def _hand_over(self, pager: PagerClient) -> None:
        try:
            pager.plan(self._place / _PLAN, timeout_s=_ANSWER_S)
        except PhaulError as error:
            self._not_handed = error

    def handed(self, root: int) -> bool:
        """While the copy is held: whether its pager can give it all of its memory.

        Args:
            root: of the restored tree, its pid on this host.

        Returns:
            False: it must not run, and is to be restored in full.

        Raises:
            DestinationError: the pager cannot, and `restore: lazy`, or pages are still at the
                source.
        """
        if self._handing is not None:
            self._handing.join()
        try:
            if self._not_handed is not None:
                raise self._not_handed
            if not self._why_not:
                self._verify(root)
        except PhaulError as error:
            self._fall_back(error)
        return not self._why_not

    def _verify(self, root: int) -> None:
        if self._pager is None:
            raise DestinationError("there is no pager")
        found = self._pager.verify(by_image(root), timeout_s=_VERIFY_S)
        if found["registered"] or found["overwritten"]:
            log.info(
                "%s: CRIU had left out %d areas, which the pager has registered; %d pages were "
                "touched before, and have been overwritten",
                self._name,
                found["registered"],
                found["overwritten"],
            )

    def _fall_back(self, error: Exception) -> None:
        if self._must:
            raise DestinationError(self._refusal(error)) from error
        log.warning("%s: restored in full: %s", self._name, error)
        self._why_not = str(error)

    def _refusal(self, why: object) -> str:
        must = "" if self._mode == "lazy" else ", and pages are still at the source"
        return f"no lazy restore{must}: {why}"

    def follow(self, images_dir: Path) -> None:
        """Know a whole chain, which was not seen to grow; `begin` and `plan` follow.

        Raises:
            DestinationError: an image is missing or malformed.
        """
        self._index = PageIndex.follow(images_dir)

    def resume(self) -> None:
        """Take up the pager and the store of an agent that died while the copy was filled.

        `watch`, `filled`, `lost` and `store` work from now on as they did there.

        Raises:
            DestinationError: nobody knows how far it is; or the store is not as it was.
        """
        pager = PagerClient(self._place)
        pager.status()
        if (self._place / MAP).exists():
            self._store = PageStore.open(self._place)
        self._pager, self._why_not = pager, ""

    def lost(self) -> bool:
        """Whether a held copy has lost its pager, and with it its memory."""
        try:
            return self._pager is None or (
                not self._pager.connected() and self._pager.status()["state"] == "done"
            )
        except PhaulError:
            return True

    def filled(self) -> Filled:
        """How far it is, of a copy that runs.

        Raises:
            DestinationError: there is no pager any more, and nobody knows.
        """
        if self._pager is None:
            raise DestinationError("there is no pager")
        return filled_of(self._pager.status())

    def watch(self, tell: Callable[[Filled], object]) -> None:
        """Until the last page is in, tell how far it is.

        Raises:
            DestinationError: nobody knows any more, or nothing has come for `STALLED_S` seconds.
                What is still at the source may take as long as it takes.
        """
        try:
            self._watch(tell)
        finally:
            # Of a pager that has ended, however it did; one that goes on keeps it.
            cgroup.remove_once_empty(self._name, within_s=_ENDS_S)

    def _watch(self, tell: Callable[[Filled], object]) -> None:
        missing, since = -1, time.monotonic()
        while True:
            now = self.filled()
            tell(now)
            if now.over:
                break
            if now.missing != missing or now.remote_missing:
                # How long pages are in coming from elsewhere, nobody can say.
                missing, since = now.missing, time.monotonic()
            elif time.monotonic() - since > STALLED_S:
                raise DestinationError(f"{missing} pages are missing, and the pager does nothing")
            time.sleep(_POLL_S)
        for note in now.notes:
            log.error("%s: %s", self._name, note)
        if self._pager is not None:
            self._pager.close()

    def cut(self) -> None:
        """From another thread: a restore that waits for pages, which will not come, is to fail now.

        Never raises. CRIU cannot say to a pager that has ended that it is finished, so nothing of
        what it restored runs.
        """
        if self._pager is not None:
            # A connection of its own: the other thread may wait for an answer on the pager's.
            with contextlib.suppress(PhaulError, OSError):
                PagerClient(self._place).stop()

    def stop(self, why: str = "the pager was stopped") -> None:
        """Nothing that needs it runs: end it; idempotent, never raises."""
        for thread in (self._starting, self._handing):
            if thread is not None:
                thread.join(_START_S)
        self._why_not = self._why_not or why
        pager, self._pager = self._pager, None
        if pager is not None:
            with contextlib.suppress(PhaulError):
                pager.stop()
        cgroup.remove_once_empty(self._name)


FATES = ("filled", "present", "dropped", "ended", "unshared", "lost")
"""What became of pages: numbers of a `Filled`."""


def filled_of(status: Mapping[str, Any]) -> Filled:
    """A pager's status or result."""
    return Filled(
        over=status["state"] == "done",
        pages=int(status["pages"]),
        missing=int(status["missing"]),
        faults=int(status["faults"]),
        worst_fault_ms=float(status["worst_fault_ms"]),
        ms=float(status["ms"]),
        remote_missing=int(status.get("remote_missing", 0)),
        **{name: int(status.get(name, 0)) for name in FATES},
        notes=[str(note) for note in status.get("notes", ())],
    )


__all__ = ["FATES", "MODES", "Filled", "LazyRestore", "filled_of"]
