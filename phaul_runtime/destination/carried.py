"""The files and trees of a migration at its destination: taken, put in place, kept or undone."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from phaul_runtime.cutover.journal import Journal
from phaul_runtime.engine.interface import DestinationHalf
from phaul_runtime.errors import DestinationError, PhaulError
from phaul_runtime.files.staged_files import FilePart, FileStage
from phaul_runtime.files.tree_server import TreeServer, read_line
from phaul_runtime.system.cancel import Cancellation
from phaul_runtime.system.threads import attempt

log = logging.getLogger(__name__)


class Carried:
    """What is carried beside the memory of one migration.

    Args:
        journal: of the destination's role: what is made is noted there before.
        engine: the engine's half here, which says where trees lie.
    """

    def __init__(self, journal: Journal, engine: DestinationHalf) -> None:
        self._engine = engine
        self._stage = FileStage(journal)
        self._trees = TreeServer(journal)
        self._giving_up = Cancellation()

    def recall(self) -> None:
        """Know what an earlier agent has staged."""
        self._stage.recall()

    @property
    def places(self) -> Mapping[str, Path]:
        """Where each tree lies here."""
        return self._trees.places

    @property
    def failures(self) -> Mapping[str, PhaulError]:
        """Why the last stream of a tree failed, where this side knows a reason."""
        return self._trees.failures

    def place_trees(self) -> None:
        """Ask the engine where its trees lie."""
        self._trees.place(self._engine.trees())

    def put_files(self, parts: Iterable[FilePart]) -> None:
        """Stage files."""
        try:
            for part in parts:
                self._stage.take(part)
        finally:
            self._stage.end_stream()

    def serve_tree(
        self, name: str, channel: socket.socket, step: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """Let rsync have a connection until it ends, and close it.

        Args:
            name: of the tree.
            channel: the connection.
            step: entered while rsync is started; it refuses where no tree may come any more.
        """
        try:
            line = read_line(channel)
            if not line:
                return
            with step():
                process = self._trees.start(name, line, channel)
            self._trees.attend(name, process)
        except PhaulError as error:
            self._trees.failed(name, error)
        finally:
            # Only now, with the reason told, may the client see the end.
            with contextlib.suppress(OSError):
                channel.shutdown(socket.SHUT_RDWR)
            channel.close()

    def arrived(self, name: str) -> None:
        """A tree that goes first is whole: let the engine have it, and ask for all places anew.

        Raises:
            PhaulError: it is of no use to the engine, or the migration is given up.
        """
        if name not in self._trees.places:
            raise DestinationError(f"no tree {name[:40]!r} in this migration")
        self._trees.wait_ended()
        self._engine.arrived(name, self._giving_up)
        self.place_trees()

    def await_trees(self) -> None:
        """Wait until no tree is written to any more.

        Raises:
            DestinationError: one still is.
        """
        self._trees.wait_ended()

    def install_files(self) -> None:
        """Put what was staged in its place, in the freeze."""
        self._stage.install()

    def keep_files(self) -> None:
        """The copy runs: what was replaced goes."""
        self._stage.keep()

    def give_up(self) -> None:
        """End what takes its time: rsync, and the engine's work on a tree. Idempotent."""
        self._trees.stop()
        self._giving_up.request()

    def undo(self) -> None:
        """Put this host back to what it was; what cannot be is left, and logged."""
        self._trees.stop()
        attempt("ending its trees", self._trees.wait_ended)
        attempt("undoing its files", self._stage.undo)
        attempt("undoing what its engine made", self._engine.undo)
        attempt("undoing its trees", self._trees.undo)
