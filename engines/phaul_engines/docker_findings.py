"""What speaks for and against moving a container of docker, and against a docker daemon. Pure."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from phaul_engines.docker_config import (
    Volume,
    configured_mac,
    container_name,
    network_mode,
    networks_of,
    split_bind,
    volumes_of,
)
from phaul_runtime.engine import OK, REFUSED, WARNING, Finding
from phaul_runtime.errors import Refused

STORAGE_DRIVER = "overlay2"
# Annotations came with this API; by one of them a container's restore gets its configuration.
OLDEST_API = (1, 43)
# What is not refused below, whatever the container's network. A docker can be upgraded to it, never
# downgraded: that one does not read what the newer one wrote.
RESTORES = "docker 24.0, 25.0.4 or a later 25.0, 26.1 or 27"
_RUNTIMES = frozenset({"runc", "io.containerd.runc.v2"})
_SOCKETS = re.compile(r"(?:/var)?/run/(?:docker|containerd/containerd)\.sock")
# Logs that stay where they were written.
_LOCAL_LOGS = frozenset({"json-file", "local", "journald"})
_CONTAINER = "container:"
# `driver-type` of a docker with containerd's image store.
_SNAPSHOTTER = "io.containerd.snapshotter.v1"
_REMOTE = frozenset({"nfs", "nfs4", "cifs", "smb3", "ceph", "glusterfs", "9p"})


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
    found += _mounts(inspect, mounts or {}, is_directory)
    found += _volumes(inspect, volumes or {}, volume_facts or {})
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
            f"it has the network namespace of another container, {_named(mode)}",
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


def _named(mode: str) -> str:
    other = mode.removeprefix(_CONTAINER)
    return other[:12] if re.fullmatch("[0-9a-f]{64}", other) else other


def _namespaces(inspect: Mapping[str, Any]) -> Iterator[Finding]:
    host_config = inspect.get("HostConfig", {})
    for kind, key in (("pid", "PidMode"), ("ipc", "IpcMode")):
        mode = str(host_config.get(key) or "")
        if mode.startswith(_CONTAINER):
            yield Finding(
                "docker-namespaces",
                REFUSED,
                f"it has the {kind} namespace of another container, {_named(mode)}",
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
    if runtime not in _RUNTIMES:
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


# -- what is mounted ---------------------------------------------------------------------------


def _mounts(
    inspect: Mapping[str, Any], configured: Mapping[str, str], is_directory: Callable[[str], bool]
) -> Iterator[Finding]:
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


def _volumes(
    inspect: Mapping[str, Any],
    configured: Mapping[str, str],
    facts: Mapping[str, Mapping[str, Any]],
) -> Iterator[Finding]:
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
    return _named(split_bind(entry)[0])


# -- the daemon --------------------------------------------------------------------------------


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
    """What is known of a docker daemon, and what speaks against it.

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
    if not _RUNTIMES & runtimes.keys():
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
