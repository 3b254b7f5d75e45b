"""From docker's inspect to docker's create; documents of docker 26.1.5 in tests/unit/docker."""

from __future__ import annotations

import copy
import json
import posixpath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from phaul_engines.docker.config import (
    CreatePlan,
    Volume,
    comparable,
    configured_mac,
    create_body,
    differences,
    network_mode,
    private_netns,
    with_configured_macs,
)

from tests.unit.docker import NAMES, document

API = (1, 45)
NEW_ID = "f" * 64


def plan_of(inspect: dict[str, Any], **options: Any) -> CreatePlan:
    return create_body(
        inspect, **{"api_version": API, "image": inspect["Config"]["Image"], **options}
    )


def joined(inspect: dict[str, Any], kind: str) -> dict[str, Any]:
    """The container with the network namespace of another one."""
    inspect["HostConfig"]["NetworkMode"] = f"container:{kind}"
    inspect["NetworkSettings"]["Networks"] = {}
    return inspect


def inspected(plan: CreatePlan, before: dict[str, Any]) -> dict[str, Any]:
    """What docker says of a container that it made by a plan, as read in daemon/create.go."""
    body = copy.deepcopy(dict(plan.body))
    host_config, networking = body.pop("HostConfig"), body.pop("NetworkingConfig")
    if body["Entrypoint"] == [""]:
        body["Entrypoint"] = None
    body.setdefault("Hostname", NEW_ID[:12])
    links = [link.split(":") for link in host_config.get("Links", ())]
    host_config["Links"] = [f"/{name}:/{plan.name}/{alias}" for name, alias in links] or None
    # What the engine does last: docker update, with the policy that it had.
    host_config["RestartPolicy"] = dict(plan.restart_policy)
    host_config.setdefault("ContainerIDFile", "")
    if not host_config.get("Privileged"):
        host_config.setdefault("MaskedPaths", ["/proc/default"])
    endpoints = {**networking["EndpointsConfig"], **dict(plan.connect)}
    main = endpoints.get(host_config["NetworkMode"], {})
    body.setdefault("MacAddress", main.get("MacAddress", ""))
    for name, endpoint in endpoints.items():
        mac = "02:42:0a:00:00:09" if name not in ("host", "none") else ""
        found = {
            "MacAddress": mac,
            "NetworkID": "a" * 64,
            "EndpointID": "b" * 64,
            "Gateway": "1.1.1.1",
        }
        endpoints[name] = {"IPAMConfig": None, "Aliases": None, **found, **endpoint}
    return {
        **{key: before.get(key) for key in ("Image", "Path", "Args", "Platform", "Driver")},
        "Id": NEW_ID,
        "Name": f"/{plan.name}",
        "Config": body,
        "HostConfig": host_config,
        "NetworkSettings": {"Networks": endpoints},
        "Mounts": mounted(body, host_config),
    }


def mounted(config: dict[str, Any], host_config: dict[str, Any]) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for bind in host_config.get("Binds") or ():
        source, destination, mode = (*bind.split(":"), "")[:3]
        kind = "bind" if source.startswith("/") else "volume"
        found[posixpath.normpath(destination)] = a_mount(kind, source, mode, "ro" not in mode)
    for mount in host_config.get("Mounts") or ():
        source = mount.get("Source", "")
        writable = not mount.get("ReadOnly")
        kept = a_mount(mount["Type"], source, "z" if mount["Type"] == "volume" else "", writable)
        found[posixpath.normpath(mount["Target"])] = kept
    for destination in config.get("Volumes") or ():
        found.setdefault(destination, a_mount("volume", "", "", True))
    return [{**mount, "Destination": destination} for destination, mount in found.items()]


def a_mount(kind: str, source: str, mode: str, writable: bool) -> dict[str, Any]:
    kept: dict[str, Any] = {"Type": kind, "Mode": mode, "RW": writable, "Propagation": ""}
    if kind == "volume":
        name = source or "0" * 64
        where = f"/other/root/volumes/{name}/_data"
        return {**kept, "Mode": mode or ("z" if source else ""), "Name": name, "Source": where,
                "Driver": "local"}  # fmt: skip
    return {**kept, "Source": source, "Propagation": "rprivate" if kind == "bind" else ""}


