"""A source half that knows its target by its processes, and their connections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phaul_engines.common.members import Members
from phaul_engines.common.netlock import Connection, table_of
from phaul_engines.common.proctree import established_connections, read_standing
from phaul_engines.common.standstill import Standstill
from phaul_runtime.engine import Handover, SourceHalf
from phaul_runtime.errors import NoSuchTarget, TargetGone
from phaul_runtime.library.throttle import own_cgroup

# The kernel frees 6 GiB a second of small pages, measured.
_ENDS_WITHIN_S = 60.0


class TrackedSource(SourceHalf):
    """What the source halves of all engines here say of a target, and how it is found again."""

    def __init__(self) -> None:
        self._members = Members()
        self._connections: list[Connection] = []
        self._lock_table = ""
        self._standstill: Standstill | None = None

    def identity(self) -> Mapping[str, Any]:
        return {
            **self._members.identity(),
            "connections": [list(c) for c in self._connections],
            "lock_table": self._lock_table,
        }

    def recall(self, identity: Mapping[str, Any]) -> None:
        self._members = Members.recall(identity)
        self._connections = [
            (str(a), int(b), str(c), int(d)) for a, b, c, d in identity.get("connections", [])
        ]
        self._lock_table = str(identity.get("lock_table", ""))

    def dump_begins(self, handover: Handover) -> None:
        """The freeze begins: tell `handover` when all have stopped, until `dump_ends`."""
        handover.freezing(self.identity())
        self._standstill = Standstill(self._members.members[0].pid, handover.stopped)

    def dump_ends(self) -> None:
        """The memory is dumped, or will not be; idempotent."""
        if self._standstill is not None:
            self._standstill.end()
            self._standstill = None

    def processes(self) -> Sequence[int]:
        return [member.pid for member in self._members.members]

    def throttle_cgroup(self) -> Path:
        return own_cgroup(member.pid for member in self._members.members)

    def stands_still(self, root: int, images_dir: Path) -> None:
        """The tree is frozen: know the children and connections that it had begun just before.

        Args:
            root: pid of the tree's root.
            images_dir: with the images of it, complete.

        Raises:
            TargetGone: it has ended.
        """
        try:
            tree = read_standing(root)
        except NoSuchTarget as error:
            raise TargetGone("the target has ended by itself") from error
        self._members = Members.of(tree.members)
        self._connections = established_connections(tree)
        self._lock_table = table_of(images_dir)

    def ended(self) -> bool:
        """Whether the root has ended by now; does not wait for what may trace it."""
        return self._members.ended()

    def gone(self) -> bool:
        return self._members.gone()

    def dead(self) -> bool:
        """Whether nothing of the target is left."""
        return self._members.dead()

    def await_end(self) -> None:
        """After the commit: the dead tree may still have its cgroup, and be a running container to
        its runtime. What comes of it if that lasts, what cleans it up says.
        """
        self._members.await_end(_ENDS_WITHIN_S)

    def end_rest(self) -> None:
        self._members.kill()
