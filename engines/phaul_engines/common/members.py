"""The processes of a target, remembered so that they are found again, by another process too."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from phaul_engines.common.proctree import Process, tracer_of
from phaul_runtime.errors import OutcomeUnknown
from phaul_runtime.system.host import boot_id
from phaul_runtime.system.process import Member

LET_GO_WITHIN_S = 20.0
POLL_S = 0.02


@dataclass
class Members:
    """The processes of a tree, its root first."""

    members: list[Member] = field(default_factory=list)

    @classmethod
    def of(cls, processes: Iterable[Process]) -> Members:
        """Those of a tree that was just read."""
        return cls([Member(p.pid, p.start_time) for p in processes])

    @classmethod
    def recall(cls, identity: Mapping[str, Any]) -> Members:
        """Those that `identity` names; none of them outlived a reboot."""
        same_boot = identity.get("boot_id") == boot_id()
        return cls([Member(pid, start) for pid, start in identity.get("members", []) if same_boot])

    def identity(self) -> dict[str, Any]:
        """For `recall`; JSON values."""
        return {"boot_id": boot_id(), "members": [[m.pid, m.start_time] for m in self.members]}

    def gone(self) -> bool:
        """Whether the root has ended, once CRIU has let go of it and no signal is on its way.

        Raises:
            OutcomeUnknown: that has not come about within `LET_GO_WITHIN_S` seconds.
        """
        if not self.members:
            return True
        root = self.members[0]
        deadline = time.monotonic() + LET_GO_WITHIN_S
        while root.settled() and (tracer := tracer_of(root.pid)):
            if time.monotonic() > deadline:
                raise OutcomeUnknown(
                    f"process {root.pid} is traced by process {tracer}, which does not let go of "
                    f"it within {LET_GO_WITHIN_S:g} s: it is not known whether it will run",
                    hint="end what traces it, then ask again",
                )
            time.sleep(POLL_S)
        return not root.settled()

    def ended(self) -> bool:
        """Whether the root has ended by now."""
        return not (self.members and self.members[0].alive())

    def dead(self) -> bool:
        """Whether nothing of the tree is left."""
        return not any(member.alive() for member in self.members)

    def await_end(self, within_s: float) -> bool:
        """Wait until the kernel has put all of it away; False if that lasts longer."""
        deadline = time.monotonic() + within_s
        while any(member.exists() for member in self.members):
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True

    def kill(self) -> None:
        """End what is left of it."""
        for member in self.members:
            member.kill()
