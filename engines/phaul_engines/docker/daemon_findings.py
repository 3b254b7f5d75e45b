"""Checks of a docker daemon, at either end. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from phaul_engines.docker.config import (
    RUNTIMES,
    container_name,
)
from phaul_runtime.engine import OK, REFUSED, WARNING, Finding
from phaul_runtime.errors import Refused

STORAGE_DRIVER = "overlay2"
# Annotations came with this API; by one of them a container's restore gets its configuration.
OLDEST_API = (1, 43)
# What is not refused below, whatever the container's network. A docker can be upgraded to it, never
# downgraded: that one does not read what the newer one wrote.
RESTORES = "docker 24.0, 25.0.4 or a later 25.0, 26.1 or 27"
# `driver-type` of a docker with containerd's image store.
_SNAPSHOTTER = "io.containerd.snapshotter.v1"


def parse_version(version: str) -> tuple[int, int, int] | None:
    """`26.1.5+dfsg1` as numbers; None if it is no version."""
    match = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", version)
    return (int(match[1]), int(match[2]), int(match[3] or 0)) if match else None


def parse_api_version(api_version: str) -> tuple[int, int]:
    """`1.45` as numbers; (0, 0), which is too old, if it is no version."""
    match = re.fullmatch(r"v?(\d+)\.(\d+)", api_version)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def daemon_findings(
    version: str,
    api_version: str,
    info: Mapping[str, Any],
    *,
    private_netns: bool,
    destination: bool,
) -> list[Finding]:
    """What is known of a docker daemon, and the checks that it fails.

    Args:
        version: `Version` of `GET /version`.
        api_version: `ApiVersion` of it.
        info: `GET /info`.
        private_netns: docker makes the container a network namespace.
        destination: the container is restored by it.
    """
    found = [Finding("docker-version", OK, f"docker {version}, API {api_version}")]
    if parse_api_version(api_version) < OLDEST_API:
        found.append(
            Finding(
                "docker-version",
                REFUSED,
                f"docker {version} has API {api_version}: annotations, which the restore needs, "
                "came with 1.43",
                f"upgrade it: {RESTORES}",
            )
        )
    found += _version(version, private_netns=private_netns, destination=destination)
    if destination and not info.get("ExperimentalBuild"):
        found.append(
            Finding(
                "docker-experimental",
                REFUSED,
                "dockerd restores no checkpoint: it runs without its experimental features",
                "phaul-runtime hook install docker, then restart dockerd",
            )
        )
    found += _host(info)
    return found


def _version(version: str, *, private_netns: bool, destination: bool) -> Iterator[Finding]:
    numbers = parse_version(version)
    if numbers is None:
        yield Finding("docker-version", WARNING, f"docker {version} is a version not known here")
        return
    if (25, 0, 0) <= numbers <= (25, 0, 3):
        text = f"docker {version} restores nothing: content digest not found"
        yield _restores_not(text, f"upgrade it: {RESTORES}", destination=destination)
    if private_netns and (numbers[:2] == (26, 0) or numbers >= (28, 0, 0)):
        text = (
            f"docker {version} restores no container with a network namespace of its own: "
            "bind-mount /proc/0/ns/net"
        )
        way = f"move it to a host with {RESTORES}"
        if numbers[:2] == (26, 0):
            way = "upgrade it: docker 26.1 or 27"
        hint = f"start the container with --network host, or {way}"
        yield _restores_not(text, hint, destination=destination)
    elif numbers[0] == 27:
        yield Finding(
            "docker-version",
            WARNING,
            f"docker {version} has not been tried",
            "move a container first that can be spared",
        )
    elif numbers[:2] == (19, 3):
        yield Finding(
            "docker-version",
            WARNING,
            f"docker {version} sometimes fails to restore: content sha256 already exists",
        )


def _restores_not(text: str, hint: str, *, destination: bool) -> Finding:
    """A refusal where the container is to be restored; elsewhere there is only no way back."""
    if destination:
        return Finding("docker-version", REFUSED, text, hint)
    return Finding("docker-version", WARNING, f"it cannot move back to this host: {text}")


def _host(info: Mapping[str, Any]) -> Iterator[Finding]:
    yield _storage(info)
    if str(info.get("CgroupVersion") or "1") != "2":
        yield Finding("docker-cgroup", WARNING, "this host has cgroup v1: it has not been tried")
    security = {str(option).split(",")[0] for option in info.get("SecurityOptions") or ()}
    if "name=rootless" in security:
        yield Finding(
            "docker-namespaces", REFUSED, "docker runs rootless", "CRIU needs a dockerd of root"
        )
    if "name=userns" in security:
        yield Finding(
            "docker-namespaces",
            REFUSED,
            "docker gives containers a user namespace",
            'without "userns-remap" in /etc/docker/daemon.json',
        )
    runtimes = info.get("Runtimes") or {}
    if not RUNTIMES & runtimes.keys():
        yield Finding(
            "docker-runtime",
            REFUSED,
            f"docker has no runtime runc, only {', '.join(sorted(runtimes)) or 'none'}",
            "install runc",
        )


def _storage(info: Mapping[str, Any]) -> Finding:
    driver = str(info.get("Driver") or "not known")
    if driver == STORAGE_DRIVER:
        return Finding("docker-storage", OK, f"storage driver {driver}")
    setting = f'"storage-driver": "{STORAGE_DRIVER}"'
    text = f"the storage driver is {driver}, not {STORAGE_DRIVER}: it is untried"
    if ["driver-type", _SNAPSHOTTER] in (info.get("DriverStatus") or ()):
        # There `storage-driver` names a snapshotter, and dockerd would not start with overlay2.
        setting = '"features": {"containerd-snapshotter": false}'
        text = (
            f"docker has its containers in containerd's image store ({driver}), from which none "
            f"can be moved: only those of its own storage driver {STORAGE_DRIVER} can"
        )
    return Finding(
        "docker-storage",
        REFUSED,
        text,
        f"{setting} in /etc/docker/daemon.json, and restart dockerd: it has no images and "
        "containers of before then, they are to be made anew",
    )


def no_layer(inspect: Mapping[str, Any], info: Mapping[str, Any]) -> Refused:
    """Why docker tells of no directory with a container's writable layer.

    Args:
        inspect: `GET /containers/{id}/json`.
        info: `GET /info`.
    """
    found = _storage(info)
    if found.level == REFUSED:
        return Refused(found.text, hint=found.hint)
    name = container_name(inspect)
    return Refused(f"docker does not tell where the writable layer of {name} lies")
