"""The destination half of the runc and crun engines: bundle, held restore, clean-up."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phaul_hooks.gate import Gate, GateEvent

from phaul_engines.common import netlock
from phaul_engines.common.members import LET_GO_WITHIN_S, POLL_S
from phaul_engines.oci.arrival_cgroup import member, require_free, require_own
from phaul_engines.oci.cgroupyard import yard_options
from phaul_engines.oci.checks import limits_finding, runtime_finding
from phaul_engines.oci.gated import OUTPUT, GatedCommand, deadline_in
from phaul_engines.oci.options import RuncOptions
from phaul_engines.oci.runtime import (
    CONFIG,
    Runtime,
    apply_limits,
    cgroup_directory,
    cgroup_of,
    cgroup_pids,
    common_flags,
    is_bind,
    rootfs_of,
)
from phaul_runtime.boundedjson import read_json_file
from phaul_runtime.criu.session import Criu
from phaul_runtime.engine import OK, REFUSED, Claim, DestinationHalf, Finding
from phaul_runtime.errors import DestinationError, MigrationFailed, PhaulError
from phaul_runtime.memory.image_dirs import remove_tree
from phaul_runtime.system import cgroup
from phaul_runtime.system.pathwalk import make_directories, write_file
from phaul_runtime.system.process import Member

log = logging.getLogger(__name__)

RESTORE_WITHIN_S = 300.0
MARK = ".phaul-runtime.json"
_END_S = 30.0
# A shell that waits until it has been put into its cgroup: what it becomes is born there.
_WAIT_THEN_EXEC = 'read -r _ && exec "$@" </dev/null'


class RuncDestination(DestinationHalf):
    """The destination half.

    The bundle takes the path that it has at the source. A bundle that is here already is only ever
    written to if a move left it: it then has a mark (MARK), or if the storage is shared.
    """

    def __init__(self, options: RuncOptions, hold_s: float) -> None:
        self._options = options
        self._hold_s = hold_s
        self._runtime = Runtime(options.binary, options.root)
        self._id = ""
        self._manifest: Mapping[str, Any] = {}
        self._command: GatedCommand | None = None
        self._held: GateEvent | None = None
        self._numbers = itertools.count(1)
        self._cgroup = ""
        self._root: Member | None = None
        self._resumed = False

    # -- before anything is touched --------------------------------------------------------

    def check(self, manifest: Mapping[str, Any]) -> Sequence[Finding]:
        found = []
        try:
            found.append(runtime_finding(self._runtime.version(), manifest))
            taken = self._runtime.state(str(manifest["name"])) is not None
        except PhaulError as error:
            return [Finding("runtime", REFUSED, error.message, error.hint)]
        name = manifest["name"]
        if taken:
            found.append(
                Finding(
                    "name",
                    REFUSED,
                    f"a container {name} is there already",
                    f"{self._options.binary} delete {name}, or move it under another name",
                )
            )
        found += self._bundle_findings(manifest)
        netns = _netns(manifest)
        if netns and not Path(netns).exists():
            found.append(
                Finding(
                    "network",
                    REFUSED,
                    f"the network namespace {netns} is missing",
                    "make it there as it is here: ip netns add, its address and its routes",
                )
            )
        for source, how in manifest.get("mounts", {}).items():
            there = Path(how if how.startswith("/") else source)
            if how != "rsync" and how and not there.is_dir():
                found.append(Finding("mounts", REFUSED, f"{there} is no directory there"))
        found.append(limits_finding(manifest))
        return found

    def claim(self, manifest: Mapping[str, Any]) -> Claim:
        """See `DestinationHalf`: the runtime runs the hooks of config.json as root."""
        hooks = manifest["config"].get("hooks") or {}
        programs = [str(hook["path"]) for each in hooks.values() for hook in each or ()]
        return Claim(str(manifest["name"]), tuple(programs))

    def _bundle_findings(self, manifest: Mapping[str, Any]) -> Sequence[Finding]:
        bundle = Path(manifest["bundle"])
        rootfs = rootfs_of(bundle, manifest["config"])
        shared = manifest.get("rootfs") == "shared"
        if shared:
            if not rootfs.is_dir():
                text = f"{rootfs} is missing, although filesystem.rootfs is shared"
                return [Finding("bundle", REFUSED, text, "mount the storage there")]
            return [Finding("bundle", OK, f"{rootfs} is shared")]
        if manifest.get("same_host"):
            text = "source and destination are one host: they would share the bundle"
            return [Finding("bundle", REFUSED, text, "filesystem.rootfs: shared, or another host")]
        if _left_by_a_move(bundle):
            return [Finding("bundle", OK, f"{bundle} was left by an earlier move")]
        for place in (bundle, rootfs):
            if place.exists() and (not place.is_dir() or any(place.iterdir())):
                return [
                    Finding(
                        "bundle",
                        REFUSED,
                        f"{place} is there already, and no move left it",
                        "remove it there; nothing of it will be overwritten",
                    )
                ]
        return [Finding("bundle", OK, f"{bundle} is free")]

    # -- what the container needs ----------------------------------------------------------

    def prepare(self, manifest: Mapping[str, Any], migration_id: str) -> None:
        self._manifest, self._id = manifest, migration_id
        bundle = Path(manifest["bundle"])
        if _mark(bundle).get("id") == migration_id:
            return  # an earlier agent was here
        if (
            refused := [f for f in self._bundle_findings(manifest) if f.level == REFUSED]
        ) and manifest.get("rootfs") != "shared":
            raise DestinationError(refused[0].text, hint=refused[0].hint)
        try:
            wanted = [bundle, rootfs_of(bundle, manifest["config"])]
            made = [str(path) for path in wanted if not path.exists()]
            for path in wanted:
                make_directories(str(path), 0o755)
            _write_mark(bundle, {"id": migration_id, "made": made})
            write_file(str(bundle / CONFIG), json.dumps(_config_for(manifest), indent=1))
        except OSError as error:
            raise DestinationError(f"cannot make {bundle}: {error.strerror}") from error

    def trees(self) -> Mapping[str, Path]:
        found = {"rootfs": rootfs_of(Path(self._manifest["bundle"]), self._manifest["config"])}
        carried = [s for s, how in self._manifest.get("mounts", {}).items() if how == "rsync"]
        return found | {f"mount-{n}": Path(s) for n, s in enumerate(carried, 1)}

    # -- the restore -----------------------------------------------------------------------

    @property
    def can_be_lazy(self) -> bool:  # type: ignore[override]
        """See `DestinationHalf`: crun has no option for it."""
        return Path(self._options.binary).name == "runc"

    def restore(self, criu: Criu, images_dir: Path, *, lazy: bool = False) -> int:
        name = str(self._manifest["name"])
        self._resumed = False
        self._root = None
        self._claim(name)
        gate = Gate(
            images_dir.parent / f"gate-{os.getpid()}-{next(self._numbers)}",
            deadline_s=self._hold_s,
            options=yard_options(images_dir),
        )
        words = [
            "restore",
            "--detach",
            *("--image-path", str(images_dir), "--work-path", str(images_dir)),
            *("--bundle", str(self._manifest["bundle"])),
            *common_flags(self._options),
        ]
        if lazy:
            words.append("--lazy-pages")
        if self._options.console_socket:
            words += ["--console-socket", self._options.console_socket]
        if _by_systemd(self._manifest["config"]):
            words = ["--systemd-cgroup", *words]
        words = ["--log", str(gate.directory / OUTPUT), *words]
        argv = ["sh", "-c", _WAIT_THEN_EXEC, "sh", *self._runtime.argv(*words, name)]
        command = GatedCommand(
            argv,
            gate,
            name=self._options.binary,
            request="RESTORE",
            log=images_dir / "restore.log",
            quiet=True,
            before_exec=lambda pid: cgroup.adopt(self._id, pid),
        )
        self._command = command
        try:
            command.start()
            deadline = deadline_in(RESTORE_WITHIN_S)
            while event := command.next(deadline):
                self._root = member(event.pid) or self._root
                if event.action == "post-restore":
                    self._own_cgroup(event.pid)
                    self._held = event
                    return event.pid
                command.gate.answer(event, yes=True)
            failure = command.failure()
        except BaseException:
            self.discard()
            raise
        self.discard()
        raise failure

    def _own_cgroup(self, root: int) -> None:
        """The cgroup of what is held now is this migration's, if nothing else lives in it."""
        found = cgroup_of(root)
        if not Path(found).is_relative_to(f"/{cgroup.GROUP}/{self._id}"):
            require_own(found, root)
        bundle = Path(self._manifest["bundle"])
        _write_mark(bundle, {**_mark(bundle), "cgroup": found})
        self._cgroup = found

    def _restoring(self) -> bool:
        """Whether this migration, and no other, has begun to restore into its bundle."""
        mark = _mark(Path(self._manifest["bundle"]))
        return bool(mark.get("restoring")) and mark.get("id") == self._id

    def _claim(self, name: str) -> None:
        """From now on the runtime's directory of that name, and the cgroup, are this migration's.

        Raises:
            DestinationError: they are somebody else's.
        """
        bundle = Path(self._manifest["bundle"])
        mark = _mark(bundle)
        if self._restoring():
            return
        path = str(self._manifest.get("cgroup", ""))
        require_free(path)
        if self._runtime.directory(name).exists():
            raise DestinationError(
                f"a container {name} was made there meanwhile",
                hint=f"{self._options.binary} delete {name}, or move it under another name",
            )
        try:
            _write_mark(bundle, {**mark, "id": self._id, "restoring": True, "cgroup": path})
        except OSError as error:
            raise DestinationError(f"cannot write in {bundle}: {error.strerror}") from error

    def resume(self) -> float:
        command, held = self._command, self._held
        if command is None or held is None:
            raise MigrationFailed("nothing was restored")
        if command.wait(0) is not None:
            # Its runtime was killed: what CRIU let go now, no runtime would know of.
            raise command.failure()
        refused = apply_limits(self._cgroup, self._manifest.get("limits", {}))
        if refused:
            log.warning("%s: limits refused by this host: %s", self._id, ", ".join(refused))
        deadline = deadline_in(self._hold_s)
        command.gate.answer(held, yes=True)
        resumed_at = 0.0
        while event := command.next(deadline):
            if event.action == "post-resume":
                resumed_at = time.monotonic()
            else:
                command.gate.answer(event, yes=True)
        code = command.wait(max(0.0, deadline - time.monotonic()))
        failure = command.failure()
        command.close()
        self._command = self._held = None
        # Once all of it runs, what the runtime still had to write down decides nothing.
        if code != 0 and not resumed_at:
            raise failure
        self._resumed = True
        if code != 0:
            log.warning("%s: it runs, but %s", self._id, failure.message)
        _mark_path(Path(self._manifest["bundle"])).unlink(missing_ok=True)
        cgroup.sweep()  # the container is in its own, the runtime has ended
        return resumed_at or time.monotonic()

    def wait_let_go(self) -> None:
        deadline = time.monotonic() + LET_GO_WITHIN_S
        while cgroup.members(self._id) and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def discard(self) -> None:
        if self._resumed:
            return
        if self._command is not None:
            self._command.close()
            self._command = self._held = None
        if not self._manifest:
            return  # nothing was prepared
        cgroup.kill(self._id)
        if self._restoring():
            name = str(self._manifest["name"])
            if self._is_ours(name):
                self._runtime.delete(name)
            self._end_half_built()
            if self._runtime.state(name) is None:
                # A runtime that was killed leaves a directory that it does not know again itself.
                remove_tree(self._runtime.directory(name))
        netlock.release_namespace(_netns(self._manifest))

    def _is_ours(self, name: str) -> bool:
        """Whether the container of that name is of this bundle, or of none that is known."""
        state = self._runtime.state(name)
        bundle = Path(self._manifest["bundle"])
        return state is None or Path(str(state.get("bundle", bundle))) == bundle

    def _end_half_built(self) -> None:
        """A CRIU that was killed leaves tasks that nobody lets go.

        They descend from the root that it told of, or are in the cgroup that was this migration's
        before anything was in it.
        """
        if self._root is not None:
            self._root.kill()
        path = str(_mark(Path(self._manifest["bundle"])).get("cgroup", ""))
        if not path.strip("/"):
            return
        cgroup.kill_all(lambda: cgroup_pids(path), within_s=_END_S)
        with contextlib.suppress(OSError):
            cgroup_directory(path).rmdir()

    def undo(self) -> None:
        if not self._manifest:
            return  # nothing was prepared
        bundle = Path(self._manifest["bundle"])
        mark = _mark(bundle)
        if mark.get("id") != self._id:
            return
        made = [Path(path) for path in mark.get("made", [])]
        for path in reversed(made):
            remove_tree(path)
        if bundle.exists():
            # It was here before: a move may write to it again.
            with contextlib.suppress(OSError):
                _write_mark(bundle, {})


