"""Checks of a container that is to be moved, before anything is frozen."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from phaul_engines.common.proctree import (
    Tree,
    established_connections,
    pipes_to_others,
    read_process,
)
from phaul_engines.oci.options import RuncOptions
from phaul_engines.oci.runtime import Container, Mount, cgroup_directory, cgroup_of, cgroup_pids
from phaul_runtime.engine import OK, REFUSED, WARNING, Finding
from phaul_runtime.errors import NoSuchTarget

_MIB = 1 << 20
# Made in each network namespace by tunnel modules, not by the container's network.
_FALLBACK_DEVICES = frozenset(
    {
        "lo",
        "tunl0",
        "sit0",
        "ip6tnl0",
        "gre0",
        "gretap0",
        "erspan0",
        "ip_vti0",
        "ip6_vti0",
        "ip6gre0",
    }
)
# Namespaces that the runtime made, and CRIU makes anew.
_OWN = frozenset({"pid", "network", "ipc", "uts", "mount", "cgroup", "time"})
_DEVICE_MAJORS_TTY = frozenset({4, 5, *range(136, 144)})


def target_findings(
    container: Container, tree: Tree, options: RuncOptions, *, root: str
) -> list[Finding]:
    """What the source side can say of a container."""
    found = [Finding("target", OK, describe(container, tree))]
    if container.status == "paused":
        found.append(
            Finding("target", REFUSED, "the container is paused", f"{root} resume {container.name}")
        )
    found += _namespaces(container)
    found += _network(container, tree)
    found += connection_findings(tree, allowed=options.tcp_established)
    found += _mounts(container.binds, options)
    found += _stdio(container, tree, options)
    found += stranger_findings(tree)
    found += tree_findings(tree)
    if container.config.get("hooks"):
        text = "config.json has OCI hooks: their programs have to be at the destination too"
        found.append(Finding("oci-hooks", WARNING, text))
    return found


def tree_findings(tree: Tree) -> Iterable[Finding]:
    """What CRIU cannot dump in a container's processes."""
    if tree.odd:
        yield Finding("descriptors", REFUSED, f"CRIU cannot dump: {tree.odd[0]}")
    for member in tree.members:
        if member.tracer:
            text = f"pid {member.pid} is traced by pid {member.tracer}"
            yield Finding("tracer", REFUSED, text, "end the debugger: CRIU traces it itself")


def connection_findings(tree: Tree, *, allowed: bool) -> Iterable[Finding]:
    """Whether established connections stand against it."""
    connections = established_connections(tree)
    if connections and not allowed:
        local, port, remote, remote_port = connections[0]
        yield Finding(
            "tcp",
            REFUSED,
            f"{len(connections)} TCP connections are established: "
            f"{local}:{port} > {remote}:{remote_port}",
            "--tcp-established carries them, if their address moves too",
        )


def describe(container: Container, tree: Tree) -> str:
    """One line on what is to be moved."""
    memory = sum(member.memory for member in tree.members) / _MIB
    return (
        f"{container.name} ({tree.root.name}), {len(tree.members)} processes, {memory:.0f} MiB, "
        f"bundle {container.bundle}"
    )


def _namespaces(container: Container) -> Iterable[Finding]:
    for kind, path in container.namespaces.items():
        if kind == "user":
            yield Finding(
                "namespaces",
                REFUSED,
                "the container has a user namespace",
                "rootless containers cannot be moved: run it as root",
            )
        elif path and kind != "network":
            yield Finding(
                "namespaces",
                REFUSED,
                f"the container shares the {kind} namespace {path} with others",
                "CRIU moves only what has that namespace for itself",
            )
        elif kind not in _OWN:
            yield Finding("namespaces", REFUSED, f"the {kind} namespace is not known here")
    if "pid" not in container.namespaces:
        yield Finding(
            "namespaces",
            REFUSED,
            "the container has no pid namespace of its own",
            "give it one in config.json: its pids may be taken at the destination",
        )


def network_kind(container: Container) -> str:
    """`host`, `own` (made by the runtime) or `path` (made by somebody else, and named)."""
    namespaces = container.namespaces
    if "network" not in namespaces:
        return "host"
    return "path" if namespaces["network"] else "own"


def _network(container: Container, tree: Tree) -> Iterable[Finding]:
    if network_kind(container) != "own":
        return
    devices = [name for name in _devices(tree.root.pid) if name not in _FALLBACK_DEVICES]
    if devices:
        yield Finding(
            "network",
            REFUSED,
            f"its network namespace has the device {devices[0]}, whose other end stays here",
            "make the namespace with ip netns add, and name its path in config.json",
        )


def _devices(pid: int) -> list[str]:
    try:
        lines = Path(f"/proc/{pid}/net/dev").read_text(encoding="ascii").splitlines()[2:]
    except OSError:
        return []
    return [line.split(":")[0].strip() for line in lines]


