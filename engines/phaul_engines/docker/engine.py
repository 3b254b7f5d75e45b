"""The docker engine: a container of a docker daemon, moved underneath it.

Docker's own checkpoint has no pre-dump, and hides why it failed. So the container's runc is asked
for the final dump, as for `--engine runc`, and docker takes its end for an exit; only the restore
is the daemon's (`docker start --checkpoint`), which has to know the new container
(`docker_arrival`). Nothing has to be prepared when a container is started.
"""

from __future__ import annotations

import ipaddress
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from phaul_engines.common import netlock
from phaul_engines.common.proctree import Tree, established_connections
from phaul_engines.docker.arrival import DockerDestination
from phaul_engines.docker.config import (
    DEFAULT_BRIDGE,
    container_name,
    is_user_defined,
    networks_of,
    upper_directory,
    volumes_of,
    with_configured_macs,
)
from phaul_engines.docker.config import private_netns as has_private_netns
from phaul_engines.docker.daemon import Daemon
from phaul_engines.docker.daemon_findings import daemon_findings, no_layer
from phaul_engines.docker.findings import findings
from phaul_engines.docker.options import DockerOptions
from phaul_engines.docker.volumes import mark_moved
from phaul_engines.oci.checks import (
    connection_findings,
    stranger_findings,
    strangers,
    tree_findings,
)
from phaul_engines.oci.runtime import (
    Container,
    Mount,
    Runtime,
    common_flags,
    read_container,
    single_files,
)
from phaul_engines.oci.source import OciSource
from phaul_runtime.engine import (
    OK,
    REFUSED,
    WARNING,
    DestinationHalf,
    Engine,
    Finding,
    Inspection,
    SourceHalf,
)
from phaul_runtime.engine import Tree as FileTree
from phaul_runtime.errors import MigrationFailed, NoSuchTarget, PhaulError, Refused, UsageError
from phaul_runtime.memory.image_dirs import remove_tree
from phaul_runtime.system.cancel import Cancellation

LAYER, SHM, IMAGE = "layer", "shm", "image"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_NEVER = {"Name": "no", "MaximumRetryCount": 0}
_MIB = 1 << 20
# A health check is a process from outside; docker's own limit for one is 30 s.
_CHECK_ENDS_S = 40.0
_EXITS_S = 30.0
_POLL_S = 0.2


class DockerEngine(Engine):
    """`--engine docker NAME`."""

    name = "docker"
    options_model = DockerOptions

    def source(self, target: str, options: Any, *, criu_log_level: int) -> SourceHalf:
        """See `Engine`.

        Raises:
            UsageError: `target` is no container's name or id.
        """
        if not _NAME.fullmatch(target):
            raise UsageError(
                f"{target!r} is no container's name", hint="migrate --engine docker NAME"
            )
        return DockerSource(target, options)

    def destination(self, options: Any, *, criu_log_level: int, hold_s: float) -> DestinationHalf:
        return DockerDestination(Runtime("runc", options.runtime_root), hold_s)


