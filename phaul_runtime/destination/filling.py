"""How far the pager of a copy that runs is: watched, kept for who asks, written down."""

from __future__ import annotations

import logging
from collections.abc import Callable

from phaul_runtime.cutover.journal import Journal
from phaul_runtime.cutover.progress import write_progress
from phaul_runtime.cutover.states import Role, State
from phaul_runtime.destination.lazy_restore import Filled, LazyRestore
from phaul_runtime.errors import DestinationError, PhaulError

log = logging.getLogger(__name__)


class Filling:
    """The pager of one migration's copy, as this agent sees it.

    Args:
        journal: of the destination's role.
        given_up: whether this agent has let go of the migration.
    """

    def __init__(self, journal: Journal, given_up: Callable[[], bool]) -> None:
        self._journal = journal
        self._given_up = given_up
        self._now: Filled | PhaulError | None = None

    def watch(self, lazy: LazyRestore) -> None:
        """Watch it until the last page is in, it is lost, or this agent has let go."""
        try:
            lazy.watch(self._tell)
        except PhaulError as error:
            if not self._given_up():
                log.error("%s", error)
            self._now = error

    def _tell(self, now: Filled) -> None:
        self._now = now
        if self._journal.state is State.POST_COPY:
            write_progress(
                self._journal.path.parents[1],
                self._journal.id,
                Role.DESTINATION,
                pages=now.pages,
                missing=now.missing,
            )
        if self._given_up():
            raise DestinationError("left to its pager")

    @property
    def lost(self) -> bool:
        """The pager is gone, or was told to stop, before the last page was in."""
        return isinstance(self._now, PhaulError)

    def now(self) -> Filled | None:
        """How far it is; None before anything is known.

        Raises:
            PhaulError: it is lost, and pages with it.
        """
        if isinstance(self._now, PhaulError):
            raise self._now
        return self._now
