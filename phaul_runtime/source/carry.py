"""Carrying a target's files and trees while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from phaul_runtime.cutover.cutover import Destination, Held, Running
from phaul_runtime.cutover.journal import Journal
from phaul_runtime.engine.interface import SourceHalf
from phaul_runtime.engine.targets import FileFact, Tree
from phaul_runtime.errors import MigrationFailed, PhaulError
from phaul_runtime.events import FilesCopied, Listener, Staging, Warned
from phaul_runtime.files.compare import gather
from phaul_runtime.files.staged_files import FileSender
from phaul_runtime.files.tree_sender import STAGED, TreeSender, trees_to_carry
from phaul_runtime.rpc import phaul_pb2 as pb
from phaul_runtime.rpc.client import RemoteAgent
from phaul_runtime.source.preflight import Checked
from phaul_runtime.system.cancel import Cancellation

if TYPE_CHECKING:
    from phaul_runtime.config.model import Config


class Carriage(Destination):
    """The destination of one migration as the cut-over sees it: files and trees are sent from here.

    Args:
        agent: of the destination, with the migration open.
        cancellation: ends what takes its time.
        timeout_s: how long a tree may give no sign of life.
    """

    def __init__(self, agent: RemoteAgent, cancellation: Cancellation, timeout_s: float) -> None:
        self._agent = agent
        self._cancellation = cancellation
        self._timeout_s = timeout_s
        self._files: FileSender | None = None
        self._copy = False
        self._staged = 0
        self._trees: TreeSender | None = None

    # -- while the target runs -------------------------------------------------------------

    def carry_files(self, facts: Iterable[FileFact], differing: Iterable[str]) -> FileSender:
        """Stage the files that differ, remember the others."""
        self._files = FileSender(facts, differing)
        self._copy = True
        self._agent.put_files(self._files.first())
        self._staged = self._files.bytes
        return self._files

    def watch_files(self, facts: Iterable[FileFact]) -> None:
        """Files are not to be copied: refuse in the freeze if one was changed meanwhile."""
        self._files = FileSender(facts, ())
        self._copy = False

    def carry_first(self, tree: Tree, listener: Listener) -> tuple[int, dict[str, str]]:
        """Carry a tree that goes first, and let the engine there have it.

        Returns:
            The bytes sent, and where each tree lies there from now on.
        """
        sender = self._sender_of([tree], listener, dict)
        sender.carry_once()
        return sender.bytes, self._agent.arrived(tree.name)

    def carry_trees(
        self,
        trees: Sequence[Tree],
        listener: Listener,
        mapped: Callable[[], Mapping[str, Iterable[str]]],
    ) -> None:
        """Synchronise trees; `sync_files` does it for the last time.

        Args:
            trees: what to carry.
            listener: told of each tree and pass.
            mapped: see `SourceHalf.mapped`.
        """
        self._trees = self._sender_of(trees, listener, mapped)
        self._trees.sync()

    def _sender_of(
        self,
        trees: Sequence[Tree],
        listener: Listener,
        mapped: Callable[[], Mapping[str, Iterable[str]]],
    ) -> TreeSender:
        sender = TreeSender(
            trees,
            open_stream=self._agent.open_tree,
            explain=self._agent.tree_failure,
            there=self._agent.name,
            timeout_s=self._timeout_s,
            cancellation=self._cancellation,
            listener=listener,
            mapped=mapped,
        )
        self._agent.when_silent(sender.stop)
        return sender

    def freshen_trees(self) -> None:
        """Just before the freeze: leave less of the trees for it."""
        if self._trees is not None:
            self._trees.freshen()

    # -- in the freeze ---------------------------------------------------------------------

    def sync_files(self) -> tuple[int, int]:  # the bytes are of all earlier passes over trees, too
        files, sent = self._sync_changed()
        if self._trees is None:
            return files, sent
        self._trees.finish()
        return files, sent + self._trees.bytes

    def stop_files(self) -> None:
        if self._trees is not None:
            self._trees.stop()

    def _sync_changed(self) -> tuple[int, int]:
        if self._files is None:
            return 0, 0
        changed = self._files.changed()
        if not changed:
            return self._files.files, self._files.bytes - self._staged
        if not self._copy:
            self._refuse_changed(changed)
            return 0, 0
        self._agent.put_files(self._files.again(changed))
        return self._files.files, self._files.bytes - self._staged

    def _refuse_changed(self, changed: Iterable[FileFact]) -> None:
        facts = [fact for fact in (gather(each.path) for each in changed) if fact is not None]
        _, differing = self._agent.check(pb.CheckRequest(), facts)
        if differing:
            raise MigrationFailed(
                "files changed while the target was being moved: "
                + ", ".join(verdict.path for verdict in differing),
                hint="--files copy carries them",
            )

    def prepare(self, images_dir: Path) -> tuple[Held, int]:
        return self._agent.prepare(images_dir)

    def commit(self) -> Running:
        return self._agent.commit()


def carry_files(carriage: Carriage, config: Config, checked: Checked, listener: Listener) -> int:
    """Stage the files that differ; returns the bytes sent."""
    if checked.hosts.same:
        return 0  # one file system
    files = checked.inspection.files
    if config.filesystem.files != "copy":
        carriage.watch_files(files)
        return 0
    sender = carriage.carry_files(files, checked.differing)
    if sender.files:
        listener(FilesCopied(sender.files, sender.bytes, final=False))
    return sender.bytes


class TreeCarrier:
    """Carries the trees of one migration.

    Args:
        carriage: to the destination.
        there: what messages call the destination.
        source: the engine's half here.
        journal: of the migration: a tree that is made for the move is noted before.
        listener: told of what takes its time.
        cancellation: ends the making of a tree.
        same_host: both ends are on one host.
    """

    def __init__(
        self,
        carriage: Carriage,
        there: str,
        source: SourceHalf,
        *,
        journal: Journal,
        listener: Listener,
        cancellation: Cancellation,
        same_host: bool,
    ) -> None:
        self._carriage = carriage
        self._there = there
        self._source = source
        self._journal = journal
        self._listener = listener
        self._cancellation = cancellation
        self._same_host = same_host

    def carry(self, trees: Sequence[Tree], places: Mapping[str, str]) -> int:
        """Carry all; returns the bytes sent of those that go first.

        Args:
            trees: of the target.
            places: where each lies at the destination.
        """
        sent = 0
        for tree in (tree for tree in trees if tree.first):
            # Each may bring the places of those after it.
            if self._to_carry([tree], places):
                self._journal.add(STAGED, tree.name)
                count, places = self._carry_first(tree)
                sent += count
        rest = [tree for tree in trees if not tree.first]
        if rest:
            rest = self._to_carry(rest, places)
            self._carriage.carry_trees(rest, self._listener, self._source.mapped)
        return sent

    def _to_carry(self, trees: Sequence[Tree], places: Mapping[str, str]) -> list[Tree]:
        return trees_to_carry(trees, places, self._there, same_host=self._same_host)

    def _carry_first(self, tree: Tree) -> tuple[int, dict[str, str]]:
        """Have a tree made, and carry it; returns the bytes sent and all places from now on."""
        self._listener(Staging(tree.name))
        try:
            self._source.stage(tree.name, self._cancellation)
            return self._carriage.carry_first(tree, self._listener)
        finally:
            try:
                self._source.unstage(tree.name)
            except PhaulError as error:
                text = f"tree {tree.name} is left on this host: {error.message}"
                self._listener(Warned(text))
