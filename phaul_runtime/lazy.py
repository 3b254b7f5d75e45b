"""One migration's lazy restore at the destination: the index of its chain, its pager, its plan.

The restored process runs before its memory is in place; a pager beside it fills the rest from the
images on this host, what is touched first. So the freeze does not grow with memory, and nothing
depends on the source once the copy runs.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phaul_runtime import cgroup
from phaul_runtime.chainindex import ChainIndex
from phaul_runtime.errors import DestinationError, PhaulError
from phaul_runtime.lazyimages import plan_lazy
from phaul_runtime.lazyplan import PAGE
from phaul_runtime.pager import LAZY_SOCKET
from phaul_runtime.pager.client import PagerClient

log = logging.getLogger(__name__)

MODES = ("auto", "lazy", "full")
# Below that, starting CRIU outweighs reading the pages.
AUTO_FROM = 16 << 20
_PLACE = "pager"
_PLAN = "plan"
_START_S = 60.0
_ANSWER_S = 10.0
# A pager whose agent is gone and that nothing needs ends after that.
_GRACE_S = 5.0
STALLED_S = 120.0
_POLL_S = 0.2


@dataclass(frozen=True)
class Filled:
    """How far a pager is: `ms` from the moment when the copy ran, to the last page or to now."""

    over: bool
    pages: int
    missing: int
    faults: int
    worst_fault_ms: float
    ms: float


class LazyRestore:
    """What the destination does for a lazy restore, from the first iteration to the last page.

    Args:
        mode: `lazy` fails where it cannot be; `auto` then restores in full, as `full` does.
        directory: the migration's, which has the image directories.
        name: of the pager's cgroup: it outlives the agent's.
        cannot: asked, beside the first iterations, why engine or host cannot; empty if they can.
    """

    def __init__(
        self, mode: str, directory: Path, name: str, cannot: Callable[[], str] = str
    ) -> None:
        self._mode = mode
        self._cannot = cannot
        self._place = directory / _PLACE
        self._name = name
        self._why_not = "restore: full" if mode == "full" else ""
        self._index = ChainIndex()
        self._pager: PagerClient | None = None
        self._starting: threading.Thread | None = None
        self._handing: threading.Thread | None = None
        self._not_handed: PhaulError | None = None

    @property
    def why_not(self) -> str:
        """Why the restore is a full one; empty if it is lazy, or may yet be."""
        return self._why_not

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

        Raises:
            DestinationError: `restore: lazy`, and it cannot be.
        """
        if self._starting is not None:
            self._starting.join(_START_S)
        if not self._why_not:
            try:
                self._make_plan(images_dir)
            except (OSError, DestinationError) as error:
                self._fall_back(error)
        if self._why_not and self._mode == "lazy":
            raise DestinationError(
                f"no lazy restore: {self._why_not}", hint="restore: auto, or full"
            )
        if self._why_not:
            self.stop()
        return not self._why_not

    def _make_plan(self, images_dir: Path) -> None:
        plan = plan_lazy(self._index, images_dir)
        size = plan.pages * PAGE
        if self._mode == "auto" and size < AUTO_FROM:
            self._why_not = f"{size >> 20} MiB are restored as fast at once"
            return
        plan.save(self._place / _PLAN)
        if self._pager is None:
            raise DestinationError("there is no pager")
        # CRIU looks for it in its work directory.
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

    def handed(self) -> bool:
        """After the restore: whether the pager has its plan; otherwise the copy has no memory.

        Raises:
            DestinationError: `restore: lazy`, and it has not.
        """
        if self._handing is not None:
            self._handing.join()
        if self._not_handed is not None:
            self._fall_back(self._not_handed)
        return not self._why_not

    def _fall_back(self, error: Exception) -> None:
        if self._mode == "lazy":
            raise DestinationError(f"no lazy restore: {error}") from error
        log.warning("%s: restored in full: %s", self._name, error)
        self._why_not = str(error)

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
        return _filled(self._pager.status())

    def watch(self, tell: Callable[[Filled], object]) -> None:
        """Until the last page is in, tell how far it is.

        Raises:
            DestinationError: nobody knows any more, or nothing has come for `STALLED_S` seconds.
        """
        missing, since = -1, time.monotonic()
        while True:
            now = self.filled()
            tell(now)
            if now.over:
                break
            if now.missing != missing:
                missing, since = now.missing, time.monotonic()
            elif time.monotonic() - since > STALLED_S:
                raise DestinationError(f"{missing} pages are missing, and the pager does nothing")
            time.sleep(_POLL_S)
        if self._pager is not None:
            self._pager.close()
        cgroup.remove_once_empty(self._name)

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


def _filled(status: Mapping[str, Any]) -> Filled:
    return Filled(
        over=status["state"] == "done",
        pages=int(status["pages"]),
        missing=int(status["missing"]),
        faults=int(status["faults"]),
        worst_fault_ms=float(status["worst_fault_ms"]),
        ms=float(status["ms"]),
    )


__all__ = ["MODES", "Filled", "LazyRestore"]
