"""Checks of a container of docker that is to be moved. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from phaul_engines.docker.config import (
    RUNTIMES,
    configured_mac,
    named,
    network_mode,
    networks_of,
)
from phaul_engines.docker.mount_findings import mount_findings, volume_findings
from phaul_runtime.engine import OK, REFUSED, WARNING, Finding

# Logs that stay where they were written.
_LOCAL_LOGS = frozenset({"json-file", "local", "journald"})
_CONTAINER = "container:"


def findings(
    inspect: Mapping[str, Any],
    *,
    mounts: Mapping[str, str] | None = None,
    volumes: Mapping[str, str] | None = None,
    volume_facts: Mapping[str, Mapping[str, Any]] | None = None,
    is_directory: Callable[[str], bool] = lambda path: True,
) -> list[Finding]:
    """What the source's docker can say of a container.

    Args:
        inspect: `GET /containers/{id}/json`.
        mounts: what is configured of host paths: shared, rsync, or their path there.
        volumes: what is configured of volumes, by name: shared or rsync. An unnamed one may be
            meant by its destination.
        volume_facts: `GET /volumes/{name}` by name; without it a volume's options are not known.
        is_directory: a host path that is none is left to the checks of files.
    """
    found = [*_state(inspect), *_managed(inspect), *_network(inspect), *_namespaces(inspect)]
    found += _devices(inspect)
    found += mount_findings(inspect, mounts or {}, is_directory)
    found += volume_findings(inspect, volumes or {}, volume_facts or {})
    found += _runtime(inspect)
    found += _log(inspect)
    return found


# -- the container -----------------------------------------------------------------------------


def _state(inspect: Mapping[str, Any]) -> Iterator[Finding]:
    state = inspect.get("State") or {}
    name = str(inspect.get("Name") or "").lstrip("/")
    for flag, hint in (
        ("Paused", f"docker unpause {name}"),
        ("Restarting", "wait until it runs"),
        ("Dead", "docker could not remove it: it can only be removed"),
    ):
        if state.get(flag):
            yield Finding("docker-state", REFUSED, f"the container is {flag.lower()}", hint)
            return
    if not state.get("Running"):
        status = state.get("Status") or "not running"
        yield Finding("docker-state", REFUSED, f"the container is {status}: nothing of it runs")
    if inspect.get("HostConfig", {}).get("AutoRemove"):
        yield Finding(
            "docker-autoremove",
            WARNING,
            "it was started with --rm: it will not be removed at its end there",
            "docker rm it there: docker cannot set --rm later",
        )


def _managed(inspect: Mapping[str, Any]) -> Iterator[Finding]:
    labels = inspect.get("Config", {}).get("Labels") or {}
    if "com.docker.swarm.task.id" in labels:
        yield Finding(
            "docker-swarm",
            REFUSED,
            "it is a task of a swarm, which would start another in its place",
            "move the task with swarm: docker node update --availability drain",
        )
    project = labels.get("com.docker.compose.project")
    if project:
        yield Finding(
            "docker-compose",
            WARNING,
            f"it belongs to the compose project {project}: docker compose up would start it here "
            "again",
            "take the service out of the project on this host",
        )


def _network(inspect: Mapping[str, Any]) -> Iterator[Finding]:
    mode = network_mode(inspect)
    host_config = inspect.get("HostConfig", {})
    if mode.startswith(_CONTAINER):
        yield Finding(
            "docker-network",
            REFUSED,
            f"it has the network namespace of another container, {named(mode)}",
            "CRIU moves only what has that namespace for itself, or the host's",
        )
        return
    names = sorted(networks_of(inspect))
    if not names:
        yield Finding(
            "docker-network",
            WARNING,
            f"it was disconnected from every network: there it will be connected to {mode}",
        )
    else:
        yield Finding("docker-network", OK, f"networks: {', '.join(names)}")
    for link in host_config.get("Links") or ():
        other = link.partition(":")[0].lstrip("/")
        yield Finding(
            "docker-network",
            WARNING,
            f"it is linked to the container {other}, which has to be there too",
            "put both into a network of their own instead of --link",
        )
    if mode != "host":
        yield from _ports(inspect)
    for name in names:
        if configured_mac(inspect, name) is None:
            mac = networks_of(inspect)[name]["MacAddress"]
            yield Finding(
                "docker-network",
                WARNING,
                f"its MAC address in {name}, {mac}, may have been set, which docker does not tell: "
                "it gets a new one there",
            )


def _ports(inspect: Mapping[str, Any]) -> Iterator[Finding]:
    host_config = inspect.get("HostConfig", {})
    chosen = [
        port
        for port, bindings in (host_config.get("PortBindings") or {}).items()
        if any(binding.get("HostPort") in (None, "", "0") for binding in bindings or ())
    ]
    if host_config.get("PublishAllPorts"):
        exposed = inspect.get("Config", {}).get("ExposedPorts") or {}
        chosen += [port for port in exposed if port not in (host_config.get("PortBindings") or {})]
    if chosen:
        yield Finding(
            "docker-network",
            WARNING,
            f"docker chose the host's port for {', '.join(sorted(set(chosen)))}: it may choose "
            "another one there",
        )


def _namespaces(inspect: Mapping[str, Any]) -> Iterator[Finding]:
    host_config = inspect.get("HostConfig", {})
    for kind, key in (("pid", "PidMode"), ("ipc", "IpcMode")):
        mode = str(host_config.get(key) or "")
        if mode.startswith(_CONTAINER):
            yield Finding(
                "docker-namespaces",
                REFUSED,
                f"it has the {kind} namespace of another container, {named(mode)}",
                "CRIU moves only what has that namespace for itself",
            )
        elif mode == "host":
            yield Finding(
                "docker-namespaces",
                REFUSED,
                f"it has the {kind} namespace of the host",
                "its pids may be taken there" if kind == "pid" else "its shared memory would stay",
            )
    if host_config.get("UTSMode") == "host":
        yield Finding(
            "docker-namespaces", WARNING, "it has the host's name, and will have the other's there"
        )
    if host_config.get("UsernsMode") not in (None, "", "host"):
        yield Finding(
            "docker-namespaces",
            REFUSED,
            "it has a user namespace",
            'only containers without one can be moved: without "userns-remap" in '
            "/etc/docker/daemon.json",
        )
    if host_config.get("Cgroup"):
        yield Finding("docker-namespaces", REFUSED, "it has the cgroup of another container")


def _devices(inspect: Mapping[str, Any]) -> Iterator[Finding]:
    host_config = inspect.get("HostConfig", {})
    if host_config.get("Privileged"):
        yield Finding(
            "docker-devices",
            WARNING,
            "it is privileged: devices of this host that it has open cannot be moved",
        )
    for device in host_config.get("Devices") or ():
        yield Finding(
            "docker-devices",
            REFUSED,
            f"it has the device {device.get('PathOnHost')} of this host",
            "run it without --device: CRIU does not carry a device's state",
        )
    for request in host_config.get("DeviceRequests") or ():
        wanted = {name for names in request.get("Capabilities") or () for name in names}
        what = request.get("Driver") or ", ".join(sorted(wanted))
        yield Finding(
            "docker-devices",
            REFUSED,
            f"it has devices of this host by request: {what or 'any'}",
            "run it without --gpus or --device: CRIU does not carry a device's state",
        )
    for key in _DEVICE_LIMITS:
        for limit in host_config.get(key) or ():
            yield Finding(
                "docker-devices",
                WARNING,
                f"{key} names the device {limit.get('Path')}, which has to be there too",
            )


_DEVICE_LIMITS = (
    "BlkioWeightDevice",
    "BlkioDeviceReadBps",
    "BlkioDeviceWriteBps",
    "BlkioDeviceReadIOps",
    "BlkioDeviceWriteIOps",
)


def _runtime(inspect: Mapping[str, Any]) -> Iterator[Finding]:
    host_config = inspect.get("HostConfig", {})
    runtime = host_config.get("Runtime") or "runc"
    if runtime not in RUNTIMES:
        yield Finding(
            "docker-runtime",
            REFUSED,
            f"its runtime is {runtime}: only runc is known to restore under docker",
            "run it with --runtime runc",
        )
    if host_config.get("Isolation") not in (None, "", "default"):
        yield Finding(
            "docker-runtime", REFUSED, f"its isolation is {host_config['Isolation']}, not default"
        )


def _log(inspect: Mapping[str, Any]) -> Iterator[Finding]:
    kind = (inspect.get("HostConfig", {}).get("LogConfig") or {}).get("Type") or "json-file"
    if kind in _LOCAL_LOGS:
        text = f"log driver {kind}: what it has logged stays on this host"
    else:
        text = f"log driver {kind}"
    yield Finding("docker-log", OK, text)