# -- the body ----------------------------------------------------------------------------------


def test_everything_that_was_asked_for_is_asked_for_again() -> None:
    rich = document("rich")
    body = plan_of(rich).body
    assert body["Cmd"] == ["600"]
    assert body["Entrypoint"] == ["/bin/sleep"]
    config = ("Env", "User", "WorkingDir", "Labels", "ExposedPorts", "Healthcheck", "StopSignal",
              "StopTimeout", "Hostname", "Domainname", "Volumes", "Tty", "OpenStdin")  # fmt: skip
    assert {key: body[key] for key in config} == {key: rich["Config"][key] for key in config}
    changed = {"RestartPolicy", "AutoRemove", "ContainerIDFile", "Annotations"}
    asked = {key: value for key, value in rich["HostConfig"].items() if value is not None}
    given_again = body["HostConfig"]
    assert given_again.keys() == asked.keys() - {"ContainerIDFile"}
    for key in asked.keys() - changed:
        assert given_again[key] == asked[key], key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("api_version", [(1, 43), (1, 45), (1, 51)])
def test_what_is_made_by_a_plan_is_the_same(name: str, api_version: tuple[int, int]) -> None:
    before = document(name)
    plan = plan_of(before, api_version=api_version)
    expected = ["HostConfig.AutoRemove: true, there false"] * before["HostConfig"]["AutoRemove"]
    assert differences(before, inspected(plan, before)) == expected


def test_a_duplicate_never_starts_and_nothing_carried_is_removed() -> None:
    rich = document("rich")
    rich["HostConfig"]["AutoRemove"] = True
    plan = plan_of(rich)
    assert plan.body["HostConfig"]["RestartPolicy"] == {"Name": "no"}
    assert plan.body["HostConfig"]["AutoRemove"] is False
    assert plan.restart_policy == {"Name": "on-failure", "MaximumRetryCount": 3}
    rich["HostConfig"]["RestartPolicy"] = {"Name": "", "MaximumRetryCount": 0}
    assert plan_of(rich).restart_policy["Name"] == "no"


def test_annotations_are_added_and_an_earlier_move_s_is_dropped() -> None:
    rich = document("rich")
    assert plan_of(rich).body["HostConfig"]["Annotations"] == {"a.b": "c"}
    mine = {"org.criu.config": "/run/phaul/new"}
    assert plan_of(rich, annotations=mine).body["HostConfig"]["Annotations"] == {"a.b": "c", **mine}
    theirs = plan_of(rich, ours=lambda path: False).body["HostConfig"]["Annotations"]
    assert theirs["org.criu.config"] == "/run/phaul/x.conf"
    assert rich["HostConfig"]["Annotations"]["org.criu.config"] == "/run/phaul/x.conf"
    assert "Annotations" not in plan_of(document("host")).body["HostConfig"]


def test_no_annotation_at_all_is_nobody_s() -> None:
    everything = plan_of(document("host"), ours=lambda path: True)
    assert "Annotations" not in everything.body["HostConfig"]


def test_host_paths_are_those_of_the_destination() -> None:
    rich = document("rich")
    rich["HostConfig"]["Binds"] += ["/srv/bind/:/slash:ro,z", "/srv/bindings:/other"]
    body = plan_of(rich, mounts={"/srv/bind": "/mnt/there"}).body["HostConfig"]
    assert body["Binds"] == [
        "data:/data",
        "/mnt/there:/bind:ro",
        "/mnt/there:/slash:ro,z",
        "/srv/bindings:/other",
    ]
    assert [mount.get("Source") for mount in body["Mounts"]] == ["/mnt/there", "data2", None, None]


def test_an_entrypoint_that_was_taken_away_is_not_the_image_s() -> None:
    assert document("host")["Config"]["Entrypoint"] is None
    assert plan_of(document("host")).body["Entrypoint"] == [""]


