"""From what docker says of a container to one of the same configuration; and comparing the two.

Pure: documents of the Engine API go in and come out. The checks are in
`findings`.
"""

from __future__ import annotations

import copy
import json
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CRIU_CONFIG = "org.criu.config"
DEFAULT_BRIDGE = "bridge"
RUNTIMES = frozenset({"runc", "io.containerd.runc.v2"})
"""Names of runc in a docker."""
# From here on create takes several endpoints, and a MAC address belongs to one of them.
SEVERAL_ENDPOINTS = (1, 44)
_PREDEFINED = frozenset({"default", DEFAULT_BRIDGE, "host", "none"})
_CONTAINER = "container:"
_SHORT_ID = 12
# Create refuses these together with another container's network namespace.
_CONFLICT_CONFIG = ("Hostname", "Domainname", "ExposedPorts")
_CONFLICT_HOST_CONFIG = ("Links", "Dns", "ExtraHosts", "PortBindings", "PublishAllPorts")
_LOCALLY_ADMINISTERED = 0x02
_GENERATED_MAC = "02:42:"
# In docker's own file, and from there in our copy of what inspect says.
_DESIRED_MAC = "DesiredMacAddress"
_EMPTY: tuple[Any, ...] = (None, "", [], {})


def named(mode: str) -> str:
    """The container of a `container:` mode, by its short id if it is an id."""
    other = mode.removeprefix(_CONTAINER)
    return other[:_SHORT_ID] if re.fullmatch("[0-9a-f]{64}", other) else other


def below_run_phaul(path: str) -> bool:
    """Whether a file is one of ours, with the default `workdir`."""
    return path.startswith("/run/phaul/")


@dataclass(frozen=True)
class Volume:
    """A volume of a container.

    Attributes:
        destination: where it is mounted in the container.
        name: its name at the source.
        named: it was asked for by that name; docker makes a new one at create otherwise.
        driver: the volume's driver.
        source: where its contents lie on the source's host.
        writable: the container may write to it.
    """

    destination: str
    name: str
    named: bool
    driver: str
    source: str
    writable: bool


@dataclass(frozen=True)
class CreatePlan:
    """How to make a container of the same configuration.

    Attributes:
        name: for `POST /containers/create?name=`.
        body: of that request; it never restarts and is never removed by itself.
        connect: networks to connect afterwards, in this order, with their `EndpointConfig`.
        volumes: every volume of the container at the source.
        restart_policy: what it has to get (`POST /containers/{id}/update`) once it has moved.
    """

    name: str
    body: Mapping[str, Any]
    connect: Sequence[tuple[str, Mapping[str, Any]]]
    volumes: Sequence[Volume]
    restart_policy: Mapping[str, Any]


def create_body(
    inspect: Mapping[str, Any],
    *,
    api_version: tuple[int, int],
    image: str,
    annotations: Mapping[str, str] | None = None,
    mounts: Mapping[str, str] | None = None,
    addresses: Mapping[str, str] | None = None,
    ours: Callable[[str], bool] = below_run_phaul,
) -> CreatePlan:
    """The plan for a container that is configured as another is.

    Args:
        inspect: `GET /containers/{id}/json`.
        api_version: the API that create will be called with.
        image: what to name as the image.
        annotations: added to the container's.
        mounts: host paths that are mounted in, to their path at the destination.
        addresses: networks to the IPv4 address that is pinned there; the default bridge, which
            takes none, is passed over.
        ours: whether a CRIU configuration is one of an earlier move, and not the user's.
    """
    host_config = _host_config(inspect, mounts or {}, ours)
    host_config["RestartPolicy"] = {"Name": "no"}
    # dockerd removes such a container if its start fails, with all that was carried into it.
    host_config["AutoRemove"] = False
    host_config["Annotations"] = {**host_config.get("Annotations", {}), **(annotations or {})}
    if not host_config["Annotations"]:
        del host_config["Annotations"]
    config = _config(inspect)
    config["Image"] = image
    if not config.get("Entrypoint"):
        # None at all would be the image's, even if it was taken away: --entrypoint ''.
        config["Entrypoint"] = [""]
    endpoints = _endpoints(inspect, addresses or {})
    config.pop("MacAddress", None)
    mac = configured_mac(inspect, _same_bridge(network_mode(inspect)))
    if mac and api_version < SEVERAL_ENDPOINTS:
        config["MacAddress"] = mac
    first = len(endpoints) if api_version >= SEVERAL_ENDPOINTS else 1
    if api_version < SEVERAL_ENDPOINTS:
        for _, endpoint in endpoints:
            endpoint.pop("MacAddress", None)
    body = {
        **config,
        "HostConfig": host_config,
        "NetworkingConfig": {"EndpointsConfig": dict(endpoints[:first])},
    }
    return CreatePlan(
        name=container_name(inspect),
        body=body,
        connect=tuple(endpoints[first:]),
        volumes=tuple(volumes_of(inspect)),
        restart_policy=restart_policy(inspect),
    )


