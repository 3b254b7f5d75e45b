"""Host hooks: what makes a host ready once, found by entry point (`phaul_runtime.hooks`).

Some engines need a daemon of the host to be configured before it can give or take containers. What
that takes is theirs to know; `phaul-runtime hook install` finds it here. A third party's needs an
entry point, and no change here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points

from phaul_runtime.errors import UsageError

GROUP = "phaul_runtime.hooks"


@dataclass(frozen=True)
class Status:
    """How it stands with a host hook on this host.

    Attributes:
        installed: `install` was run and `remove` was not since.
        lines: what keeps it from working, or what else there is to say; may be empty.
    """

    installed: bool
    lines: Sequence[str] = ()


class HostHook(ABC):
    """What a host needs; made without arguments. Disturbs nothing that runs."""

    @abstractmethod
    def install(self) -> Sequence[str]:
        """Make the host ready; idempotent, after an interruption too.

        Returns what was done and what the operator still has to do, a line each; it may be empty
        if the host was ready already.

        Raises:
            Refused: why not; nothing was changed.
        """

    @abstractmethod
    def remove(self) -> Sequence[str]:
        """Undo what `install` changed and nothing else; idempotent. Returns and raises as it."""

    @abstractmethod
    def status(self) -> Status:
        """How it stands; changes nothing, raises nothing."""


def host_hook_names() -> list[str]:
    """Those that can be installed, sorted."""
    return sorted(entry.name for entry in entry_points(group=GROUP))


def load_host_hook(name: str) -> HostHook:
    """Load the one called `name`.

    Raises:
        UsageError: there is none; the message names those that there are.
    """
    for entry in entry_points(group=GROUP, name=name):
        hook: HostHook = entry.load()()
        return hook
    raise UsageError(
        f"unknown hook {name!r}", hint=f"there are: {', '.join(host_hook_names()) or 'none'}"
    )