def test_the_host_name_is_kept_where_create_takes_one() -> None:
    none = document("none")
    assert plan_of(none).body["Hostname"] == none["Id"][:12]
    assert "Hostname" not in plan_of(document("host")).body  # --uts host
    host = document("host")
    host["HostConfig"]["UTSMode"] = ""
    assert plan_of(host).body["Hostname"] == "a"


def test_what_conflicts_with_another_container_s_network_is_left_out() -> None:
    other = "c" * 64
    plan = plan_of(joined(document("rich"), other))
    conflicts = {"Hostname", "Domainname", "ExposedPorts", "MacAddress"}
    assert not conflicts & plan.body.keys()
    conflicts = {"Dns", "ExtraHosts", "PortBindings", "PublishAllPorts", "Links"}
    assert not conflicts & plan.body["HostConfig"].keys()
    assert plan.body["HostConfig"]["NetworkMode"] == f"container:{other}"
    assert plan.body["NetworkingConfig"] == {"EndpointsConfig": {}}


def test_links_are_in_the_form_that_create_takes() -> None:
    bridge = document("bridge")
    assert bridge["HostConfig"]["Links"] == ["/db:/plain/db"]
    assert plan_of(bridge).body["HostConfig"]["Links"] == ["db:db"]
    host = document("host")
    host["HostConfig"]["Links"] = ["/db:/host/db"]
    assert "Links" not in plan_of(host).body["HostConfig"]


# -- networks ----------------------------------------------------------------------------------

FRONT = {"IPAMConfig": {"IPv4Address": "172.30.1.40"}, "Aliases": ["web"]}
BACK = {
    "IPAMConfig": {"IPv4Address": "172.30.2.40"},
    "Aliases": ["api"],
    "DriverOpts": {"com.example": "1"},
}
MAC = {"MacAddress": "02:42:ac:1e:01:aa"}


def test_several_networks_at_once_from_api_1_44() -> None:
    plan = plan_of(document("rich"), api_version=(1, 44))
    endpoints = plan.body["NetworkingConfig"]["EndpointsConfig"]
    assert endpoints == {"front": {**FRONT, **MAC}, "back": BACK}
    assert plan.connect == ()
    assert "MacAddress" not in plan.body


def test_one_network_and_the_rest_afterwards_before_api_1_44() -> None:
    rich = document("rich")
    networks = rich["NetworkSettings"]["Networks"]
    networks["aaa"] = networks["zzz"] = {"DriverOpts": {"n": "1"}}
    plan = plan_of(rich, api_version=(1, 43))
    assert plan.body["NetworkingConfig"]["EndpointsConfig"] == {"front": FRONT}
    assert plan.body["MacAddress"] == MAC["MacAddress"]
    assert [name for name, _ in plan.connect] == ["aaa", "back", "zzz"]
    assert dict(plan.connect)["back"] == BACK


def test_addresses_are_pinned_where_a_network_takes_them() -> None:
    rich = document("rich")
    rich["NetworkSettings"]["Networks"]["back"]["IPAMConfig"] = None
    rich["NetworkSettings"]["Networks"]["bridge"] = {"IPAMConfig": {}, "IPAddress": "172.17.0.9"}
    plan = plan_of(rich, addresses={"back": "172.30.2.40", "bridge": "172.17.0.9"})
    endpoints = plan.body["NetworkingConfig"]["EndpointsConfig"]
    assert endpoints["back"]["IPAMConfig"] == {"IPv4Address": "172.30.2.40"}
    assert endpoints["front"]["IPAMConfig"] == {"IPv4Address": "172.30.1.40"}
    assert endpoints["bridge"] == {}


def test_the_id_of_a_network_becomes_its_name() -> None:
    rich = document("rich")
    network_id = rich["NetworkSettings"]["Networks"]["front"]["NetworkID"]
    for mode in (network_id, network_id[:12]):
        rich["HostConfig"]["NetworkMode"] = mode
        assert network_mode(rich) == "front"
        assert plan_of(rich).body["HostConfig"]["NetworkMode"] == "front"


