"""An OCI container as runc or crun keep it: state, bundle, cgroup; and the runtime's commands."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from phaul_runtime.boundedjson import read_json, read_json_file
from phaul_runtime.engine import FileFact
from phaul_runtime.errors import MigrationFailed, NoSuchTarget, Refused
from phaul_runtime.files.compare import InUse, Use, gather_all
from phaul_runtime.files.identity import ROOT
from phaul_runtime.memory.image_dirs import unmount_below
from phaul_runtime.system import proc, procfs

CONFIG = "config.json"
CGROUP_ROOT = Path("/sys/fs/cgroup")
_WITHIN_S = 60.0
_NOT_RUN = (126, 127)
# What config.json and `update` can limit, as cgroup v2 names it.
_LIMITS = (
    "cpu.max",
    "cpu.weight",
    "cpuset.cpus",
    "cpuset.mems",
    "io.max",
    "io.weight",
    "memory.high",
    "memory.low",
    "memory.max",
    "memory.min",
    "memory.swap.max",
    "pids.max",
)


@dataclass(frozen=True)
class Runtime:
    """A runtime with the command line of runc.

    Args:
        binary: its name or path.
        root: where it keeps its containers' state; None is its own default.
    """

    binary: str
    root: str | None = None

    def argv(self, *words: str) -> list[str]:
        """The command with `words` after the global options."""
        return [self.binary, *(["--root", self.root] if self.root else []), *words]

    def directory(self, name: str) -> Path:
        """Where it keeps a container's state."""
        return Path(self.root or f"/run/{Path(self.binary).name}") / name

    def version(self) -> str:
        """The first line of `--version`.

        Raises:
            Refused: it is not installed, or does not run.
        """
        done = self._run([self.binary, "--version"])
        return done.stdout.splitlines()[0] if done.stdout else self.binary

    def _run(self, argv: list[str]) -> subprocess.CompletedProcess[str]:
        """Run it; what it answers is for the caller to judge, once it can run at all.

        Raises:
            Refused: it cannot be started, not even by the loader of its libraries.
        """
        done = proc.run(argv, timeout_s=_WITHIN_S)
        # Its own failures end with 1; these are the loader's, a shell's, or a signal.
        if done.returncode < 0 or done.returncode in _NOT_RUN:
            said = proc.last_lines(done.stderr)
            raise Refused(
                f"{self.binary} does not run (code {done.returncode})"
                + (f": {said[-1]}" if said else ""),
                hint=f"try by hand: {shlex.join(argv)}",
                log=said[:-1],
            )
        return done

    def state(self, name: str) -> dict[str, Any] | None:
        """`state NAME`; None if it knows no such container.

        Raises:
            Refused: it is not installed, or does not run.
        """
        done = self._run(self.argv("state", name))
        if done.returncode != 0:
            return None
        try:
            state: dict[str, Any] = read_json(done.stdout)
        except ValueError as error:
            raise MigrationFailed(f"{self.binary} state {name} is malformed") from error
        return state

    def names(self) -> list[str]:
        """The containers that it knows."""
        done = self._run(self.argv("list", "--quiet"))
        return done.stdout.split()

    def delete(self, name: str) -> str:
        """End and forget a container; returns what went wrong, empty if nothing did.

        A runc that was killed in a restore leaves the root file system mounted in its own directory
        (criu-root), and the next `runc delete` would empty it there (seen with 1.1.15).
        """
        if not unmount_below(self.directory(name)):
            return f"something stays mounted in {self.directory(name)}"
        done = proc.run(self.argv("delete", "--force", name), timeout_s=_WITHIN_S)
        if done.returncode != 0 and self.state(name) is not None:
            return (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        return ""

    def resume(self, name: str) -> None:
        """Let a paused container run."""
        proc.run(self.argv("resume", name), timeout_s=_WITHIN_S)


@dataclass(frozen=True)
class Mount:
    """A host path that is mounted into a container."""

    source: str
    destination: str
    readonly: bool = False

    @property
    def directory(self) -> bool:
        """Whether it is one, rather than a file."""
        return Path(self.source).is_dir()


@dataclass(frozen=True)
class Container:
    """A container, as its runtime and its bundle describe it."""

    name: str
    pid: int
    status: str
    bundle: Path
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rootfs(self) -> Path:
        """Its root file system on the host."""
        return rootfs_of(self.bundle, self.config)

    @property
    def binds(self) -> list[Mount]:
        """Host files and directories that are mounted in."""
        return [
            Mount(mount["source"], mount["destination"], "ro" in (mount.get("options") or ()))
            for mount in self.config.get("mounts", [])
            if is_bind(mount)
        ]

    @property
    def namespaces(self) -> dict[str, str]:
        """Kind to path; the path is empty where the runtime made the namespace."""
        entries = self.config.get("linux", {}).get("namespaces", [])
        return {entry["type"]: entry.get("path", "") for entry in entries}

    @property
    def terminal(self) -> bool:
        """It has a terminal for a console."""
        return bool(self.config.get("process", {}).get("terminal"))


def is_bind(mount: Mapping[str, Any]) -> bool:
    """Whether a mount of config.json is a bind mount."""
    return mount.get("type") == "bind" or bool({"bind", "rbind"} & set(mount.get("options") or ()))


def single_files(mounts: Iterable[Mount]) -> list[FileFact]:
    """The facts of files that are mounted in; directories are carried as trees, or not at all."""
    # An administrator's, not the container's: who may mount may replace.
    return gather_all(
        InUse(mount.source, Use(written=not mount.readonly, user=ROOT))
        for mount in mounts
        if not mount.directory
    )


def rootfs_of(bundle: Path, config: Mapping[str, Any]) -> Path:
    """Where a bundle's root file system lies."""
    return bundle / str(config.get("root", {}).get("path", "rootfs"))


def read_container(runtime: Runtime, name: str) -> Container:
    """Read a container.

    Raises:
        NoSuchTarget: the runtime knows none of that name, or it does not run.
        Refused: its bundle cannot be read.
    """
    state = runtime.state(name)
    if state is None:
        known = ", ".join(runtime.names()[:10]) or "none"
        raise NoSuchTarget(
            f"{runtime.binary} knows no container {name!r}", hint=f"containers: {known}"
        )
    if state["status"] not in ("running", "paused"):
        raise NoSuchTarget(f"container {name} is {state['status']}: nothing of it runs")
    bundle = Path(state["bundle"])
    try:
        config = read_json_file(bundle / CONFIG)
    except (OSError, ValueError) as error:
        raise Refused(f"cannot read {bundle / CONFIG}: {error}") from error
    return Container(name, int(state["pid"]), state["status"], bundle, config)


class CheckpointOptions(Protocol):
    """What is configured of checkpoints, whatever the engine."""

    @property
    def tcp_established(self) -> bool:
        """Carry established TCP connections."""

    @property
    def file_locks(self) -> bool:
        """Carry file locks."""

    @property
    def ext_unix_sk(self) -> bool:
        """Carry unix sockets that lead out, cut off."""


def common_flags(options: CheckpointOptions) -> list[str]:
    """What checkpoint and restore must agree on, as the runtime's flags."""
    flags = {
        "--tcp-established": options.tcp_established,
        "--file-locks": options.file_locks,
        "--ext-unix-sk": options.ext_unix_sk,
    }
    return [flag for flag, given in flags.items() if given]


# -- cgroup v2 ---------------------------------------------------------------------------------


def cgroup_of(pid: int) -> str:
    """The cgroup v2 path of a process, as `/web`; empty if there is none."""
    return procfs.cgroup_of(procfs.PROC / str(pid))


def cgroup_directory(path: str) -> Path:
    """Where a cgroup is mounted."""
    return CGROUP_ROOT / path.lstrip("/")


def cgroup_pids(path: str) -> list[int]:
    """All processes in a cgroup and below it."""
    found: list[int] = []
    for directory, _, files in os.walk(cgroup_directory(path)):
        if "cgroup.procs" in files:
            try:
                text = (Path(directory) / "cgroup.procs").read_text(encoding="ascii")
            except OSError:
                continue
            found += [int(pid) for pid in text.split()]
    return found


def read_limits(path: str) -> dict[str, str]:
    """The limits of a cgroup, as its files say them."""
    found = {}
    for name in _LIMITS:
        try:
            found[name] = (cgroup_directory(path) / name).read_text(encoding="ascii").strip()
        except OSError:
            continue
    return found


def apply_limits(path: str, limits: Mapping[str, str]) -> list[str]:
    """Give a cgroup the limits of another; returns those that this host refused."""
    refused = []
    for name, value in limits.items():
        if name not in _LIMITS:
            continue
        file = cgroup_directory(path) / name
        try:
            if file.read_text(encoding="ascii").strip() != value:
                file.write_text(value, encoding="ascii")
        except OSError:
            if value not in ("", "max", "0"):
                refused.append(f"{name} {value}")
    return refused
