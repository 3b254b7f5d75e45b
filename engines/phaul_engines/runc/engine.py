"""The runc and crun engines: a container, through its runtime's own checkpoint and restore.

Pre-dumps are CRIU's, on the container's init, as for a plain process: one way for all engines, and
no start of the runtime in each round. The final dump and the restore are the runtime's, which knows
what the container is made of; their CRIU asks at the gate (phaul_hooks.gate) before the steps that
decide. Memory takes the same socket in all of them: CRIU inherits it through the runtime
(`ps-socket`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phaul_engines.common import netlock
from phaul_engines.oci.checks import has_shared_masks, target_findings
from phaul_engines.oci.options import CrunOptions, RuncOptions
from phaul_engines.oci.runtime import (
    Container,
    Runtime,
    cgroup_of,
    common_flags,
    read_container,
    read_limits,
    single_files,
)
from phaul_engines.oci.source import OciSource
from phaul_engines.runc.arrival import RuncDestination, leave_bundle
from phaul_runtime.engine import DestinationHalf, Engine, Inspection, SourceHalf
from phaul_runtime.engine import Tree as FileTree
from phaul_runtime.errors import PhaulError, Refused, UsageError

ROOTFS = "rootfs"
_NAME = re.compile(r"[A-Za-z0-9_+.][A-Za-z0-9_+.-]*")


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
        return RuncDestination(options, hold_s)


class CrunEngine(RuncEngine):
    """`--engine crun NAME`: the same with crun, whose command line is runc's."""

    name = "crun"
    options_model = CrunOptions


class RuncSource(OciSource):
    """The source half."""

    def __init__(self, name: str, options: RuncOptions) -> None:
        super().__init__(Runtime(options.binary, options.root), common_flags(options))
        self._name = name
        self.options = options
        self._bundle = ""
        # As `RuncDestination.can_be_lazy`.
        lazy = Path(options.binary).name == "runc"
        self.no_post_copy = "" if lazy else f"{options.binary} restores nothing lazily"

    @property
    def runtime_name(self) -> str:
        return self._name

    def inspect(self) -> Inspection:
        if os.geteuid() != 0:
            raise Refused("moving a container needs root", hint="run phaul-runtime as root")
        container = read_container(self.runtime, self._name)
        self._container = container
        self._bundle = str(container.bundle)
        tree = self.look()
        rootfs = container.rootfs.resolve()
        if rootfs == Path("/"):
            raise Refused(f"the root file system of {self._name} is this host's own")
        cgroup = cgroup_of(container.pid)
        return Inspection(
            pid=container.pid,
            memory=sum(member.memory for member in tree.members),
            files=single_files(container.binds),
            trees=[FileTree(*place) for place in self._places(container).values() if place[0]],
            manifest={
                "name": container.name,
                "bundle": str(container.bundle),
                "config": dict(container.config),
                "cgroup": cgroup,
                "limits": read_limits(cgroup),
                "shared_masks": has_shared_masks(container.pid),
                "mounts": {
                    mount.source: self.options.mounts.get(mount.source, "")
                    for mount in container.binds
                    if mount.directory
                },
            },
            findings=target_findings(container, tree, self.options, root=self.options.binary),
        )

    def _places(self, container: Container) -> dict[str, tuple[str, str]]:
        places = {"/": (ROOTFS, str(container.rootfs.resolve()))}
        number = 0
        for mount in container.binds:
            name = ""
            if self.options.mounts.get(mount.source) == "rsync" and mount.directory:
                number += 1
                name = f"mount-{number}"
            places[mount.destination.rstrip("/") + "/"] = (name, mount.source)
        return places

    def _network_of(self, container: Container) -> str:
        return container.namespaces.get("network", "")

    def identity(self) -> Mapping[str, Any]:
        return {**super().identity(), "bundle": self._bundle}

    def recall(self, identity: Mapping[str, Any]) -> None:
        super().recall(identity)
        self._bundle = str(identity.get("bundle", ""))

    def finish(self) -> Sequence[str]:
        """See `SourceHalf`: the runtime forgets the container; its bundle stays, as it was last."""
        self.await_end()
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
            return [*warnings, *netlock.release(self._connections, table=self._lock_table)]
        if self.options.network_lock == "keep":
            return [*warnings, f"CRIU's lock (chain CRIU) stays in {self._netns}, as configured"]
        netlock.release_namespace(self._netns)
        return warnings


__all__ = ["CrunEngine", "RuncEngine"]
