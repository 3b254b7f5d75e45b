"""Checks of what is mounted into a container of docker. Pure."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from phaul_engines.docker.config import (
    Volume,
    named,
    split_bind,
    volumes_of,
)
from phaul_runtime.engine import OK, REFUSED, WARNING, Finding

_REMOTE = frozenset({"nfs", "nfs4", "cifs", "smb3", "ceph", "glusterfs", "9p"})
_SOCKETS = re.compile(r"(?:/var)?/run/(?:docker|containerd/containerd)\.sock")


def mount_findings(
    inspect: Mapping[str, Any], configured: Mapping[str, str], is_directory: Callable[[str], bool]
) -> Iterator[Finding]:
    """Of host paths.

    Args:
        inspect: `GET /containers/{id}/json`.
        configured: of host paths: shared, rsync, or their path there.
        is_directory: a host path that is none is left to the checks of files.
    """
    known = {posixpath.normpath(path): how for path, how in configured.items()}
    for mount in inspect.get("Mounts") or ():
        kind, destination = mount.get("Type"), mount.get("Destination")
        if kind == "bind":
            yield from _bind(mount["Source"], str(destination), known, is_directory)
        elif kind not in ("volume", "tmpfs", "image"):
            yield Finding(
                "docker-mounts", REFUSED, f"what is mounted at {destination} is a {kind}: not known"
            )


def _bind(
    source: str,
    destination: str,
    configured: Mapping[str, str],
    is_directory: Callable[[str], bool],
) -> Iterator[Finding]:
    how = configured.get(posixpath.normpath(source))
    if _SOCKETS.fullmatch(posixpath.normpath(source)):
        if how == "shared":
            yield Finding("docker-mounts", OK, f"{source} at {destination}: the destination's own")
            return
        yield Finding(
            "docker-mounts",
            REFUSED,
            f"docker's own socket {source} is mounted at {destination}",
            f"engines.docker.mounts: {{{source}: shared}} if that of the other host will do",
        )
    elif how is not None:
        yield Finding("docker-mounts", OK, f"{source} at {destination}: {how}")
    elif is_directory(source):
        yield Finding(
            "docker-mounts",
            REFUSED,
            f"{source} of this host is mounted at {destination}",
            f"engines.docker.mounts: {{{source}: shared | rsync | /path/there}}",
        )


def volume_findings(
    inspect: Mapping[str, Any],
    configured: Mapping[str, str],
    facts: Mapping[str, Mapping[str, Any]],
) -> Iterator[Finding]:
    """Of volumes.

    Args:
        inspect: `GET /containers/{id}/json`.
        configured: by name: shared or rsync. An unnamed one may be meant by its destination.
        facts: `GET /volumes/{name}` by name; without it a volume's options are not known.
    """
    for other in inspect.get("HostConfig", {}).get("VolumesFrom") or ():
        yield Finding(
            "docker-volume",
            REFUSED,
            f"it has the volumes of another container: --volumes-from {_volumes_from(other)}",
            "name its volumes with -v",
        )
    options = _asked_options(inspect)
    for volume in volumes_of(inspect):
        how = configured.get(volume.name)
        if not volume.named:
            how = how or configured.get(volume.destination)
        said = facts.get(volume.name, {}).get("Options") or options.get(volume.destination) or {}
        yield _volume(volume, how, said)


def _volume(volume: Volume, how: str | None, options: Mapping[str, str]) -> Finding:
    what = f"the volume {volume.name}" if volume.named else "an unnamed volume"
    at = f"{what} at {volume.destination}"
    hint = f"engines.docker.volumes: {{{volume.name}: shared}} if it is the same one there"
    if not volume.named:
        hint = (
            f"start the container with a named volume at {volume.destination}, which can be shared"
        )
    if how == "shared" and not volume.named:
        return Finding(
            "docker-volume",
            REFUSED,
            f"{at} cannot be shared: docker makes a new one there",
            "give it a name, or leave it to be carried",
        )
    if how == "shared":
        return Finding("docker-volume", OK, f"{at}: shared")
    if volume.driver != "local":
        return Finding(
            "docker-volume",
            REFUSED,
            f"{at} has the driver {volume.driver}: only those of the driver local are carried",
            hint,
        )
    if _remote(options):
        return Finding(
            "docker-volume",
            REFUSED,
            f"{at} is mounted from {options.get('device') or options.get('type')}",
            hint,
        )
    if options.get("device"):
        return Finding(
            "docker-volume",
            WARNING,
            f"{at} is {options['device']} of this host: an ordinary one there, if it is not made "
            "beforehand",
            f"docker volume create {volume.name}, with the same options, there"
            if volume.named
            else "start the container with a named volume, which can be made there beforehand",
        )
    return Finding("docker-volume", OK, f"{at}: {how or 'rsync'}")


def _remote(options: Mapping[str, str]) -> bool:
    """Whether a volume of the driver `local` mounts something of another host."""
    return options.get("type", "").lower() in _REMOTE or "addr=" in options.get("o", "")


def _asked_options(inspect: Mapping[str, Any]) -> dict[str, Mapping[str, str]]:
    """Options of volumes by destination, where the container's own configuration has them."""
    found = {}
    for mount in inspect.get("HostConfig", {}).get("Mounts") or ():
        driver = (mount.get("VolumeOptions") or {}).get("DriverConfig") or {}
        found[posixpath.normpath(mount["Target"])] = driver.get("Options") or {}
    return found


def _volumes_from(entry: str) -> str:
    """The container of `name[:mode]`, by its short id if it is an id."""
    return named(split_bind(entry)[0])
