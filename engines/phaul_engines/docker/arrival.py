"""The destination half of the docker engine: a container of the same configuration, restored."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phaul_hooks.gate import CONFIG, Gate, GateEvent
from phaul_hooks.heldconfig import HeldConfig

from phaul_engines.common.proctree import ancestors
from phaul_engines.docker.checks import destination_findings
from phaul_engines.docker.config import (
    CRIU_CONFIG,
    CreatePlan,
    create_body,
    restart_policy,
    upper_directory,
)
from phaul_engines.docker.daemon import Daemon
from phaul_engines.docker.daemon_findings import no_layer
from phaul_engines.docker.layer import Layer, let_go
from phaul_engines.docker.start import Start, shims
from phaul_engines.docker.volumes import may_be_overwritten, unmark
from phaul_engines.oci.cgroupyard import yard_options
from phaul_engines.oci.gated import deadline_in, failure
from phaul_engines.oci.runtime import Runtime, cgroup_pids
from phaul_runtime.boundedjson import read_json_file
from phaul_runtime.criu.session import Criu
from phaul_runtime.engine import REFUSED, Claim, DestinationHalf, Finding
from phaul_runtime.errors import DestinationError, MigrationFailed, NoSuchTarget, PhaulError
from phaul_runtime.memory.image_dirs import remove_tree
from phaul_runtime.system import cgroup
from phaul_runtime.system.cancel import Cancellation
from phaul_runtime.system.process import Member

log = logging.getLogger(__name__)

# One directory a migration; the container's annotation names the file in it, and so its migration.
OURS = Path("/run/phaul-runtime/docker")
RESTORE_WITHIN_S = 300.0
_END_S = 60.0
_DESCRIPTORS = "descriptors.json"
_MADE = "made.json"
# There once something was held: from then on the source's copy may be dead.
_HELD = "held"
_RUNTIME_AND_SHIM = 2
_LEAKED = "ctrd-checkpoint*"


def is_ours(path: str) -> bool:
    """Whether a CRIU configuration that an annotation names is one of a move."""
    return Path(path).is_relative_to(OURS)


class DockerDestination(DestinationHalf):
    """The destination half.

    The container is created with its name, and with an annotation that names a file of this
    migration: CRIU's configuration, by which the restore takes the images from where they lie (so
    that nothing large goes through the daemon, and nothing at all can be restored without asking at
    the gate), and by which it is found again.

    Args:
        runtime: whose directory has the state of docker's containers.
        hold_s: how long a restored container is held.
    """

    def __init__(self, runtime: Runtime, hold_s: float) -> None:
        self._runtime = runtime
        self._hold_s = hold_s
        self._manifest: Mapping[str, Any] = {}
        self._id = ""
        self._start: Start | None = None
        self._gate: Gate | None = None
        self._held: GateEvent | None = None
        self._holders: list[Member] = []
        self._numbers = itertools.count(1)
        self._cgroup = ""
        self._resumed = False

    # -- before anything is touched --------------------------------------------------------

    def check(self, manifest: Mapping[str, Any]) -> Sequence[Finding]:
        try:
            return destination_findings(_daemon(manifest), manifest)
        except PhaulError as error:
            return [Finding("docker", REFUSED, error.message, error.hint)]

    def claim(self, manifest: Mapping[str, Any]) -> Claim:
        return Claim(str(manifest["name"]))

    # -- the container ---------------------------------------------------------------------

    def prepare(self, manifest: Mapping[str, Any], migration_id: str) -> None:
        """See `DestinationHalf`; without its image, the container is made when that has arrived."""
        self._manifest, self._id = manifest, migration_id
        self._daemon = _daemon(manifest)
        self._config = HeldConfig(self._place / CONFIG)
        self._config.release()  # docker says nothing of a container whose start hangs
        if self._ours() is not None:
            return  # an earlier agent was here
        if self._image():
            self._create()
        elif not manifest["carry_image"]:
            raise DestinationError(f"the image {manifest['image']} is missing")

    def _image(self) -> str:
        """What to name as the image here; empty if it is missing."""
        name, image_id = str(self._manifest["image"]), str(self._manifest["image_id"])
        if self._daemon.image_id(name) == image_id:
            return name
        return self._daemon.image_id(image_id)

    @property
    def _place(self) -> Path:
        return OURS / self._id

    def _ours(self) -> Mapping[str, Any] | None:
        """The container of this migration, as docker describes it; None if there is none."""
        facts = self._daemon.container(str(self._manifest["name"]))
        if facts is None:
            return None
        annotations = facts["HostConfig"].get("Annotations") or {}
        return facts if annotations.get(CRIU_CONFIG) == str(self._place / CONFIG) else None

    def _there(self) -> Mapping[str, Any]:
        facts = self._ours()
        if facts is None:
            raise DestinationError(f"the container {self._manifest['name']} is gone")
        return facts

    def _plan(self) -> CreatePlan:
        manifest = self._manifest
        return create_body(
            manifest["facts"],
            api_version=self._daemon.api_version,
            image=self._image(),
            annotations={CRIU_CONFIG: str(self._place / CONFIG)},
            mounts={s: how for s, how in manifest["mounts"].items() if how.startswith("/")},
            addresses=manifest["addresses"],
            ours=is_ours,
        )

    def _create(self) -> None:
        plan = self._plan()
        made = []
        for volume in self._named_volumes():
            there = self._daemon.volume(volume)
            if there is None:
                made.append(volume)
            elif not may_be_overwritten(Path(str(there["Mountpoint"]))):
                raise DestinationError(f"the volume {volume} was filled there meanwhile")
        try:
            self._place.mkdir(mode=0o700, parents=True)
            (self._place / _MADE).write_text(json.dumps(made), encoding="utf-8")
        except OSError as error:
            raise DestinationError(f"cannot make {self._place}: {error.strerror}") from error
        container = self._daemon.create(str(self._manifest["name"]), plan.body)
        for network, endpoint in plan.connect:
            self._daemon.connect(container, network, endpoint)

    def _layer(self, facts: Mapping[str, Any]) -> Layer:
        directory = upper_directory(facts)
        if not directory:
            refusal = no_layer(facts, self._daemon.info())
            raise DestinationError(refusal.message, hint=refusal.hint)
        return Layer(Path(directory))

    def _named_volumes(self) -> list[str]:
        return [v["name"] for v in self._manifest["volumes"] if v["name"] and v["tree"]]

    def trees(self) -> Mapping[str, Path]:
        """See `DestinationHalf`: the image alone, as long as it is missing."""
        facts = self._ours()
        if facts is None:
            return {"image": self._image_place()}
        at = {m["Destination"]: Path(m["Source"]) for m in facts["Mounts"]}
        found = {"layer": self._layer(facts).path}
        found |= {v["tree"]: at[v["destination"]] for v in self._manifest["volumes"] if v["tree"]}
        carried = [s for s, how in self._manifest["mounts"].items() if how == "rsync"]
        found |= {f"mount-{number}": Path(source) for number, source in enumerate(carried, 1)}
        if self._manifest["shm"]:
            found["shm"] = self._place / "shm"
        return found

    def _image_place(self) -> Path:
        return self._daemon.root / "tmp" / f"phaul-{self._id}"

    def arrived(self, name: str, cancellation: Cancellation) -> None:
        """See `DestinationHalf`: `docker load`, and the container can be made."""
        try:
            self._daemon.load(self._image_place() / "image.tar", cancellation)
        finally:
            remove_tree(self._image_place())
        if not self._image():
            raise DestinationError(
                f"docker load has not made the image {self._manifest['image']}",
                hint="docker save at the source and docker load here, by hand, say why",
            )
        self._create()

    # -- the restore -----------------------------------------------------------------------

    can_be_lazy = True

    def restore(self, criu: Criu, images_dir: Path, *, lazy: bool = False) -> int:
        facts = self._there()
        self._resumed = False
        self._cgroup = self._daemon.cgroup(facts)
        if (self._place / _HELD).exists():
            # The source's copy may be dead by now: whatever happens, this can be repeated.
            self._layer(facts).secure()
        try:
            gate, start = self._begin(facts, images_dir, lazy=lazy)
            deadline = deadline_in(RESTORE_WITHIN_S)
            while event := gate.next(deadline, start.ended):
                if event.action == "post-restore":
                    self._hold(facts, event)
                    return event.pid
                if event.action == "pre-restore":
                    self._fill_shm(facts)
                gate.answer(event, yes=True)
            reason = self._reason(images_dir)
        except BaseException:
            self.discard()
            raise
        self.discard()
        raise reason

    def _hold(self, facts: Mapping[str, Any], held: GateEvent) -> None:
        """Everything is restored: from here on the death of who did it harms nothing.

        Raises:
            PhaulError: it is too late for that.
        """
        try:
            holders = ancestors(held.pid)
        except NoSuchTarget as error:
            raise _holders_died() from error
        let_go(self._runtime.directory(str(facts["Id"])))
        # The runtime and its shim, of which another runtime is told to clean up after them.
        if len(holders) < _RUNTIME_AND_SHIM or not all(holder.alive() for holder in holders):
            raise _holders_died()
        (self._place / _HELD).touch()
        self._holders, self._held = holders, held

    def _begin(
        self, facts: Mapping[str, Any], images_dir: Path, *, lazy: bool
    ) -> tuple[Gate, Start]:
        """Start it, up to CRIU, and then CRIU."""
        place = self._place / f"gate-{os.getpid()}-{next(self._numbers)}"
        images = place / "images"
        gate = self._gate = Gate(
            place,
            deadline_s=self._hold_s,
            options=[
                f"images-dir {images}",
                f"work-dir {images}",
                "log-file restore.log",
                "verbosity 4",
                # Else CRIU puts it into the group that it had at the source, where no limit is.
                f"cgroup-root {self._cgroup}",
                *yard_options(self._place),
                *self._manifest["criu"],
                *(["lazy-pages"] if lazy else []),
            ],
            early=bool(self._manifest["shm"]),
        )
        gate.open()
        # CRIU reads this as a link, and nothing else.
        images.symlink_to(images_dir)
        checkpoint = self._checkpoint(facts, images_dir)
        self._config.hold()
        start = self._start = Start(
            _daemon(self._manifest), str(facts["Id"]), checkpoint, self._hold_s + RESTORE_WITHIN_S
        )
        text = (place / CONFIG).read_text(encoding="utf-8")
        # CRIU takes the images from its first reading alone: should anybody else have had that one,
        # it finds none, instead of restoring without asking.
        first = ("action-script ", "images-dir ", "work-dir ")
        again = [line for line in text.splitlines(keepends=True) if not line.startswith(first)]
        self._config.give(
            text,
            "".join(again),
            over=lambda: start.wait(0),
            within_s=RESTORE_WITHIN_S,
        )
        return gate, start

    def _checkpoint(self, facts: Mapping[str, Any], images_dir: Path) -> str:
        """A checkpoint for the daemon; all that it needs, and copies, is what runc reads itself."""
        name = f"phaul-{self._id}"
        directory = self._daemon.directory(str(facts["Id"])) / "checkpoints" / name
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            shutil.copy(images_dir / _DESCRIPTORS, directory)
            (directory / name).touch()
        except OSError as error:
            raise DestinationError(f"cannot make {directory}: {error.strerror}") from error
        return name

    def _fill_shm(self, facts: Mapping[str, Any]) -> None:
        mounted = self._daemon.directory(str(facts["Id"])) / "mounts/shm"
        try:
            shutil.copytree(
                self._place / "shm", mounted, symlinks=True, dirs_exist_ok=True, copy_function=_copy
            )
        except (OSError, shutil.Error) as error:
            raise DestinationError(f"cannot fill /dev/shm: {error}") from error

    def _reason(self, images_dir: Path) -> MigrationFailed:
        said = [self._start.error.message] if self._start and self._start.error else []
        return failure("docker", "RESTORE", images_dir / "restore.log", said)

    def resume(self) -> float:
        gate, start, held = self._gate, self._start, self._held
        if gate is None or start is None or held is None:
            raise MigrationFailed("nothing was restored")
        try:
            runtime = os.pidfd_open(self._holders[0].pid)
        except ProcessLookupError:
            raise start.error or _holders_died() from None
        deadline = deadline_in(self._hold_s)
        resumed_at = 0.0
        try:
            if start.wait(0) or not all(holder.alive() for holder in self._holders):
                # Docker has put the container away, or does so as soon as it notices.
                raise start.error or _holders_died()
            gate.answer(held, yes=True)
            # Not until docker's start ends: a daemon that dies now ends it, and CRIU goes on.
            while event := gate.next(deadline, runtime):
                if event.action == "post-resume":
                    resumed_at = time.monotonic()
                else:
                    gate.answer(event, yes=True)
        finally:
            os.close(runtime)
        ended = start.wait(max(0.0, deadline - time.monotonic()))
        gate.close()
        self._gate = self._start = self._held = None
        error = start.error or (None if ended else MigrationFailed("docker: start gives no answer"))
        if error is not None and not resumed_at:
            raise error
        self._resumed = True
        if error is not None:
            log.warning("%s: it runs, but %s", self._id, error.message)
        self._settle()
        return resumed_at or time.monotonic()

    def _settle(self) -> None:
        """It runs: what only the move needed goes; raises nothing."""
        try:
            facts = self._there()
            policy = restart_policy(self._manifest["facts"])
            if policy["Name"] not in ("", "no"):
                self._daemon.set_restart_policy(str(facts["Id"]), policy)
            self._clean(facts)
            self._layer(facts).forget()
            for mount in facts["Mounts"]:
                unmark(Path(mount["Source"]))
        except PhaulError as error:
            log.warning("%s: it runs, but %s", self._id, error.message)
        self._leave()

    def _clean(self, facts: Mapping[str, Any]) -> None:
        """The checkpoint, and the copies of it that containerd leaves in /tmp."""
        name = f"phaul-{self._id}"
        remove_tree(self._daemon.directory(str(facts["Id"])) / "checkpoints" / name)
        for leaked in Path("/tmp").glob(_LEAKED):  # noqa: S108 - that is where they are
            if (leaked / name).exists():
                remove_tree(leaked)

    def wait_let_go(self) -> None:
        facts = self._ours()  # docker answers once no start is under way
        if facts is not None and facts["State"]["Running"]:
            self._settle()

    def discard(self) -> None:
        """See `DestinationHalf`: the container stays, as created."""
        if self._resumed:
            return
        if self._gate is not None:
            self._gate.close()
        if self._manifest:
            self._config.release()
        if self._start is not None and not self._start.wait(_END_S):
            log.warning("%s: docker start does not end", self._id)
        self._gate = self._start = self._held = None
        if not self._manifest:
            return  # nothing was prepared
        # Before docker is asked, which may not answer; what it believes is another matter.
        self._end_half_built()
        self._daemon.wait(_END_S)
        facts = self._ours()
        if facts is None:
            return
        if facts["State"]["Running"]:
            self._daemon.kill(str(facts["Id"]))
        # Of a process before this one, too.
        self._cgroup = self._daemon.cgroup(facts)
        self._end_half_built()
        # A runtime that was killed leaves a directory that the next would stumble over.
        remove_tree(self._runtime.directory(str(facts["Id"])))
        self._clean(facts)

    def _end_half_built(self) -> None:
        """A CRIU that was killed leaves tasks that nobody lets go."""
        if self._cgroup.strip("/"):
            cgroup.kill_all(lambda: cgroup_pids(self._cgroup), within_s=_END_S)

    def undo(self) -> None:
        """See `DestinationHalf`; an image that was carried stays."""
        if not self._manifest:
            return  # nothing was prepared
        self._daemon.wait(_END_S)
        facts = self._ours()
        if facts is not None:
            self._daemon.remove(str(facts["Id"]), force=True)
            # A daemon that was killed in a start knows nothing of the shim, which would stay.
            cgroup.kill_all(lambda: shims(str(facts["Id"])), within_s=_END_S)
        with contextlib.suppress(OSError, ValueError):
            for volume in read_json_file(self._place / _MADE):
                self._daemon.remove_volume(volume)
        self._leave()

    def _leave(self) -> None:
        """Remove this migration's directory, and those above it with the last."""
        remove_tree(self._place)
        with contextlib.suppress(OSError):
            OURS.rmdir()
            OURS.parent.rmdir()


def _daemon(manifest: Mapping[str, Any]) -> Daemon:
    return Daemon(str(manifest["host"]), float(manifest["timeout_s"]))


def _holders_died() -> MigrationFailed:
    return MigrationFailed("docker: the runtime or its shim ended while the container was held")


def _copy(source: str, target: str) -> str:
    """With the owner, which a copy by shutil does not keep."""
    shutil.copy2(source, target)
    info = os.stat(source)
    os.chown(target, info.st_uid, info.st_gid, follow_symlinks=False)
    return target