# -- what a container is -----------------------------------------------------------------------


def container_name(inspect: Mapping[str, Any]) -> str:
    """Its name, without docker's slash."""
    return str(inspect.get("Name") or "").lstrip("/")


def network_mode(inspect: Mapping[str, Any]) -> str:
    """Its network mode, with the network's name where the user gave its id."""
    mode = str(inspect.get("HostConfig", {}).get("NetworkMode") or "default")
    if mode in _PREDEFINED or mode.startswith(_CONTAINER) or mode in networks_of(inspect):
        return mode
    for name, endpoint in networks_of(inspect).items():
        if str(endpoint.get("NetworkID") or "").startswith(mode):
            return name
    return mode


def networks_of(inspect: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Its endpoints by their network's name, as inspect has them."""
    found = (inspect.get("NetworkSettings") or {}).get("Networks") or {}
    return {name: endpoint or {} for name, endpoint in found.items()}


def private_netns(inspect: Mapping[str, Any]) -> bool:
    """Whether docker makes it a network namespace; it does so for `none` too."""
    mode = network_mode(inspect)
    return mode != "host" and not mode.startswith(_CONTAINER)


def takes_mac(mode: str) -> bool:
    """Whether create takes a MAC address with this network mode."""
    return mode not in ("host", "none") and not mode.startswith(_CONTAINER)


def is_user_defined(network: str) -> bool:
    """Whether a network was made by the user: only those take addresses and aliases."""
    return network not in _PREDEFINED


def upper_directory(inspect: Mapping[str, Any]) -> str:
    """Where its writable layer lies; empty where docker tells of no such place.

    Only its own storage drivers do: with containerd's image store `GraphDriver` is missing (API
    1.52), or has no data.
    """
    data = (inspect.get("GraphDriver") or {}).get("Data") or {}
    return str(data.get("UpperDir") or "")


def volumes_of(inspect: Mapping[str, Any]) -> Iterator[Volume]:
    """Every volume of a container, sorted by where it is mounted."""
    named = _named_destinations(inspect)
    for mount in sorted(inspect.get("Mounts") or (), key=lambda mount: mount["Destination"]):
        if mount.get("Type") == "volume":
            yield Volume(
                destination=mount["Destination"],
                name=mount.get("Name", ""),
                named=posixpath.normpath(mount["Destination"]) in named,
                driver=mount.get("Driver", "local"),
                source=mount.get("Source", ""),
                writable=mount.get("RW", True),
            )


def _named_destinations(inspect: Mapping[str, Any]) -> set[str]:
    host_config = inspect.get("HostConfig", {})
    asked = [split_bind(bind)[1] for bind in host_config.get("Binds") or ()]
    # --mount type=volume,target=/x without a source makes a new one too.
    asked += [mount["Target"] for mount in host_config.get("Mounts") or () if mount.get("Source")]
    return {posixpath.normpath(destination) for destination in asked}


def split_bind(bind: str) -> tuple[str, str, str]:
    """Source, destination and options of `src:dst[:opts]`; the source may be a volume's name."""
    source, _, rest = bind.partition(":")
    destination, _, options = rest.partition(":")
    return source, destination, options


def mapped(path: str, mounts: Mapping[str, str]) -> str:
    """The path at the destination for a path of this host; the same if nothing was said."""
    for source, there in mounts.items():
        if posixpath.normpath(source) == posixpath.normpath(path):
            return there
    return path


def with_configured_macs(inspect: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
    """What inspect says, and beside each endpoint's MAC address the one that the user set there.

    Inspect shows the address in use, generated or not: docker 28 generates any locally administered
    one, and API 1.52 has no `Config.MacAddress` any more.

    Args:
        inspect: `GET /containers/{id}/json`.
        kept: docker's own file of the container, config.v2.json; it has this since docker 25.
    """
    found = copy.deepcopy(dict(inspect))
    theirs = (kept.get("NetworkSettings") or {}).get("Networks") or {}
    for name, endpoint in ((found.get("NetworkSettings") or {}).get("Networks") or {}).items():
        if endpoint and _DESIRED_MAC in (theirs.get(name) or {}):
            endpoint[_DESIRED_MAC] = str(theirs[name][_DESIRED_MAC] or "")
    return found


def configured_mac(inspect: Mapping[str, Any], network: str) -> str | None:
    """The MAC address that the user set in a network; empty if docker made it, None if unknown.

    Where `with_configured_macs` does not know: for the network of `NetworkMode`, `Config` has what
    was set, up to API 1.51. Otherwise only this is known: docker makes locally administered ones,
    and before docker 28 all of them with the same prefix.
    """
    if not takes_mac(network):
        return ""
    endpoint = networks_of(inspect).get(network, {})
    if _DESIRED_MAC in endpoint:
        return str(endpoint[_DESIRED_MAC])
    if network == _same_bridge(network_mode(inspect)):
        mac = str(inspect.get("Config", {}).get("MacAddress") or "")
        if mac:
            return mac
    mac = str(endpoint.get("MacAddress") or "")
    if not mac or mac.startswith(_GENERATED_MAC):
        return ""
    return None if int(mac[:2], 16) & _LOCALLY_ADMINISTERED else mac


def _same_bridge(mode: str) -> str:
    return DEFAULT_BRIDGE if mode == "default" else mode


# -- the parts of the body ---------------------------------------------------------------------


def _config(inspect: Mapping[str, Any]) -> dict[str, Any]:
    """`Config` as create takes it; a MAC address is still there."""
    config = _present(inspect.get("Config", {}))
    host_config = inspect.get("HostConfig", {})
    if network_mode(inspect).startswith(_CONTAINER):
        for name in _CONFLICT_CONFIG:
            config.pop(name, None)
    if host_config.get("UTSMode") == "host":
        config.pop("Hostname", None)  # the host's, which create does not let one set
    return config


def _host_config(
    inspect: Mapping[str, Any], mounts: Mapping[str, str], ours: Callable[[str], bool]
) -> dict[str, Any]:
    """`HostConfig` as create takes it, at the destination."""
    found = _present(inspect.get("HostConfig", {}))
    found.pop("ContainerIDFile", None)  # a file of the user who ran the docker command
    mode = found["NetworkMode"] = network_mode(inspect)
    if "Binds" in found:
        found["Binds"] = [_bind(bind, mounts) for bind in found["Binds"]]
    for mount in found.get("Mounts", ()):
        if mount.get("Type") == "bind":
            mount["Source"] = mapped(mount["Source"], mounts)
    if "Links" in found:
        found["Links"] = [_link(link) for link in found["Links"]]
    if mode == "host":
        found.pop("Links", None)
    if mode.startswith(_CONTAINER):
        for name in _CONFLICT_HOST_CONFIG:
            found.pop(name, None)
    annotations = found.get("Annotations", {})
    if CRIU_CONFIG in annotations and ours(annotations[CRIU_CONFIG]):
        del annotations[CRIU_CONFIG]
    return found


def _present(document: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without what is null: create's default for it is the same null."""
    return {key: copy.deepcopy(value) for key, value in document.items() if value is not None}


def _bind(bind: str, mounts: Mapping[str, str]) -> str:
    source, destination, options = split_bind(bind)
    if not source.startswith("/"):
        return bind
    return ":".join([mapped(source, mounts), destination, *([options] if options else [])])


def _link(link: str) -> str:
    """`/db:/web/alias`, as inspect has it, in create's form `db:alias`."""
    name, _, alias = link.partition(":")
    return f"{name.lstrip('/')}:{alias.rpartition('/')[2]}"


def restart_policy(inspect: Mapping[str, Any]) -> dict[str, Any]:
    """Its restart policy, complete."""
    policy = inspect.get("HostConfig", {}).get("RestartPolicy") or {}
    return {
        "Name": policy.get("Name") or "no",
        "MaximumRetryCount": policy.get("MaximumRetryCount", 0),
    }


def _endpoints(
    inspect: Mapping[str, Any], addresses: Mapping[str, str]
) -> list[tuple[str, dict[str, Any]]]:
    """Networks with what is configured there, that of `NetworkMode` first."""
    main = _same_bridge(network_mode(inspect))
    if main.startswith(_CONTAINER):
        return []
    names = sorted(networks_of(inspect), key=lambda name: (name != main, name))
    return [(name, _endpoint(inspect, name, addresses.get(name, ""))) for name in names]


def _endpoint(inspect: Mapping[str, Any], network: str, address: str) -> dict[str, Any]:
    """What is configured of an endpoint, without what docker found out at its start."""
    endpoint = networks_of(inspect)[network]
    found: dict[str, Any] = {}
    if is_user_defined(network):
        short_id = str(inspect.get("Id", ""))[:_SHORT_ID]
        ipam = _filled(endpoint.get("IPAMConfig") or {})
        if address:
            ipam["IPv4Address"] = address
        found["IPAMConfig"] = ipam
        # An API before 1.45 lists the short id, which is another one there.
        found["Aliases"] = [name for name in endpoint.get("Aliases") or () if name != short_id]
        found["Links"] = list(endpoint.get("Links") or ())
    found["DriverOpts"] = dict(endpoint.get("DriverOpts") or {})
    found["GwPriority"] = endpoint.get("GwPriority") or None
    found["MacAddress"] = configured_mac(inspect, network)
    return _filled(found)


def _filled(document: Mapping[str, Any]) -> dict[str, Any]:
    return {key: copy.deepcopy(value) for key, value in document.items() if value not in _EMPTY}


# -- whether it is the same --------------------------------------------------------------------


def comparable(
    inspect: Mapping[str, Any],
    *,
    mounts: Mapping[str, str] | None = None,
    addresses: Mapping[str, str] | None = None,
    ours: Callable[[str], bool] = below_run_phaul,
) -> dict[str, Any]:
    """What has to be equal before and after a move: no ids, state, times, generated names.

    Args:
        inspect: `GET /containers/{id}/json`.
        mounts: applied to it, as in `create_body`.
        addresses: likewise.
        ours: likewise.
    """
    host_config = _host_config(inspect, mounts or {}, ours)
    host_config["NetworkMode"] = _same_bridge(host_config["NetworkMode"])
    host_config["RestartPolicy"] = restart_policy(inspect)
    config = _config(inspect)
    config["Env"] = dict(_variable(entry) for entry in config.get("Env", ()))
    config.pop("MacAddress", None)  # with its network's
    networks = dict(_endpoints(inspect, addresses or {}))
    for endpoint in networks.values():
        # An API before 1.45 lists the host name too, whether or not it was given as an alias.
        aliases = set(endpoint.pop("Aliases", ())) - {config.get("Hostname")}
        if aliases:
            endpoint["Aliases"] = sorted(aliases)
    named = {volume.destination for volume in volumes_of(inspect) if volume.named}
    return {
        **_filled({key: inspect.get(key) for key in _COMPARED}),
        "Config": _filled(config),
        "HostConfig": _filled(host_config),
        "Mounts": {
            mount["Destination"]: _mount(mount, mounts or {}, mount["Destination"] in named)
            for mount in inspect.get("Mounts") or ()
        },
        "Networks": networks,
    }


# `Path` and `Args` follow from the command, `Driver` is the storage driver.
_COMPARED = ("Name", "Image", "Path", "Args", "Platform", "Driver", "AppArmorProfile")


def _mount(mount: Mapping[str, Any], mounts: Mapping[str, str], named: bool) -> dict[str, Any]:
    found = {key: mount.get(key) for key in ("Type", "Driver", "Mode", "RW", "Propagation")}
    if named:
        found["Name"] = mount.get("Name")
    if mount.get("Type") == "bind":
        found["Source"] = mapped(mount.get("Source", ""), mounts)
    return _filled(found)


def _variable(entry: str) -> tuple[str, str | None]:
    name, equals, value = entry.partition("=")
    return name, value if equals else None


def differences(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    *,
    mounts: Mapping[str, str] | None = None,
    addresses: Mapping[str, str] | None = None,
    ours: Callable[[str], bool] = below_run_phaul,
) -> list[str]:
    """What is configured otherwise in another container, as `HostConfig.Memory: 1024, there 0`.

    The values of environment variables are not shown: they are often secret.

    Args:
        before: `GET /containers/{id}/json` at the source.
        after: the same at the destination.
        mounts: what the move changed on purpose, as told to `create_body`.
        addresses: likewise.
        ours: as in `create_body`.
    """
    one = comparable(before, mounts=mounts, addresses=addresses, ours=ours)
    return list(_differences((), one, comparable(after, ours=ours)))


def _differences(path: tuple[str, ...], before: Any, after: Any) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            yield from _differences((*path, key), before.get(key, _ABSENT), after.get(key, _ABSENT))
    elif before != after:
        one, other = _shown(before), _shown(after)
        if path[:2] == ("Config", "Env"):
            one, other = _unless_absent(before, "a value"), _unless_absent(after, "another value")
        yield f"{'.'.join(path)}: {one}, there {other}"


_ABSENT = object()


def _shown(value: Any) -> str:
    return _unless_absent(value, "") or json.dumps(value, sort_keys=True)


def _unless_absent(value: Any, text: str) -> str:
    return "nothing" if value is _ABSENT else text
