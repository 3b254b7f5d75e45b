"""Checks of a container of docker at its destination, before anything is touched."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from phaul_engines.docker.config import is_user_defined, networks_of, private_netns
from phaul_engines.docker.daemon import Daemon
from phaul_engines.docker.daemon_findings import daemon_findings
from phaul_engines.docker.volumes import may_be_overwritten
from phaul_runtime.engine import OK, REFUSED, Finding


def destination_findings(daemon: Daemon, manifest: Mapping[str, Any]) -> list[Finding]:
    """Hold a container against this host's docker; `manifest` as of `docker.DockerSource`."""
    facts = manifest["facts"]
    version = daemon.version()
    found = daemon_findings(
        str(version["Version"]),
        str(version["ApiVersion"]),
        daemon.info(),
        private_netns=private_netns(facts),
        destination=True,
    )
    found += _name(daemon, str(manifest["name"]))
    found += _image(daemon, manifest)
    found += _networks(daemon, facts, manifest["addresses"])
    found += _ports(facts)
    found += _volumes(daemon, manifest)
    for source, how in manifest["mounts"].items():
        there = Path(how if how.startswith("/") else source)
        if how and how != "rsync" and not there.is_dir():
            found.append(Finding("docker-mounts", REFUSED, f"{there} is no directory there"))
    return found


def _name(daemon: Daemon, name: str) -> Iterator[Finding]:
    if daemon.container(name) is not None:
        yield Finding(
            "name",
            REFUSED,
            f"a container {name} is there already",
            f"docker rm {name}, or docker rename {name} OTHER",
        )


def _image(daemon: Daemon, manifest: Mapping[str, Any]) -> Iterator[Finding]:
    image = manifest["image"]
    if daemon.image_id(str(manifest["image_id"])):
        yield Finding("docker-image", OK, f"image {image} is there")
    elif manifest["carry_image"]:
        yield Finding("docker-image", OK, f"image {image} is missing there, it is carried over")
    else:
        yield Finding(
            "docker-image",
            REFUSED,
            f"image {image} is missing there",
            f"engines.docker.image: carry, or docker save {image} here and docker load there: what "
            "is pulled may be another image by now",
        )


def _networks(
    daemon: Daemon, facts: Mapping[str, Any], pinned: Mapping[str, str]
) -> Iterator[Finding]:
    for name, endpoint in networks_of(facts).items():
        if not is_user_defined(name):
            continue
        network = daemon.network(name)
        if network is None:
            yield Finding(
                "docker-network",
                REFUSED,
                f"the network {name} is missing there",
                f"make it there as it is here: docker network create --subnet ... {name}",
            )
            continue
        address = pinned.get(name) or (endpoint.get("IPAMConfig") or {}).get("IPv4Address")
        yield from _address(name, network, address or "")


def _address(name: str, network: Mapping[str, Any], address: str) -> Iterator[Finding]:
    if not address:
        yield Finding("docker-network", OK, f"network {name} is there")
        return
    subnets = [
        c["Subnet"] for c in (network.get("IPAM") or {}).get("Config") or () if "Subnet" in c
    ]
    if not any(ipaddress.ip_address(address) in ipaddress.ip_network(s) for s in subnets):
        yield Finding(
            "docker-network",
            REFUSED,
            f"the network {name} has no address {address} there: {', '.join(subnets) or 'none'}",
            f"docker network create --subnet ... {name} there, with that address in it",
        )
        return
    for other in (network.get("Containers") or {}).values():
        if str(other.get("IPv4Address", "")).partition("/")[0] == address:
            yield Finding(
                "docker-network", REFUSED, f"{other.get('Name')} has the address {address} there"
            )
            return
    yield Finding("docker-network", OK, f"network {name} is there, {address} is free in it")


def _ports(facts: Mapping[str, Any]) -> Iterator[Finding]:
    for port, bindings in (facts["HostConfig"].get("PortBindings") or {}).items():
        kind = socket.SOCK_DGRAM if port.endswith("/udp") else socket.SOCK_STREAM
        for binding in bindings or ():
            number = str(binding.get("HostPort") or "")
            if number.isdigit() and int(number) and _taken(kind, int(number)):
                yield Finding(
                    "docker-ports", REFUSED, f"port {number} is taken there, which it publishes"
                )


def _taken(kind: socket.SocketKind, port: int) -> bool:
    with socket.socket(socket.AF_INET, kind) as probe:
        if kind == socket.SOCK_STREAM:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False


def _volumes(daemon: Daemon, manifest: Mapping[str, Any]) -> Iterator[Finding]:
    for volume in manifest["volumes"]:
        name = volume["name"]
        if not name:
            continue  # docker makes a new one
        there = daemon.volume(name)
        if there is None and not volume["tree"]:
            yield Finding(
                "docker-volume",
                REFUSED,
                f"the volume {name} is missing there, although it is said to be shared",
                f"docker volume create {name} there, on the storage that is shared",
            )
        if there is None or not volume["tree"]:
            continue
        path = Path(str(there["Mountpoint"]))
        if users := daemon.users_of(name):
            yield Finding("docker-volume", REFUSED, f"the volume {name} is {users[0]}'s there")
        elif not may_be_overwritten(path):
            yield Finding(
                "docker-volume",
                REFUSED,
                f"a volume {name} is there already, and no move left it",
                f"docker volume rm {name} there; nothing of it will be overwritten",
            )
        else:
            yield Finding("docker-volume", OK, f"volume {name} is there, free to be filled")