def _mounts(binds: Iterable[Mount], options: RuncOptions) -> Iterable[Finding]:
    for mount in binds:
        if not mount.directory:
            continue  # compared, and carried with --files copy, as any single file
        how = options.mounts.get(mount.source)
        if how is None:
            yield Finding(
                "mounts",
                REFUSED,
                f"{mount.source} of this host is mounted at {mount.destination}",
                f"engines.runc.mounts: {{{mount.source}: shared | rsync | /path/there}}",
            )
        else:
            yield Finding("mounts", OK, f"{mount.source} at {mount.destination}: {how}")


def _stdio(container: Container, tree: Tree, options: RuncOptions) -> Iterable[Finding]:
    if container.terminal:
        if options.console_socket is None:
            yield Finding(
                "terminal",
                REFUSED,
                "the container has a terminal, whose other end stays with its starter",
                "engines.runc.console_socket names a socket there that takes the new one",
            )
        return
    home = Path("/proc") / str(tree.root.pid)
    mounts = _mount_ids(home)
    for number in range(3):
        link = home / "fd" / str(number)
        try:
            path, info = os.readlink(link), os.stat(link)
        except OSError:
            continue  # closed
        if stat.S_ISCHR(info.st_mode) and os.major(info.st_rdev) in _DEVICE_MAJORS_TTY:
            yield Finding(
                "terminal",
                REFUSED,
                f"its descriptor {number} is the terminal {path} of this host",
                "start it detached with /dev/null, or with a terminal of its own",
            )
        elif path.startswith("/") and _mount_id(home, number) not in mounts:
            yield Finding(
                "stdio",
                REFUSED,
                f"its descriptor {number} is {path} of this host",
                "start it with /dev/null and let it write to a file of its own",
            )
    outside = pipes_to_others(tree)
    if outside and options.stdio != "devnull":
        yield Finding(
            "stdio",
            REFUSED,
            f"a pipe leads out of the container: {outside[0]}",
            "engines.runc.stdio: devnull gives it /dev/null there",
        )


def has_shared_masks(pid: int) -> bool:
    """Whether directories of a container are masked by crun's shared empty one.

    crun 1.24 and later does so; an older one does not map those mounts when it restores.
    """
    try:
        text = Path(f"/proc/{pid}/mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return any(line.split(" ")[3].endswith("/.empty-directory") for line in text.splitlines())


def _mount_ids(home: Path) -> set[str]:
    try:
        text = (home / "mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    return {line.split(" ", 1)[0] for line in text.splitlines()}


def _mount_id(home: Path, number: int) -> str:
    try:
        text = (home / "fdinfo" / str(number)).read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    return next((line.split()[1] for line in text.splitlines() if line.startswith("mnt_id:")), "")


def strangers(tree: Tree) -> list[int]:
    """Processes that were put into the container from outside: CRIU dumps only its init's tree."""
    others = set(cgroup_pids(cgroup_of(tree.root.pid))) - set(tree.pids)
    return [pid for pid in sorted(others) if _came_in_from_outside(pid, tree.root.pid)]


def stranger_findings(tree: Tree) -> Iterable[Finding]:
    """Why they may not be ended."""
    for pid in strangers(tree):
        yield Finding(
            "exec",
            REFUSED,
            f"pid {pid} was started in the container by exec: it would end with the move",
            "end it, or wait for its end",
        )


def _came_in_from_outside(pid: int, init: int) -> bool:
    """Whether a process lives that does not descend from a container's init.

    A child that the container has only just started is none.
    """
    try:
        while pid not in (0, 1, init):
            pid = read_process(pid).parent
    except NoSuchTarget:
        return False  # it ended meanwhile, or its parent did
    return pid != init


# -- at the destination ------------------------------------------------------------------------


def runtime_finding(version: str, manifest: Mapping[str, Any]) -> Finding:
    """Whether a runtime, by the first line of its --version, restores what the source's made."""
    crun = re.match(r"crun version (\d+)\.(\d+)", version)
    if manifest.get("shared_masks") and crun and (int(crun[1]), int(crun[2])) < (1, 24):
        return Finding(
            "runtime",
            REFUSED,
            f"{version} does not restore the masked directories of a container of crun 1.24 "
            "or later",
            "install crun 1.24 or later there",
        )
    return Finding("runtime", OK, version)


def limits_finding(manifest: Mapping[str, Any]) -> Finding:
    """Whether this host's cgroups can limit what the source's do."""
    limits = {
        name: value
        for name, value in manifest.get("limits", {}).items()
        if value not in ("", "max", "0", "max 100000", "100", "default 100")
    }
    try:
        there = (cgroup_directory("/") / "cgroup.controllers").read_text(encoding="ascii").split()
    except OSError:
        if limits:
            return Finding(
                "cgroup", REFUSED, "this host has no cgroup v2, its limits would be lost"
            )
        return Finding("cgroup", OK, "it has no limits")
    missing = sorted({name.split(".")[0] for name in limits} - set(there))
    if missing:
        return Finding(
            "cgroup",
            REFUSED,
            f"the cgroup controller {missing[0]} is missing: its limits would be lost",
            "enable it there",
        )
    return Finding("cgroup", OK, f"{len(limits)} limits are kept" if limits else "it has no limits")
