"""What the source halves over an OCI runtime share: its processes, its network, the final dump."""

from __future__ import annotations

import fcntl
import os
import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from phaul_hooks.gate import Gate

from phaul_engines.common import netlock
from phaul_engines.common.members import Members
from phaul_engines.common.proctree import Tree, established_connections, read_tree
from phaul_engines.common.tracked import TrackedSource
from phaul_engines.oci.cgroupyard import yard_options
from phaul_engines.oci.gated import GatedCommand
from phaul_engines.oci.runtime import Container, Runtime
from phaul_runtime.criu.session import Criu
from phaul_runtime.criu.stats import DumpStats, read_dump_stats
from phaul_runtime.engine import Handover
from phaul_runtime.errors import PhaulError, TargetGone
from phaul_runtime.library.api import Outcome, PhaulConfig, PhaulLocal
from phaul_runtime.memory.image_dirs import new_directory, relative_parent
from phaul_runtime.system.cancel import Cancellation

# No page server answers there: should CRIU not have read our configuration, the dump fails, instead
# of killing the container with nobody holding its pages.
_NOWHERE = "127.0.0.1:1"
# CRIU gets the memory channel under a number that the runtime cannot give to anything of its own:
# runc puts CRIU's socket at 3, whatever was inherited there.
_MEMORY_FROM = 200
# The script's own limit is the last resort, for a phaul-runtime that hangs: longer than its waits.
VERDICT_WITHIN_S = 900.0
DUMP_WITHIN_S = 3600.0


class OciSource(TrackedSource):
    """A source half over an OCI runtime.

    Args:
        runtime: that runs the container.
        flags: of its checkpoint, as configured.
    """

    def __init__(self, runtime: Runtime, flags: Sequence[str]) -> None:
        super().__init__()
        self.runtime = runtime
        self.flags = tuple(flags)
        self._container: Container | None = None
        self._tree: Tree | None = None
        self._netns = ""

    @property
    @abstractmethod
    def runtime_name(self) -> str:
        """What the runtime calls the container."""

    @abstractmethod
    def _network_of(self, container: Container) -> str:
        """The path of the network namespace that CRIU locks; empty for the host's own."""

    @abstractmethod
    def _places(self, container: Container) -> dict[str, tuple[str, str]]:
        """Path in the container to the tree that lies there, by name and host path; the name is
        empty where nothing is carried.
        """

    def look(self) -> Tree:
        """Read the container's processes as they are now."""
        if self._container is None:
            raise TargetGone("the container was not inspected")
        tree = self._tree = read_tree(self._container.pid)
        self._members = Members.of(tree.members)
        self._connections = established_connections(tree)
        self._netns = self._network_of(self._container)
        return tree

    def about_to_freeze(self) -> None:
        """The final dump begins, the container runs still; raising calls it off."""
        if self.ended():
            raise TargetGone("the container has ended by itself")
        self.look()

    def has_frozen(self, images_dir: Path) -> None:
        """The final dump's tree stands still: what it is now is what is moved.

        Args:
            images_dir: with the images of it, complete.

        Raises:
            TargetGone: it has ended.
        """
        if self._container is None:
            raise TargetGone("the container was not inspected")
        self.stands_still(self._container.pid, images_dir)

    def mapped(self) -> Mapping[str, Iterable[str]]:
        if self._container is None or self._tree is None:
            return {}
        places = self._places(self._container)
        found: dict[str, list[str]] = {}
        for use in self._tree.files.values():
            if use.shared_map:
                inside = max((at for at in places if use.path.startswith(at)), key=len)
                found.setdefault(places[inside][0], []).append(use.path[len(inside) :])
        return {name: paths for name, paths in found.items() if name}

    def local(self, handover: Handover, cancellation: Cancellation) -> PhaulLocal:
        return OciLocal(self, handover)

    def identity(self) -> Mapping[str, Any]:
        return {**super().identity(), "netns": self._netns}

    def recall(self, identity: Mapping[str, Any]) -> None:
        super().recall(identity)
        self._netns = str(identity.get("netns", ""))

    def rollback(self) -> None:
        """See `SourceHalf`: CRIU lets the container run; killed, it leaves it frozen and locked."""
        if self._netns:
            netlock.release_namespace(self._netns)
        else:
            netlock.release(self._connections, table=self._lock_table, all_of_them=True)
        try:
            state = self.runtime.state(self.runtime_name)
            if state is not None and state["status"] == "paused" and not self.ended():
                self.runtime.resume(self.runtime_name)
        except PhaulError:
            return  # a runtime that does not answer cannot have frozen anything just now