def leave_bundle(bundle: Path) -> None:
    """Mark a bundle whose container has moved away: a move back may overwrite it."""
    with contextlib.suppress(OSError):
        _write_mark(bundle, {})


def _netns(manifest: Mapping[str, Any]) -> str:
    entries = manifest["config"].get("linux", {}).get("namespaces", [])
    return next((str(e.get("path", "")) for e in entries if e["type"] == "network"), "")


def _config_for(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the paths that directories have here, and the cgroup that CRIU restores.

    Without a path, a runtime derives the container's cgroup from its own, which is another here.
    """
    config = dict(manifest["config"])
    if manifest.get("cgroup") and not _by_systemd(config):
        config["linux"] = {**config.get("linux", {}), "cgroupsPath": manifest["cgroup"]}
    there = {s: how for s, how in manifest.get("mounts", {}).items() if how.startswith("/")}
    config["mounts"] = [
        {**mount, "source": there.get(mount["source"], mount["source"])}
        if is_bind(mount)
        else mount
        for mount in config.get("mounts", [])
    ]
    return config


def _by_systemd(config: Mapping[str, Any]) -> bool:
    """Whether its cgroup is made by systemd: then the path is `slice:prefix:name`."""
    return str(config.get("linux", {}).get("cgroupsPath", "")).count(":") == 2


def _mark_path(bundle: Path) -> Path:
    return bundle / MARK


def _mark(bundle: Path) -> dict[str, Any]:
    try:
        mark = read_json_file(_mark_path(bundle))
    except (OSError, ValueError):
        return {}
    return mark if isinstance(mark, dict) else {}


def _left_by_a_move(bundle: Path) -> bool:
    return _mark_path(bundle).exists()


def _write_mark(bundle: Path, mark: Mapping[str, Any]) -> None:
    write_file(str(_mark_path(bundle)), json.dumps(dict(mark)))


__all__ = ["RuncDestination", "leave_bundle"]
