"""The contract of the library, the ancestor's by name.

A program brings its own `PhaulLocal` (how to take the final dump and bring the tree up elsewhere)
and its own `PhaulRemote` (how to reach the destination's `PhaulServer`), and lets `PhaulClient`
drive them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from phaul_runtime.errors import PhaulError, UsageError

if TYPE_CHECKING:
    from phaul_runtime.criu.session import Criu


@dataclass(frozen=True)
class PhaulConfig:
    """What client and server have to know.

    Attributes:
        pid: root of the tree to move, in the caller's pid namespace (the server ignores it).
        memfd: connected stream socket to the other side; carries memory and nothing else.
        wdir: directory for the numbered image directories; it exists and is private.
    """

    pid: int
    memfd: int
    wdir: str


@dataclass(frozen=True)
class Outcome:
    """What a `PhaulLocal` may tell of a finished switch-over.

    Attributes:
        restored_pid: the new root's pid in the destination's outer pid namespace.
        downtime_ms: from the freeze to the moment when the destination's copy ran.
        freeze: the steps of that time, name to milliseconds.
        pages_written: pages of the final dump.
        pages_skipped: pages that the final dump left to its parents.
        extra_bytes: images and files that went over the control channel.
        warnings: what the user should know of a move that succeeded.
    """

    restored_pid: int | None = None
    downtime_ms: float | None = None
    freeze: dict[str, float] = field(default_factory=dict)
    pages_written: int = 0
    pages_skipped: int = 0
    extra_bytes: int = 0
    warnings: tuple[str, ...] = ()


class PhaulLocal(ABC):
    """The engine's own way to switch over, on the source host."""

    @abstractmethod
    def dump_copy_restore(
        self, criu: Criu, config: PhaulConfig, last_client_images_dir: str | None
    ) -> Outcome | None:
        """Dump for the last time, carry the images over, restore there.

        Success (returning) means: exactly the destination's copy lives. Failure (raising) means:
        the source's copy runs on, unless the error is an `OutcomeUnknown`. Not idempotent; after
        a failure it must not be called again with the same `last_client_images_dir`, since a
        failed dump resets the kernel's dirty tracking.

        Args:
            criu: a session factory; each request starts a swrk of its own.
            config: the client's configuration; memory goes to `config.memfd` (`ps.fd`), where a
                page server awaits it.
            last_client_images_dir: the images of the last pre-dump, to be used as parent, or
                None if there was none: then the dump is full.
        """


class PhaulRemote(ABC):
    """The client's view of the destination's server."""

    @abstractmethod
    def start_iter(self) -> None:
        """A page server awaits memory on the server's memfd when this returns.

        Success changes nothing but that. Not idempotent: each call begins a directory.
        """

    @abstractmethod
    def stop_iter(self) -> None:
        """The page server has taken everything and ended well when this returns.

        Raises if it did not: then the iteration's images are worthless, and so is the chain.
        """

    def start_local(self) -> Mapping[str, bytes]:
        """For a post-copy move: a directory for a final dump that no page server takes.

        Returns:
            the page maps of the iteration before it, by file name; none if there was none.
        """
        raise UsageError("this remote has no post-copy", hint="mode: pre-copy")

    def failure(self) -> PhaulError | None:
        """Why the server's chain is worthless, if it is and that can be told; asked when a request
        to the client's CRIU has failed.
        """
        return None

    def end_chain(self) -> None:
        """Before a second attempt: call the server's `end_chain`, over a memory channel that works.

        A remote that does not implement it is good for one attempt, as the ancestor's.
        """
        raise UsageError(
            "this migration failed before, and its remote cannot begin anew",
            hint="make a new client, server and memory channel, or implement end_chain",
        )