def test_a_generated_mac_is_not_pinned_and_one_that_was_set_is() -> None:
    rich = document("rich")
    networks = rich["NetworkSettings"]["Networks"]
    assert configured_mac(rich, "front") == "02:42:ac:1e:01:aa"
    assert configured_mac(rich, "back") == ""
    networks["back"]["MacAddress"] = "00:16:3e:01:02:03"
    assert configured_mac(rich, "back") == "00:16:3e:01:02:03"
    networks["back"]["MacAddress"] = "02:11:22:33:44:55"
    assert configured_mac(rich, "back") is None
    del rich["Config"]["MacAddress"]  # as API 1.52
    assert configured_mac(rich, "front") == ""
    bridge = document("bridge")
    bridge["HostConfig"]["NetworkMode"] = "default"
    bridge["Config"]["MacAddress"] = "02:00:00:00:00:01"
    assert configured_mac(bridge, "bridge") == "02:00:00:00:00:01"
    host = document("host")
    host["Config"]["MacAddress"] = "02:00:00:00:00:01"
    assert "MacAddress" not in plan_of(host, api_version=(1, 43)).body
    assert plan_of(host).body["NetworkingConfig"]["EndpointsConfig"] == {"host": {}}


def kept(**macs: str) -> dict[str, Any]:
    """Docker's own file of a container, as docker 25 and later write it."""
    networks = {name: {"DesiredMacAddress": mac} for name, mac in macs.items()}
    return {"NetworkSettings": {"Networks": networks}}


def test_docker_s_own_file_says_what_was_set_where_inspect_shows_what_is_in_use() -> None:
    rich = document("rich")
    networks = rich["NetworkSettings"]["Networks"]
    del rich["Config"]["MacAddress"]  # as API 1.52
    for endpoint in networks.values():
        endpoint["MacAddress"] = "9e:11:22:33:44:55"  # as docker 28 generates them, or as was set
    assert [configured_mac(rich, name) for name in ("front", "back")] == [None, None]
    untouched = copy.deepcopy(rich)
    told = with_configured_macs(rich, kept(front="", back="9e:11:22:33:44:55"))
    assert rich == untouched
    assert [configured_mac(told, name) for name in ("front", "back")] == ["", "9e:11:22:33:44:55"]
    endpoints = plan_of(told).body["NetworkingConfig"]["EndpointsConfig"]
    assert "MacAddress" not in endpoints["front"]
    assert endpoints["back"]["MacAddress"] == "9e:11:22:33:44:55"
    told = with_configured_macs(rich, kept(front="9e:11:22:33:44:55", back=""))
    assert plan_of(told, api_version=(1, 43)).body["MacAddress"] == "9e:11:22:33:44:55"


@pytest.mark.parametrize("file", [{}, {"NetworkSettings": None}, kept(other=""), kept()])
def test_a_file_that_does_not_say_it_changes_nothing(file: dict[str, Any]) -> None:
    assert with_configured_macs(document("rich"), file) == document("rich")
    older = {"NetworkSettings": {"Networks": {"front": {"MacAddress": "02:42:ac:1e:01:aa"}}}}
    assert with_configured_macs(document("rich"), older) == document("rich")


def test_the_short_id_that_an_older_api_lists_is_no_alias() -> None:
    rich = document("rich")
    aliases = ["web", rich["Id"][:12], "rich"]
    rich["NetworkSettings"]["Networks"]["front"]["Aliases"] = aliases
    plan = plan_of(rich)
    assert plan.body["NetworkingConfig"]["EndpointsConfig"]["front"]["Aliases"] == ["web", "rich"]
    assert differences(document("rich"), rich) == []


def test_whose_network_namespace_docker_makes() -> None:
    found = {name: private_netns(document(name)) for name in NAMES}
    assert found == {"rich": True, "bridge": True, "host": False, "none": True}
    assert not private_netns(joined(document("rich"), "c" * 64))


def test_the_priority_of_a_gateway_and_driver_options_are_kept() -> None:
    rich = document("rich")
    rich["NetworkSettings"]["Networks"]["back"].update(GwPriority=7, Links=["db:db"])
    endpoint = plan_of(rich).body["NetworkingConfig"]["EndpointsConfig"]["back"]
    assert endpoint == {**BACK, "GwPriority": 7, "Links": ["db:db"]}


