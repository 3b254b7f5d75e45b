"""The cgroups of this host, laid out for CRIU, so that it mounts none of them itself.

To know a container's cgroups, and to make them again, CRIU mounts every hierarchy anew, without
options. Outside of cgroup namespaces that takes the options of cgroup2 away from the *host*, for
all: `nsdelegate`, `memory_recursiveprot` (criu#3029). CRIU can be told of a directory instead that
has them all, its "yard": here one of links to where this host has them mounted. Ignoring cgroups,
the other way, would give a container the host's cgroup namespace, and its processes one cgroup.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

from phaul_runtime.errors import MigrationFailed
from phaul_runtime.memory.image_dirs import remove_tree

log = logging.getLogger(__name__)

YARD = "cgroups"
_UNIFIED = "unified"
# PROC_CGROUP_INIT_INO, the same in every kernel.
_FIRST_NAMESPACE = 0xEFFFFFFB


def yard_options(directory: Path) -> list[str]:
    """Lay out the yard in `directory`, and what CRIU's configuration has to say of it.

    Empty where a hierarchy is in use that is not mounted on this host: CRIU then has to mount.

    Args:
        directory: of this move alone; what is at YARD in it is replaced.

    Raises:
        MigrationFailed: it cannot be made.
    """
    try:
        of_self = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        mounted = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise MigrationFailed(f"cannot read this host's cgroups: {error.strerror}") from error
    places = {}
    for line in of_self:
        controllers = line.split(":", 2)[1]
        place = _mounted_at(controllers, mounted)
        if place is None:
            log.log(
                logging.WARNING if _options_are_ours() else logging.DEBUG,
                "%s is mounted nowhere on this host: CRIU mounts the cgroups itself, without the "
                "options that cgroup2 has",
                f"the cgroup hierarchy {controllers}" if controllers else "cgroup2",
            )
            return []
        places[controllers.removeprefix("name=") or _UNIFIED] = place
    yard = directory / YARD
    try:
        if yard.exists():
            remove_tree(yard)
        yard.mkdir(mode=0o700)
        for name, place in places.items():
            # Relative: a restored process whose root is the container's already goes there, too.
            (yard / name).symlink_to(os.path.relpath(place, yard.resolve()))
    except OSError as error:
        raise MigrationFailed(f"cannot make {yard}: {error.strerror}") from error
    return [f"cgroup-yard {yard}"]


def _options_are_ours() -> bool:
    """Whether a mount of cgroup2 made here changes its options: not in a cgroup namespace."""
    return Path("/proc/self/ns/cgroup").stat().st_ino == _FIRST_NAMESPACE


def _mounted_at(controllers: str, mountinfo: Iterable[str]) -> str | None:
    """Where all of a hierarchy is mounted; an empty name is cgroup2's."""
    for line in mountinfo:
        before, _, after = line.partition(" - ")
        _, _, _, root, place, *_ = before.split(" ")
        kind, _, options = after.split(" ", 2)
        if root != "/" or kind != ("cgroup" if controllers else "cgroup2"):
            continue
        if set(controllers.split(",")) <= {"", *options.split(",")}:
            return place
    return None


__all__ = ["YARD", "yard_options"]
