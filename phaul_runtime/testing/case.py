"""What the conformance suite has to be told about an engine."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from phaul_runtime.criu.session import Criu
from phaul_runtime.engine.interface import Engine
from phaul_runtime.engine.targets import Tree


class NotConforming(AssertionError):
    """The engine did what its contract forbids, or did not do what it demands."""


def expect(condition: object, message: str) -> None:
    """Hold the engine to something.

    Raises:
        NotConforming: `condition` is false.
    """
    if not condition:
        raise NotConforming(message)


class Place(Enum):
    """The source's copy of the victim, or the destination's; both are on this host."""

    SOURCE = "source"
    DESTINATION = "destination"


@dataclass(frozen=True)
class Told:
    """What a victim says of itself.

    Attributes:
        counter: grows while it runs, and nowhere else than in its own memory.
        passes: how often it has verified all of its memory.
        wrong: how much of it was not what it should be, ever.
    """

    counter: int
    passes: int
    wrong: int


class Case(ABC):
    """An engine under test, and victims for it.

    Both halves work on one host: the case says how the destination's copy can live beside the
    source's (another name, another path, a pid namespace of its own).

    Attributes:
        engine: the engine.
        options: of both halves, as in the configuration.
        within_s: how long anything may take.
        pause_s: time in which a victim that runs has surely told of a higher counter.
    """

    engine: Engine
    options: Mapping[str, Any] = {}
    within_s: float = 60.0
    pause_s: float = 0.5

    @abstractmethod
    def start(self) -> str:
        """Start a victim and return the target that the engine knows it by.

        One at a time: the bench calls `clear` before another.
        """

    @abstractmethod
    def missing(self) -> str:
        """A well-formed target that does not exist."""

    @abstractmethod
    def told(self, place: Place) -> Told | None:
        """What the victim last said there; None if it never said anything there."""

    @abstractmethod
    def alive(self, place: Place) -> bool:
        """Whether any process of that copy exists, running or held.

        To be found out from the system, not by asking the engine. Zombies do not count.
        """

    @abstractmethod
    def leftovers(self, *, undone: bool) -> Sequence[str]:
        """What there is of the destination's copy: processes, cgroups, state of a runtime.

        Args:
            undone: also what `DestinationHalf.prepare` makes.
        """

    @abstractmethod
    def clear(self) -> None:
        """End all victims and their copies, and remove all that was made; idempotent."""

    def criu(self) -> Criu | None:
        """A session factory; None for an engine that does not use CRIU at all: then no memory is
        dumped by the bench, and there is no page server.
        """
        return Criu()

    def there(self, manifest: Mapping[str, Any]) -> Mapping[str, Any]:
        """The manifest with what the destination's copy needs to live beside the source's."""
        return manifest

    def taken(self, manifest: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """A manifest for which `check` has to refuse since its name, pid or the like is taken by
        the victim that runs; None where the engine has no such notion.
        """
        return None

    def carry(self, trees: Sequence[Tree], places: Mapping[str, Path]) -> None:
        """Bring the target's directories to their places; called before the freeze and in it.

        Before all others, for one with `Tree.first` at a time, and not again.
        """
        for tree in trees:
            shutil.copytree(tree.path, places[tree.name], symlinks=True, dirs_exist_ok=True)
