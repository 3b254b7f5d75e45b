"""The runc and crun engines: a container, through its runtime's own checkpoint and restore.

Pre-dumps are CRIU's, on the container's init, as for a plain process: one way for all engines, and
no start of the runtime in each round. The final dump and the restore are the runtime's, which knows
what the container is made of; their CRIU asks at the gate (phaul_hooks.gate) before the steps that
decide. Memory takes the same socket in all of them: CRIU inherits it through the runtime
(`ps-socket`).
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from phaul_hooks.gate import Gate

from phaul_engines import netlock
from phaul_engines.gated import GatedCommand
from phaul_engines.members import Members
from phaul_engines.oci import Container, Runtime, cgroup_of, read_container, read_limits
from phaul_engines.oci_checks import target_findings
from phaul_engines.proctree import Tree, established_connections, read_tree
from phaul_engines.runc_arrival import RuncDestination, common_flags, leave_bundle
from phaul_engines.runc_options import CrunOptions, RuncOptions
from phaul_runtime.api import Outcome, PhaulConfig, PhaulLocal
from phaul_runtime.cancel import Cancellation
from phaul_runtime.criu import Criu
from phaul_runtime.engine import (
    DestinationHalf,
    Engine,
    Handover,
    Inspection,
    SourceHalf,
)
from phaul_runtime.errors import PhaulError, Refused, TargetGone, UsageError
from phaul_runtime.filesystem import gather
from phaul_runtime.images import new_directory, relative_parent
from phaul_runtime.rpc import phaul_pb2 as pb
from phaul_runtime.stats import DumpStats, read_dump_stats
from phaul_runtime.trees import Tree as FileTree

ROOTFS = "rootfs"
# No page server answers there: should CRIU not have read our configuration, the dump fails, instead
# of killing the container with nobody holding its pages.
_NOWHERE = "127.0.0.1:1"
# CRIU gets the memory channel under a number that the runtime cannot give to anything of its own:
# runc puts CRIU's socket at 3, whatever was inherited there.
_MEMORY_FROM = 200
_NAME = re.compile(r"[A-Za-z0-9_+.][A-Za-z0-9_+.-]*")
# The script's own limit is the last resort, for a phaul-runtime that hangs: longer than its waits.
VERDICT_WITHIN_S = 900.0
DUMP_WITHIN_S = 3600.0


class RuncEngine(Engine):
    """`--engine runc NAME`."""

    name = "runc"
    options_model: type[RuncOptions] = RuncOptions

    def source(self, target: str, options: Any, *, criu_log_level: int) -> SourceHalf:
        """See `Engine`.

        Raises:
            UsageError: `target` is no container's name.
        """
        if not _NAME.fullmatch(target):
            raise UsageError(
                f"{target!r} is no container's name", hint=f"migrate --engine {self.name} NAME"
            )
        return RuncSource(target, options)

    def destination(self, options: Any, *, criu_log_level: int, hold_s: float) -> DestinationHalf:
        """See `Engine`."""
        return RuncDestination(options, hold_s)


class CrunEngine(RuncEngine):
    """`--engine crun NAME`: the same with crun, whose command line is runc's."""

    name = "crun"
    options_model = CrunOptions