class OciLocal(PhaulLocal):
    """The final dump by the runtime; the cut-over happens while its CRIU waits at the gate."""

    def __init__(self, source: OciSource, handover: Handover) -> None:
        self._source = source
        self._handover = handover
        self._images_dir = Path()

    def dump_copy_restore(
        self, criu: Criu, config: PhaulConfig, last_client_images_dir: str | None
    ) -> Outcome:
        self._images_dir = new_directory(Path(config.wdir), "final")
        memory = fcntl.fcntl(config.memfd, fcntl.F_DUPFD_CLOEXEC, _MEMORY_FROM)
        options = ["page-server", f"ps-socket {memory}"]
        if self._handover.post_copy:
            # Of the server that CRIU starts after a veto, before it gives up.
            options = ["address 127.0.0.1"]
        options += yard_options(self._images_dir)
        gate = Gate(self._images_dir / "gate", deadline_s=VERDICT_WITHIN_S, options=options)
        command = GatedCommand(
            self._argv(last_client_images_dir),
            gate,
            name=self._source.runtime.binary,
            request="DUMP",
            log=self._images_dir / "dump.log",
            pass_fds=[memory],
        )
        veto: Exception | None = None
        code: int | None = None
        try:
            command.start()
            deadline = time.monotonic() + DUMP_WITHIN_S
            while event := command.next(deadline):
                try:
                    self._on(event.action)
                except Exception as error:  # noqa: BLE001 - any error is a veto
                    veto = veto or error
                gate.answer(event, yes=veto is None)
            code = command.wait(max(0.0, deadline - time.monotonic()))
        finally:
            command.close()
            self._source.dump_ends()
            os.close(memory)
        if code != 0:
            if self._handover.held:
                pass  # As it has to be: CRIU was killed, with the container frozen.
            elif self._handover.committing and self._source.gone():
                # The container was killed, and nobody lived to say so: there is no way back.
                self._source.end_rest()
            elif veto is not None:
                raise veto
            else:
                raise command.failure()
        answered = time.monotonic()
        try:
            stats = read_dump_stats(self._images_dir)
        except PhaulError:
            stats = DumpStats()
        frozen_at = self._frozen_at(answered, stats)
        outcome = self._handover.commit(self._source.dead, frozen_at)
        return replace(
            outcome, pages_written=stats.pages_written, pages_skipped=stats.pages_skipped
        )

    _asked_at = 0.0

    def _frozen_at(self, answered: float, stats: DumpStats) -> float | None:
        """CRIU's clock of the freeze runs until it answers the runtime, which ends a little later:
        never before CRIU asked whether to begin.
        """
        if not stats.frozen_s:
            return None
        return max(self._asked_at, answered - stats.frozen_s - stats.freezing_s)

    def _argv(self, parent: str | None) -> list[str]:
        runtime = self._source.runtime
        words = [
            "checkpoint",
            *("--image-path", str(self._images_dir), "--work-path", str(self._images_dir)),
            *self._source.flags,
        ]
        if parent is not None:
            words += ["--parent-path", relative_parent(self._images_dir, parent) or ""]
        if self._handover.post_copy:
            words += ["--lazy-pages"]
        elif Path(runtime.binary).name == "runc":
            words += ["--page-server", _NOWHERE]
        return runtime.argv(*words, self._source.runtime_name)

    def _on(self, action: str) -> None:
        if action == "pre-dump":
            self._source.about_to_freeze()
            self._source.dump_begins(self._handover)
            self._asked_at = time.monotonic()
        elif action == "post-dump":
            self._source.dump_ends()
            self._source.has_frozen(self._images_dir)
            self._handover.prepare(self._images_dir, self._source.identity())


__all__ = ["OciLocal", "OciSource"]