# -- volumes -----------------------------------------------------------------------------------


def test_the_plan_lists_each_volume_and_whether_docker_names_it() -> None:
    volumes = {volume.destination: volume for volume in plan_of(document("rich")).volumes}
    assert {where: volume.named for where, volume in volumes.items()} == {
        "/anon": False,
        "/anon2": False,
        "/data": True,
        "/data2": True,
    }
    where = "/var/lib/docker/volumes/data/_data"
    assert volumes["/data"] == Volume("/data", "data", True, "local", where, True)


# -- comparing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_container_equals_itself_after_a_restart(name: str) -> None:
    before, after = document(name), document(name)
    for key in ("Id", "Created", "LogPath", "HostsPath", "ResolvConfPath", "HostnamePath"):
        after[key] = "other"
    after["State"], after["RestartCount"], after["GraphDriver"] = {"Pid": 9}, 7, {}
    for mount in after["Mounts"]:
        if len(mount.get("Name", "")) == 64:
            mount["Name"] = mount["Source"] = "other"
    after["Mounts"].reverse()
    for endpoint in after["NetworkSettings"]["Networks"].values():
        endpoint.update(EndpointID="x", NetworkID="x", Gateway="x", IPAddress="x", DNSNames=["x"])
    after["NetworkSettings"].update(SandboxID="x", SandboxKey="x", Ports={})
    assert differences(before, after) == []


def test_what_api_versions_say_in_two_ways_is_no_difference() -> None:
    before, after = document("bridge"), document("bridge")
    after["HostConfig"]["NetworkMode"] = "default"
    assert differences(before, after) == []
    before, after = document("rich"), document("rich")
    for inspect in (before, after):
        inspect["NetworkSettings"]["Networks"]["front"]["MacAddress"] = "00:16:3e:01:02:03"
    before["Config"]["MacAddress"] = "00:16:3e:01:02:03"
    del after["Config"]["MacAddress"]  # as API 1.52
    assert differences(before, after) == []


CHANGES: list[tuple[str, Any, str | None]] = [
    ("HostConfig.Memory", 1, "HostConfig.Memory: 134217728, there 1"),
    ("HostConfig.Privileged", True, "HostConfig.Privileged: false, there true"),
    ("HostConfig.CapAdd", None, 'HostConfig.CapAdd: ["NET_ADMIN"], there nothing'),
    ("Config.Labels.one", "2", 'Config.Labels.one: "1", there "2"'),
    ("Config.Hostname", "poor", 'Config.Hostname: "rich", there "poor"'),
    ("Image", "sha256:0", None),
    ("Name", "/other", 'Name: "/rich", there "/other"'),
    ("NetworkSettings.Networks.back.Aliases", [], 'Networks.back.Aliases: ["api"], there nothing'),
    ("Mounts", [], None),
]


@pytest.mark.parametrize(("path", "value", "said"), CHANGES)
def test_a_difference_is_told_with_its_path_and_both_values(
    path: str, value: Any, said: str | None
) -> None:
    after = document("rich")
    *parents, last = path.split(".")
    place = after
    for key in parents:
        place = place[key]
    place[last] = value
    found = differences(document("rich"), after)
    assert found == [said] if said else found


def test_no_value_of_the_environment_is_told() -> None:
    before, after = document("rich"), document("rich")
    before["Config"]["Env"] = ["SECRET=hush", "GONE=hush", "SAME=1"]
    after["Config"]["Env"] = ["SECRET=hash", "SAME=1"]
    assert differences(before, after) == [
        "Config.Env.GONE: a value, there nothing",
        "Config.Env.SECRET: a value, there another value",
    ]


def test_what_a_move_changed_on_purpose_is_no_difference() -> None:
    rich = document("rich")
    rich["NetworkSettings"]["Networks"]["back"]["IPAMConfig"] = {}
    changed: dict[str, Any] = {
        "mounts": {"/srv/bind": "/mnt/there"},
        "addresses": {"back": "172.30.2.40"},
    }
    after = inspected(plan_of(rich, **changed), rich)
    assert differences(rich, after, **changed) == []
    assert len(differences(rich, after)) == 5