class RuncSource(SourceHalf):
    """The source half."""

    def __init__(self, name: str, options: RuncOptions) -> None:
        self._name = name
        self.options = options
        self.runtime = Runtime(options.binary, options.root)
        self._container: Container | None = None
        self._tree: Tree | None = None
        self._members = Members()
        self._connections: list[netlock.Connection] = []
        self._netns = ""
        self._bundle = ""

    def inspect(self) -> Inspection:
        """See `SourceHalf`."""
        if os.geteuid() != 0:
            raise Refused("moving a container needs root", hint="run phaul-runtime as root")
        container = read_container(self.runtime, self._name)
        self._container = container
        tree = self.look()
        rootfs = container.rootfs.resolve()
        if rootfs == Path("/"):
            raise Refused(f"the root file system of {self._name} is this host's own")
        cgroup = cgroup_of(container.pid)
        return Inspection(
            pid=container.pid,
            memory=sum(member.memory for member in tree.members),
            files=self._single_files(container),
            trees=[FileTree(*place) for place in self._places(container).values() if place[0]],
            manifest={
                "name": container.name,
                "bundle": str(container.bundle),
                "config": dict(container.config),
                "cgroup": cgroup,
                "limits": read_limits(cgroup),
                "mounts": {
                    mount.source: self.options.mounts.get(mount.source, "")
                    for mount in container.binds
                    if mount.directory
                },
            },
            findings=target_findings(container, tree, self.options, root=self.options.binary),
        )

    def _single_files(self, container: Container) -> list[pb.FileFact]:
        facts = [gather(mount.source) for mount in container.binds if not mount.directory]
        return [fact for fact in facts if fact is not None]

    def _places(self, container: Container) -> dict[str, tuple[str, str]]:
        """Path in the container to the tree that lies there, by name and host path; the name is
        empty where nothing is carried.
        """
        places = {"/": (ROOTFS, str(container.rootfs.resolve()))}
        number = 0
        for mount in container.binds:
            name = ""
            if self.options.mounts.get(mount.source) == "rsync" and mount.directory:
                number += 1
                name = f"mount-{number}"
            places[mount.destination.rstrip("/") + "/"] = (name, mount.source)
        return places

    def mapped(self) -> Mapping[str, Iterable[str]]:
        """See `SourceHalf`."""
        if self._container is None or self._tree is None:
            return {}
        places = self._places(self._container)
        found: dict[str, list[str]] = {}
        for use in self._tree.files.values():
            if use.shared_map:
                inside = max((at for at in places if use.path.startswith(at)), key=len)
                found.setdefault(places[inside][0], []).append(use.path[len(inside) :])
        return {name: paths for name, paths in found.items() if name}

    def look(self) -> Tree:
        """Read the container's processes as they are now."""
        if self._container is None:
            raise TargetGone(f"container {self._name} was not inspected")
        tree = self._tree = read_tree(self._container.pid)
        self._members = Members.of(tree.members)
        self._connections = established_connections(tree)
        self._netns = self._container.namespaces.get("network", "")
        self._bundle = str(self._container.bundle)
        return tree

    def local(self, handover: Any, cancellation: Cancellation) -> PhaulLocal:
        """See `SourceHalf`."""
        return RuncLocal(self, handover)

    def identity(self) -> Mapping[str, Any]:
        """See `SourceHalf`."""
        return {
            **self._members.identity(),
            "connections": [list(c) for c in self._connections],
            "netns": self._netns,
            "bundle": self._bundle,
        }

    def recall(self, identity: Mapping[str, Any]) -> None:
        """See `SourceHalf`."""
        self._members = Members.recall(identity)
        self._connections = [
            (str(a), int(b), str(c), int(d)) for a, b, c, d in identity.get("connections", [])
        ]
        self._netns = str(identity.get("netns", ""))
        self._bundle = str(identity.get("bundle", ""))

    def gone(self) -> bool:
        """See `SourceHalf`."""
        return self._members.gone()

    def dead(self) -> bool:
        """Whether nothing of the container is left."""
        return self._members.dead()

    def end_rest(self) -> None:
        """See `SourceHalf`."""
        self._members.kill()

    def finish(self) -> Sequence[str]:
        """See `SourceHalf`: the runtime forgets the container; its bundle stays, as it was last."""
        warnings = []
        try:
            state = self.runtime.state(self._name)
            if state is not None and state["status"] == "stopped":
                trouble = self.runtime.delete(self._name)
                if trouble:
                    warnings.append(f"{self.options.binary} delete {self._name}: {trouble}")
        except PhaulError as error:
            warnings.append(error.message)
        if self._bundle:
            leave_bundle(Path(self._bundle))
        if not self._netns:
            return [*warnings, *netlock.release(self._connections)]
        if self.options.network_lock == "keep":
            return [*warnings, f"CRIU's lock (chain CRIU) stays in {self._netns}, as configured"]
        netlock.release_namespace(self._netns)
        return warnings

    def rollback(self) -> None:
        """See `SourceHalf`: CRIU lets the container run; killed, it leaves it frozen and locked."""
        if self._netns:
            netlock.release_namespace(self._netns)
        else:
            netlock.release(self._connections, all_of_them=True)
        try:
            state = self.runtime.state(self._name)
            if state is not None and state["status"] == "paused" and not self.gone():
                self.runtime.resume(self._name)
        except PhaulError:
            return  # a runtime that does not answer cannot have frozen anything just now


class RuncLocal(PhaulLocal):
    """The final dump by the runtime; the cut-over happens while its CRIU waits at the gate."""

    def __init__(self, source: RuncSource, handover: Handover) -> None:
        self._source = source
        self._handover = handover
        self._images_dir = Path()

    def dump_copy_restore(
        self, criu: Criu, config: PhaulConfig, last_client_images_dir: str | None
    ) -> Outcome:
        """See `PhaulLocal`."""
        self._images_dir = new_directory(Path(config.wdir), "final")
        memory = fcntl.fcntl(config.memfd, fcntl.F_DUPFD_CLOEXEC, _MEMORY_FROM)
        gate = Gate(
            self._images_dir / "gate",
            deadline_s=VERDICT_WITHIN_S,
            options=["page-server", f"ps-socket {memory}"],
        )
        command = GatedCommand(
            self._argv(last_client_images_dir),
            gate,
            name=self._source.options.binary,
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
            os.close(memory)
        if code != 0:
            if self._handover.committing and self._source.gone():
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
        options = self._source.options
        words = [
            "checkpoint",
            *("--image-path", str(self._images_dir), "--work-path", str(self._images_dir)),
            *common_flags(options),
        ]
        if parent is not None:
            words += ["--parent-path", relative_parent(self._images_dir, parent) or ""]
        if Path(options.binary).name == "runc":
            words += ["--page-server", _NOWHERE]
        return self._source.runtime.argv(*words, self._source._name)

    def _on(self, action: str) -> None:
        if action == "pre-dump":
            if self._source.gone():
                raise TargetGone("the container has ended by itself")
            self._source.look()
            self._handover.freezing(self._source.identity())
            self._asked_at = time.monotonic()
        elif action == "post-dump":
            self._handover.prepare(self._images_dir)


__all__ = ["CrunEngine", "RuncEngine", "RuncLocal", "RuncSource"]
