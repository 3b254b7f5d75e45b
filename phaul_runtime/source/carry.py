"""Carrying a target's files and trees while it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from phaul_runtime.cutover.journal import Journal
from phaul_runtime.engine.interface import SourceHalf
from phaul_runtime.engine.targets import Tree
from phaul_runtime.errors import PhaulError
from phaul_runtime.events import FilesCopied, Listener, Staging, Warned
from phaul_runtime.files.tree_sender import STAGED, trees_to_carry
from phaul_runtime.rpc.client import RemoteAgent
from phaul_runtime.source.preflight import Checked
from phaul_runtime.system.cancel import Cancellation

if TYPE_CHECKING:
    from phaul_runtime.config.model import Config


def carry_files(agent: RemoteAgent, config: Config, checked: Checked, listener: Listener) -> int:
    """Stage the files that differ; returns the bytes sent."""
    if checked.hosts.same:
        return 0  # one file system
    files = checked.inspection.files
    if config.filesystem.files != "copy":
        agent.watch_files(files)
        return 0
    sender = agent.carry_files(files, checked.differing)
    if sender.files:
        listener(FilesCopied(sender.files, sender.bytes, final=False))
    return sender.bytes


class TreeCarrier:
    """Carries the trees of one migration.

    Args:
        agent: of the destination.
        source: the engine's half here.
        journal: of the migration: a tree that is made for the move is noted before.
        listener: told of what takes its time.
        cancellation: ends the making of a tree.
        same_host: both ends are on one host.
    """

    def __init__(
        self,
        agent: RemoteAgent,
        source: SourceHalf,
        journal: Journal,
        listener: Listener,
        cancellation: Cancellation,
        *,
        same_host: bool,
    ) -> None:
        self._agent = agent
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
            self._agent.carry_trees(rest, self._listener, self._source.mapped)
        return sent

    def _to_carry(self, trees: Sequence[Tree], places: Mapping[str, str]) -> list[Tree]:
        return trees_to_carry(trees, places, self._agent.name, same_host=self._same_host)

    def _carry_first(self, tree: Tree) -> tuple[int, dict[str, str]]:
        """Have a tree made, and carry it; returns the bytes sent and all places from now on."""
        self._listener(Staging(tree.name))
        try:
            self._source.stage(tree.name, self._cancellation)
            return self._agent.carry_first(tree, self._listener)
        finally:
            try:
                self._source.unstage(tree.name)
            except PhaulError as error:
                text = f"tree {tree.name} is left on this host: {error.message}"
                self._listener(Warned(text))