class DockerSource(OciSource):
    """The source half."""

    no_post_copy = ""

    def __init__(self, target: str, options: DockerOptions) -> None:
        super().__init__(Runtime("runc", options.runtime_root), common_flags(options))
        self._target = target
        self.options = options
        self.daemon = Daemon(options.host, options.timeout_s)
        self._facts: Mapping[str, Any] = {}
        self._id = ""
        self._restart: Mapping[str, Any] = _NEVER
        self._moving: list[str] = []
        self._carries_shm = False
        self._stage: Path | None = None

    @property
    def runtime_name(self) -> str:
        return self._id

    def inspect(self) -> Inspection:
        if os.geteuid() != 0:
            raise Refused("moving a container needs root", hint="run phaul-runtime as root")
        facts = self._look_up()
        if not upper_directory(facts):
            raise no_layer(facts, self.daemon.info())
        self._id = str(facts["Id"])
        facts = self._facts = with_configured_macs(facts, self.daemon.kept(self._id))
        self._restart = facts["HostConfig"].get("RestartPolicy") or _NEVER
        try:
            container = self._container = read_container(self.runtime, self._id)
        except NoSuchTarget as error:
            raise Refused(
                f"its runc has no state in {self.runtime.root}",
                hint="engines.docker.runtime_root: DIR, where its runc keeps the containers' state",
            ) from error
        tree = self.look()
        self._carries_shm = self._shm_used()
        # On docker's own disk, which has room for images.
        self._stage = self.daemon.root / "tmp" / f"phaul-{self._id[:12]}"
        places = self._places(container)
        self._moving = [source for name, source in places.values() if name.startswith("volume-")]
        return Inspection(
            pid=container.pid,
            memory=sum(member.memory for member in tree.members),
            files=single_files(self._binds()),
            trees=[
                FileTree(IMAGE, str(self._stage), first=True),
                *(FileTree(name, source) for name, source in places.values() if name),
            ],
            manifest=self._manifest(tree, places),
            findings=self._findings(container, tree),
        )

    def _look_up(self) -> Mapping[str, Any]:
        facts = self.daemon.container(self._target)
        if facts is None:
            running = ", ".join(self.daemon.names()[:10]) or "none"
            raise NoSuchTarget(
                f"docker knows no container {self._target!r}", hint=f"running: {running}"
            )
        if not facts["State"].get("Running"):
            status = facts["State"].get("Status", "not running")
            raise NoSuchTarget(f"container {self._target} is {status}: nothing of it runs")
        return facts

    def _manifest(self, tree: Tree, places: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
        facts = self._facts
        return {
            "name": container_name(facts),
            "facts": dict(facts),
            "image": facts["Config"]["Image"],
            "image_id": facts["Image"],
            "carry_image": self.options.image == "carry",
            "host": self.options.host,
            "timeout_s": self.options.timeout_s,
            "criu": [flag.removeprefix("--") for flag in self.flags],
            "addresses": self._addresses(),
            "volumes": [
                {
                    "destination": volume.destination,
                    "name": volume.name if volume.named else "",
                    "tree": places[volume.destination.rstrip("/") + "/"][0],
                }
                for volume in volumes_of(facts)
            ],
            "mounts": {
                mount.source: self.options.mounts.get(mount.source, "")
                for mount in self._binds()
                if mount.directory
            },
            "shm": self._carries_shm,
        }

    def _addresses(self) -> dict[str, str]:
        """Its connections are kept only at the same address."""
        if not self.options.tcp_established:
            return {}
        return {
            network: str(endpoint["IPAddress"])
            for network, endpoint in networks_of(self._facts).items()
            if is_user_defined(network) and endpoint.get("IPAddress")
        }

    def _findings(self, container: Container, tree: Tree) -> list[Finding]:
        facts, options = self._facts, self.options
        version = self.daemon.version()
        memory = sum(member.memory for member in tree.members) / _MIB
        text = f"{container_name(facts)} ({tree.root.name}), {len(tree.members)} processes, "
        found = [Finding("target", OK, f"{text}{memory:.0f} MiB, image {facts['Config']['Image']}")]
        found += findings(
            facts,
            mounts=options.mounts,
            volumes=options.volumes,
            volume_facts={v.name: self.daemon.volume(v.name) or {} for v in volumes_of(facts)},
            is_directory=lambda path: Path(path).is_dir(),
        )
        found += daemon_findings(
            str(version["Version"]),
            str(version["ApiVersion"]),
            self.daemon.info(),
            private_netns=has_private_netns(facts),
            destination=False,
        )
        found += connection_findings(tree, allowed=options.tcp_established)
        found += self._address_findings(tree)
        if self._has_health_check:
            found += [
                Finding(
                    f.check, WARNING, f.text, "if it is the health check, its end is waited for"
                )
                for f in stranger_findings(tree)
            ]
        else:
            found += stranger_findings(tree)
        found += tree_findings(tree)
        return found

    def _address_findings(self, tree: Tree) -> Iterator[Finding]:
        """Connections that lead out, on the one network where no address can be asked for."""
        if not self.options.tcp_established or DEFAULT_BRIDGE not in networks_of(self._facts):
            return
        for connection in established_connections(tree):
            if not ipaddress.ip_address(connection[0]).is_loopback:
                yield Finding(
                    "docker-network",
                    REFUSED,
                    f"its connection {connection[0]}:{connection[1]} is on the default bridge, "
                    "which gives it another address there",
                    "a network of your own, with --subnet and --ip",
                )
                return

    @property
    def _has_health_check(self) -> bool:
        test = (self._facts["Config"].get("Healthcheck") or {}).get("Test") or ["NONE"]
        return bool(test[0] != "NONE")

    # -- files -----------------------------------------------------------------------------

    def _binds(self) -> list[Mount]:
        return [
            Mount(mount["Source"], mount["Destination"], not mount.get("RW", True))
            for mount in self._facts["Mounts"]
            if mount["Type"] == "bind"
        ]

    @property
    def _shm(self) -> Path:
        """What is mounted at /dev/shm: on this host, so CRIU takes it for somebody else's."""
        return self.daemon.directory(self._id) / "mounts/shm"

    def _shm_used(self) -> bool:
        return self._shm.is_dir() and any(self._shm.iterdir())

    def _places(self, container: Container) -> dict[str, tuple[str, str]]:
        places = {"/": (LAYER, upper_directory(self._facts))}
        for mount in container.binds:
            # All that docker mounts in, its own small files included; what is carried, below.
            places[mount.destination.rstrip("/") + "/"] = ("", mount.source)
        for number, volume in enumerate(volumes_of(self._facts), 1):
            shared = self.options.volumes.get(volume.name) == "shared"
            name = "" if shared else f"volume-{number}"
            places[volume.destination.rstrip("/") + "/"] = (name, volume.source)
        number = 0
        for mount in self._binds():
            if self.options.mounts.get(mount.source) == "rsync" and mount.directory:
                number += 1
                places[mount.destination.rstrip("/") + "/"] = (f"mount-{number}", mount.source)
        if self._carries_shm:
            places["/dev/shm/"] = (SHM, str(self._shm))  # noqa: S108 - the container's
        return places

    def stage(self, name: str, cancellation: Cancellation) -> None:
        """See `SourceHalf`: `docker save`."""
        if self._stage is None:
            raise MigrationFailed("the container was not inspected")
        image = str(self._facts["Config"]["Image"])
        if self.daemon.image_id(image) != self._facts["Image"]:
            image = str(self._facts["Image"])  # its tag is another image's by now
        try:
            self._stage.mkdir(mode=0o700, parents=True, exist_ok=True)
            for _ in self.daemon.save(image, self._stage / "image.tar"):
                cancellation.check()
        except OSError as error:
            raise MigrationFailed(f"cannot save the image: {error.strerror}") from error

    def unstage(self, name: str) -> None:
        if self._stage is not None:
            remove_tree(self._stage)

    # -- the move --------------------------------------------------------------------------

    def _network_of(self, container: Container) -> str:
        if not has_private_netns(self._facts):
            return ""
        return str(self._facts["NetworkSettings"].get("SandboxKey") or "")

    def about_to_freeze(self) -> None:
        super().about_to_freeze()
        self._wait_for_strangers()
        if self._shm_used() and not self._carries_shm:
            raise MigrationFailed("it has put files into /dev/shm meanwhile", hint="try again")
        if self._restart.get("Name") not in ("", "no"):
            self.daemon.set_restart_policy(self._id, _NEVER)

    def _wait_for_strangers(self) -> None:
        """A health check ends by itself; anything else that came in would end with the move."""
        deadline = time.monotonic() + (_CHECK_ENDS_S if self._has_health_check else 0.0)
        while others := strangers(self.look()):
            if time.monotonic() > deadline:
                raise MigrationFailed(
                    f"pid {others[0]} was started in the container by exec meanwhile",
                    hint="end it, and try again",
                )
            time.sleep(_POLL_S)

    def identity(self) -> Mapping[str, Any]:
        return {
            **super().identity(),
            "container": self._id,
            "restart": dict(self._restart),
            "volumes": self._moving,
            "stage": str(self._stage or ""),
        }

    def recall(self, identity: Mapping[str, Any]) -> None:
        super().recall(identity)
        self._id = str(identity.get("container", ""))
        self._restart = identity.get("restart") or _NEVER
        self._moving = list(identity.get("volumes", []))
        self._stage = Path(identity["stage"]) if identity.get("stage") else None

    def finish(self) -> Sequence[str]:
        """See `SourceHalf`: docker's container goes, or stays under another name."""
        self.await_end()
        warnings = []
        try:
            facts = self._await_exit()
            if facts is not None and self.options.source == "remove":
                self.daemon.remove(self._id)
            elif facts is not None:
                name, mark = container_name(facts), f"-moved-{self._id[:8]}"
                if not name.endswith(mark):
                    self.daemon.rename(self._id, name + mark)
        except PhaulError as error:
            warnings.append(f"{error.message}: {self._target} is still there, stopped")
        mark_moved(Path(path) for path in self._moving)
        if not self._netns:
            warnings += netlock.release(self._connections, table=self._lock_table)
        return warnings

    def _await_exit(self) -> Mapping[str, Any] | None:
        """The container, once docker has heard of its end; None if it is gone (--rm)."""
        deadline = time.monotonic() + _EXITS_S
        while (facts := self.daemon.container(self._id)) is not None and facts["State"]["Running"]:
            if time.monotonic() > deadline:
                raise MigrationFailed("docker does not notice its end")
            time.sleep(_POLL_S)
        return facts

    def rollback(self) -> None:
        super().rollback()
        if not self._id or self._restart.get("Name") in ("", "no"):
            return
        try:
            self.daemon.set_restart_policy(self._id, self._restart)
        except PhaulError:
            return  # removed by somebody, or no daemon: then its configuration does not count