# -- properties --------------------------------------------------------------------------------

TEXTS = st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1, max_size=8)
ENDPOINTS = st.fixed_dictionaries(
    {"NetworkID": st.just("d" * 64)},
    optional={
        "IPAMConfig": st.sampled_from(
            [None, {}, {"IPv4Address": "10.1.1.1"}, {"IPv6Address": "::1"}]
        ),
        "Aliases": st.none() | st.lists(TEXTS, max_size=2, unique=True),
        "DriverOpts": st.none() | st.dictionaries(TEXTS, TEXTS, max_size=2),
        "MacAddress": st.sampled_from(["", "02:42:0a:01:01:01", "00:16:3e:00:00:01"]),
        "GwPriority": st.integers(0, 2),
    },
)
RESTART_POLICIES = st.sampled_from(["", "no", "always", "unless-stopped", "on-failure"])


@st.composite
def containers(draw: st.DrawFn) -> dict[str, Any]:
    """Documents of docker with parts of one another, and networks as they may be."""
    inspect = document(draw(st.sampled_from(NAMES)))
    other = document(draw(st.sampled_from(NAMES)))
    for key in draw(st.sets(st.sampled_from(sorted(other["HostConfig"].keys() - {"Links"})))):
        inspect["HostConfig"][key] = other["HostConfig"][key]
    if not inspect["HostConfig"]["Privileged"]:  # docker fills them in, if they are not emptied
        masked = st.sampled_from([[], ["/proc/kcore"]])
        inspect["HostConfig"]["MaskedPaths"] = draw(masked)
    networks = draw(st.dictionaries(TEXTS, ENDPOINTS, min_size=1, max_size=3))
    mode = draw(st.sampled_from([*sorted(networks), "host", "none", "bridge", "default"]))
    if mode in ("host", "none"):
        networks = {mode: {}}
    elif mode in ("bridge", "default"):
        networks["bridge"] = {"MacAddress": "02:42:ac:11:00:02"}
    inspect["HostConfig"]["NetworkMode"] = mode
    inspect["HostConfig"]["Links"] = None
    inspect["HostConfig"]["RestartPolicy"] = {
        "Name": draw(RESTART_POLICIES),
        "MaximumRetryCount": 1,
    }
    inspect["HostConfig"]["AutoRemove"] = draw(st.booleans())
    inspect["NetworkSettings"]["Networks"] = networks
    inspect["Config"]["MacAddress"] = networks.get(mode, {}).get("MacAddress", "")
    inspect["Config"]["Entrypoint"] = draw(st.sampled_from([None, [], ["/bin/sh"]]))
    inspect["Mounts"] = mounted(inspect["Config"], inspect["HostConfig"])
    return inspect


@given(containers(), st.sampled_from([(1, 43), (1, 44), (1, 45), (1, 51)]))
def test_create_of_create_changes_nothing(
    inspect: dict[str, Any], api_version: tuple[int, int]
) -> None:
    untouched = copy.deepcopy(inspect)
    plan = plan_of(inspect, api_version=api_version)
    assert inspect == untouched
    assert plan.body["HostConfig"]["RestartPolicy"] == {"Name": "no"}
    assert plan.body["HostConfig"]["AutoRemove"] is False
    assert api_version >= (1, 44) or len(plan.body["NetworkingConfig"]["EndpointsConfig"]) == 1
    after = inspected(plan, inspect)
    inspect["HostConfig"]["AutoRemove"] = False
    if api_version < (1, 44):
        # Not to be had there: a MAC address in a network that is connected afterwards.
        for name, _ in plan.connect:
            inspect["NetworkSettings"]["Networks"][name].pop("MacAddress", None)
    assert differences(inspect, after) == []
    again = plan_of(after, api_version=api_version)
    assert (again.body, again.connect) == (plan.body, plan.connect)


@given(containers())
def test_what_is_compared_is_json_and_has_no_id(inspect: dict[str, Any]) -> None:
    text = json.dumps(comparable(inspect))
    assert inspect["Id"] not in text
    assert "d" * 64 not in text
