"""What speaks against moving a container of docker, and against a daemon."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from phaul_engines.docker.config import with_configured_macs
from phaul_engines.docker.daemon_findings import (
    daemon_findings,
    no_layer,
    parse_api_version,
    parse_version,
)
from phaul_engines.docker.findings import findings

from phaul_runtime.engine import OK, REFUSED, WARNING, Finding
from tests.unit.docker import document

INFO = {
    "Driver": "overlay2",
    "ExperimentalBuild": True,
    "CgroupVersion": "2",
    "SecurityOptions": ["name=seccomp,profile=builtin", "name=cgroupns"],
    "Runtimes": {"io.containerd.runc.v2": {}, "runc": {"path": "runc"}},
}

IMAGE_STORE: dict[str, Any] = {
    "Driver": "overlayfs",
    "DriverStatus": [["driver-type", "io.containerd.snapshotter.v1"]],
}


def against(found: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.check, finding.level) for finding in found if finding.level != OK]


def only(found: list[Finding], text: str) -> Finding:
    (finding,) = [finding for finding in found if text in finding.text]
    return finding


def plain() -> dict[str, Any]:
    """A container that nothing speaks against."""
    found = document("none")
    found["HostConfig"]["AutoRemove"] = False
    return found


def test_nothing_speaks_against_a_plain_container() -> None:
    assert against(findings(plain())) == []
    said = [(finding.check, finding.level) for finding in findings(plain())]
    assert said == [("docker-network", OK), ("docker-log", OK)]


def host_config(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda inspect: inspect["HostConfig"].update(values)


def state(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda inspect: inspect["State"].update(values)


def label(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda inspect: inspect["Config"].update(Labels={name: "x"})


OTHER = "container:" + "c" * 64
SPEAKS_AGAINST: list[tuple[Callable[[dict[str, Any]], object], str, str]] = [
    (state(Paused=True), "docker-state", REFUSED),
    (state(Restarting=True), "docker-state", REFUSED),
    (state(Dead=True), "docker-state", REFUSED),
    (state(Running=False, Status="exited"), "docker-state", REFUSED),
    (host_config(AutoRemove=True), "docker-autoremove", WARNING),
    (label("com.docker.swarm.task.id"), "docker-swarm", REFUSED),
    (label("com.docker.compose.project"), "docker-compose", WARNING),
    (host_config(NetworkMode=OTHER), "docker-network", REFUSED),
    (host_config(Links=["/db:/x/db"]), "docker-network", WARNING),
    (host_config(PortBindings={"80/tcp": [{"HostPort": ""}]}), "docker-network", WARNING),
    (lambda inspect: inspect["NetworkSettings"].update(Networks={}), "docker-network", WARNING),
    (host_config(PidMode="host"), "docker-namespaces", REFUSED),
    (host_config(PidMode=OTHER), "docker-namespaces", REFUSED),
    (host_config(IpcMode="host"), "docker-namespaces", REFUSED),
    (host_config(IpcMode=OTHER), "docker-namespaces", REFUSED),
    (host_config(UTSMode="host"), "docker-namespaces", WARNING),
    (host_config(UsernsMode="private"), "docker-namespaces", REFUSED),
    (host_config(Cgroup=OTHER), "docker-namespaces", REFUSED),
    (host_config(Privileged=True), "docker-devices", WARNING),
    (host_config(Devices=[{"PathOnHost": "/dev/kvm"}]), "docker-devices", REFUSED),
    (host_config(DeviceRequests=[{"Capabilities": [["gpu"]]}]), "docker-devices", REFUSED),
    (host_config(BlkioDeviceReadBps=[{"Path": "/dev/sda"}]), "docker-devices", WARNING),
    (host_config(Runtime="kata"), "docker-runtime", REFUSED),
    (host_config(Isolation="hyperv"), "docker-runtime", REFUSED),
    (host_config(VolumesFrom=["c" * 64 + ":ro"]), "docker-volume", REFUSED),
    (
        lambda inspect: inspect.update(Mounts=[{"Type": "npipe", "Destination": "/x"}]),
        "docker-mounts",
        REFUSED,
    ),
]


@pytest.mark.parametrize(("change", "check", "level"), SPEAKS_AGAINST)
def test_one_thing_speaks_against_it(
    change: Callable[[dict[str, Any]], object], check: str, level: str
) -> None:
    inspect = plain()
    change(inspect)
    assert against(findings(inspect)) == [(check, level)]


@pytest.mark.parametrize(
    "values",
    [
        {"Runtime": "io.containerd.runc.v2"},
        {"Isolation": "default"},
        {"UsernsMode": "host"},
        {"IpcMode": "shareable"},
        {"PortBindings": {"80/tcp": [{"HostPort": "8080"}]}},
        {"NetworkMode": "host"},
        {"LogConfig": {"Type": "syslog", "Config": {}}},
    ],
)
def test_these_do_not_speak_against_it(values: dict[str, Any]) -> None:
    inspect = plain()
    inspect["HostConfig"].update(values)
    assert against(findings(inspect)) == []


def test_another_container_is_named_by_its_short_id() -> None:
    inspect = plain()
    inspect["HostConfig"]["NetworkMode"] = OTHER
    assert only(findings(inspect), "namespace").text.endswith("container, cccccccccccc")


def test_log_lines_on_the_host_stay_there() -> None:
    inspect = plain()
    assert "stays on this host" in only(findings(inspect), "log driver").text
    inspect["HostConfig"]["LogConfig"]["Type"] = "fluentd"
    assert only(findings(inspect), "log driver").text == "log driver fluentd"


def test_a_mac_that_may_have_been_set_is_told() -> None:
    rich = document("rich")
    found = findings(rich, mounts={"/srv/bind": "shared"})
    assert against(found) == []
    rich["NetworkSettings"]["Networks"]["back"]["MacAddress"] = "02:11:22:33:44:55"
    found = findings(rich, mounts={"/srv/bind": "shared"})
    assert against(found) == [("docker-network", WARNING)]
    assert (
        "02:11:22:33:44:55, may have been set, which docker does not tell"
        in only(found, "MAC address").text
    )


@pytest.mark.parametrize("was_set", ["", "9e:11:22:33:44:55"])
def test_nothing_is_told_of_a_mac_of_which_docker_says_whether_it_was_set(was_set: str) -> None:
    """Docker 28 generates any locally administered address."""
    bridge = document("bridge")
    bridge["NetworkSettings"]["Networks"]["bridge"]["MacAddress"] = "9e:11:22:33:44:55"
    file = {"NetworkSettings": {"Networks": {"bridge": {"DesiredMacAddress": was_set}}}}
    told = with_configured_macs(bridge, file)
    assert not [finding for finding in findings(told) if "MAC address" in finding.text]
    assert [finding for finding in findings(bridge) if "MAC address" in finding.text]


def test_a_published_port_that_docker_chose_is_told() -> None:
    bridge = document("bridge")
    assert "port for 7000/tcp" in only(findings(bridge), "chose").text
    bridge["HostConfig"]["NetworkMode"] = "host"
    assert not [finding for finding in findings(bridge) if "chose" in finding.text]


# -- what is mounted ---------------------------------------------------------------------------


def bound(source: str) -> dict[str, Any]:
    inspect = plain()
    inspect["Mounts"] = [{"Type": "bind", "Source": source, "Destination": "/in"}]
    return inspect


def test_a_directory_of_the_host_has_to_be_configured() -> None:
    found = only(findings(bound("/srv/x")), "/srv/x")
    assert (found.check, found.level) == ("docker-mounts", REFUSED)
    assert found.hint == "engines.docker.mounts: {/srv/x: shared | rsync | /path/there}"
    for how in ("shared", "rsync", "/srv/y"):
        assert only(findings(bound("/srv/x"), mounts={"/srv/x/": how}), how).level == OK
    assert against(findings(bound("/srv/x"), mounts={"/srv": "shared"})) != []


def test_a_file_of_the_host_is_left_to_the_checks_of_files() -> None:
    found = findings(bound("/etc/x.conf"), is_directory=lambda path: path != "/etc/x.conf")
    assert not [finding for finding in found if finding.check == "docker-mounts"]


@pytest.mark.parametrize("path", ["/var/run/docker.sock", "/run/containerd/containerd.sock"])
def test_docker_s_own_socket_has_to_be_told_shared(path: str) -> None:
    found = only(findings(bound(path), is_directory=lambda path: False), "socket")
    assert (found.check, found.level) == ("docker-mounts", REFUSED)
    assert against(findings(bound(path), mounts={path: "rsync"})) == [("docker-mounts", REFUSED)]
    assert against(findings(bound(path), mounts={path: "shared"})) == []


def volume(name: str, driver: str = "local") -> dict[str, Any]:
    inspect = plain()
    inspect["HostConfig"]["Binds"] = ["named:/in"]
    found = {"Type": "volume", "Name": name, "Driver": driver, "Destination": "/in"}
    inspect["Mounts"] = [{**found, "Source": "/s", "RW": True}]
    return inspect


def test_volumes_of_the_driver_local_are_carried() -> None:
    assert only(findings(volume("named")), "volume").text == "the volume named at /in: rsync"
    shared = findings(volume("named"), volumes={"named": "shared"})
    assert only(shared, "volume").text == "the volume named at /in: shared"
    # The engine goes by its name, and so does what is said of it.
    carried = findings(volume("named"), volumes={"/in": "shared"})
    assert only(carried, "volume").text == "the volume named at /in: rsync"


def test_a_volume_of_another_driver_has_to_be_shared() -> None:
    found = only(findings(volume("named", "rexray")), "rexray")
    assert (found.check, found.level) == ("docker-volume", REFUSED)
    assert "engines.docker.volumes: {named: shared}" in found.hint
    inspect = volume("0" * 64, "rexray")
    inspect["HostConfig"]["Binds"] = None
    hint = only(findings(inspect), "rexray").hint  # an unnamed one cannot be shared
    assert hint == "start the container with a named volume at /in, which can be shared"
    inspect = volume("named", "rexray")
    assert against(findings(inspect, volumes={"named": "rsync"})) == [("docker-volume", REFUSED)]
    assert against(findings(inspect, volumes={"named": "shared"})) == []


@pytest.mark.parametrize(
    ("options", "level"),
    [
        ({"type": "nfs", "o": "rw", "device": ":/export"}, REFUSED),
        ({"type": "none", "o": "addr=10.0.0.1,rw", "device": ":/export"}, REFUSED),
        ({"type": "none", "o": "bind", "device": "/srv"}, WARNING),
        ({"size": "1g"}, OK),
        ({}, OK),
    ],
)
def test_options_of_a_volume_of_the_driver_local(options: dict[str, str], level: str) -> None:
    told = findings(volume("named"), volume_facts={"named": {"Options": options}})
    assert only(told, "volume").level == level
    inspect = volume("named")
    driver = {"DriverConfig": {"Name": "local", "Options": options}}
    mount = {"Type": "volume", "Source": "named", "Target": "/in/", "VolumeOptions": driver}
    inspect["HostConfig"]["Mounts"] = [mount]
    assert only(findings(inspect), "volume").level == level
    shared = findings(inspect, volumes={"named": "shared"})
    assert only(shared, "volume").level == OK


def test_a_volume_without_a_name_cannot_be_shared() -> None:
    inspect = volume("0" * 64)
    inspect["HostConfig"]["Binds"] = None
    assert only(findings(inspect), "volume").text == "an unnamed volume at /in: rsync"
    found = findings(inspect, volumes={"/in": "shared"})
    assert against(found) == [("docker-volume", REFUSED)]


# -- the daemon --------------------------------------------------------------------------------


def daemon(
    version: str = "26.1.5+dfsg1",
    api_version: str = "1.45",
    *,
    private_netns: bool = True,
    destination: bool = True,
    **info: Any,
) -> list[tuple[str, str]]:
    return against(
        daemon_findings(
            version,
            api_version,
            {**INFO, **info},
            private_netns=private_netns,
            destination=destination,
        )
    )


VERSION_REFUSED = [("docker-version", REFUSED)]
VERSION_WARNING = [("docker-version", WARNING)]


@pytest.mark.parametrize(
    ("version", "api_version", "private", "host"),
    [
        ("24.0.7", "1.43", [], []),
        ("25.0.0", "1.44", VERSION_REFUSED, VERSION_REFUSED),
        ("25.0.3", "1.44", VERSION_REFUSED, VERSION_REFUSED),
        ("25.0.4", "1.44", [], []),
        ("26.0.2", "1.45", VERSION_REFUSED, []),
        ("26.1.5+dfsg1", "1.45", [], []),
        ("27.5.1", "1.47", VERSION_WARNING, VERSION_WARNING),
        ("28.0.0", "1.48", VERSION_REFUSED, []),
        ("29.1.0-rc.1", "1.52", VERSION_REFUSED, []),
        ("20.10.24+dfsg1", "1.41", VERSION_REFUSED, VERSION_REFUSED),
        ("19.03.15", "1.40", VERSION_REFUSED + VERSION_WARNING, VERSION_REFUSED + VERSION_WARNING),
        ("dev", "1.45", VERSION_WARNING, VERSION_WARNING),
    ],
)
def test_versions(
    version: str,
    api_version: str,
    private: list[tuple[str, str]],
    host: list[tuple[str, str]],
) -> None:
    assert daemon(version, api_version) == private
    assert daemon(version, api_version, private_netns=False) == host


@pytest.mark.parametrize("version", ["25.0.3", "26.0.2", "28.5.2", "29.1.0"])
def test_only_the_destination_s_docker_restores(version: str) -> None:
    """So a container can leave such a docker: that is the remedy."""
    assert daemon(version, destination=False) == VERSION_WARNING
    told = daemon_findings(version, "1.45", INFO, private_netns=True, destination=False)
    assert "it cannot move back to this host" in only(told, version + " restores no").text


def named(text: str) -> list[str]:
    """Versions as a hint names them; what stands for later ones is the last of its series."""
    found = re.findall(r"\d+(?:\.\d+)*", text.replace("a later 25.0", "25.0.8"))
    return [number if "." in number else f"{number}.5.1" for number in found]


@pytest.mark.parametrize("destination", [True, False])
@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize(
    ("version", "api_version"),
    [
        ("19.03.15", "1.40"),
        ("20.10.24", "1.41"),
        ("25.0.0", "1.44"),
        ("26.0.2", "1.45"),
        ("28.5.2", "1.51"),
        ("29.1.0", "1.52"),
    ],
)
def test_no_hint_of_a_version_leads_to_one_that_is_refused(
    version: str, api_version: str, private: bool, destination: bool
) -> None:
    told = daemon_findings(
        version, api_version, INFO, private_netns=private, destination=destination
    )
    hints = [finding.hint for finding in told if finding.level == REFUSED]
    for hint in hints:
        assert named(hint)
        for other in named(hint):
            assert ("docker-version", REFUSED) not in daemon(other, private_netns=private)
        if "upgrade" in hint:
            newest = max(parse_version(other) or (0, 0, 0) for other in named(hint))
            assert newest > (parse_version(version) or (0, 0, 0))
        # `none` has a network namespace of its own too, and another container's is refused.
        assert re.findall(r"--network (\w+)", hint) in ([], ["host"])


def test_the_destination_needs_the_experimental_features() -> None:
    assert daemon(ExperimentalBuild=False) == [("docker-experimental", REFUSED)]
    assert daemon(ExperimentalBuild=False, destination=False) == []


def test_what_the_daemon_s_host_has_to_have() -> None:
    assert daemon(Driver="btrfs") == [("docker-storage", REFUSED)]
    assert daemon(**IMAGE_STORE) == [("docker-storage", REFUSED)]
    assert daemon(CgroupVersion="1") == [("docker-cgroup", WARNING)]
    assert daemon(SecurityOptions=["name=rootless"]) == [("docker-namespaces", REFUSED)]
    assert daemon(SecurityOptions=["name=userns"]) == [("docker-namespaces", REFUSED)]
    assert daemon(Runtimes={"kata": {}}) == [("docker-runtime", REFUSED)]
    assert daemon(Runtimes={"runc": {}}) == []


def test_a_storage_driver_s_hint_is_the_setting_that_it_follows() -> None:
    """dockerd does not start with overlay2 as the image store's snapshotter."""
    own = no_layer(document("bridge"), {**INFO, "Driver": "btrfs"})
    assert "btrfs" in own.message
    assert '"storage-driver": "overlay2"' in own.hint
    store = no_layer(document("bridge"), {**INFO, **IMAGE_STORE})
    assert "containerd's image store (overlayfs)" in store.message
    assert '"containerd-snapshotter": false' in store.hint
    assert "storage-driver" not in store.hint


def test_versions_are_read_as_they_are_written() -> None:
    assert parse_version("26.1.5+dfsg1") == (26, 1, 5)
    assert parse_version("20.10") == (20, 10, 0)
    assert parse_version("library-import") is None
    assert parse_api_version("1.45") == (1, 45)
    assert parse_api_version("none") == (0, 0)
