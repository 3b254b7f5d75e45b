"""A real docker makes the same container from a plan as from the command that made the first."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from phaul_engines.docker.config import CreatePlan, create_body, differences
from phaul_engines.docker.daemon_findings import daemon_findings, parse_api_version
from phaul_engines.docker.findings import findings
from phaul_lab import Lab

from phaul_runtime.engine import OK
from tests.e2e.conftest import Hosts
from tests.e2e.docker_hosts import IMAGE, DockerHosts, docker_lab

__all__ = ["docker_lab"]

# The Engine API without a client of docker's: method, path, body.
API = """
import http.client, socket, sys
class Connection(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect("/var/run/docker.sock")
connection = Connection("docker", timeout=100)
method, path, body = sys.argv[1:]
connection.request(method, path, body, {"Content-Type": "application/json"})
answer = connection.getresponse()
text = answer.read().decode()
if answer.status >= 300:
    sys.exit(f"{method} {path}: {answer.status} {text}")
print(text)
"""


@pytest.fixture(scope="module")
def docker_hosts(docker_lab: Lab) -> DockerHosts:
    """The daemons that all docker tests share."""
    return DockerHosts(Hosts(docker_lab))


@dataclass
class Docker:
    """The docker of host a; what is made with it is called cfg-*."""

    hosts: DockerHosts

    def __call__(self, *words: str) -> str:
        return self.hosts.sh("a", shlex.join(["docker", *words]))

    def api(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        text = json.dumps(body) if body is not None else ""
        answer = self.hosts.sh("a", shlex.join(["python3", "-c", API, method, path, text]))
        return json.loads(answer) if answer else None

    def inspect(self, name: str, api: str = "1.45") -> dict[str, Any]:
        found: dict[str, Any] = self.api("GET", f"/v{api}/containers/{name}/json")
        return found

    def make(self, plan: CreatePlan, api: str = "1.45") -> None:
        """Make the container of a plan, as an engine does."""
        made = self.api("POST", f"/v{api}/containers/create?name={plan.name}", plan.body)
        for network, endpoint in plan.connect:
            body = {"Container": made["Id"], "EndpointConfig": endpoint}
            self.api("POST", f"/v{api}/networks/{network}/connect", body)

    def restore_policy(self, plan: CreatePlan) -> None:
        body = {"RestartPolicy": plan.restart_policy}
        self.api("POST", f"/v1.45/containers/{plan.name}/update", body)

    def clean(self) -> None:
        self.hosts.sh(
            "a",
            'some=$(docker ps -aq --filter name=^/cfg-) && [ -z "$some" ] || docker rm -fv $some;'
            "some=$(docker network ls -q --filter name=^cfg-)"
            ' && [ -z "$some" ] || docker network rm $some;'
            "some=$(docker volume ls -q --filter name=^cfg-)"
            ' && [ -z "$some" ] || docker volume rm $some;'
            "rm -rf /var/tmp/cfg-bind; rmdir /sys/fs/cgroup/cfg",
            check=False,
        )


@pytest.fixture
def docker(docker_hosts: DockerHosts) -> Iterator[Docker]:
    found = Docker(docker_hosts)
    found.clean()
    yield found
    found.clean()


RICH = """
    --hostname rich --domainname example.test -e A=1 -e B='x y=z' -u 1000:1000 -w /tmp
    -l one=1 -l two.dots=2 --expose 9000/udp -p 127.0.0.1:18080:80 -p 18443:443/tcp
    -m 128m --memory-reservation 64m --cpus 0.5 --cpu-shares 512 --pids-limit 99
    --ulimit nofile=1024:2048 --cap-add NET_ADMIN --cap-drop MKNOD --security-opt no-new-privileges
    --security-opt seccomp=unconfined --security-opt systempaths=unconfined
    --tmpfs /scratch:size=8m,mode=1777 --shm-size 32m --sysctl net.core.somaxconn=512
    --log-driver json-file --log-opt max-size=1m --dns 9.9.9.9 --dns-search example.test
    --dns-option ndots:2 --add-host db.local:10.1.2.3 --init --read-only --cgroup-parent /cfg
    --cgroupns private --ipc shareable --stop-signal SIGINT --stop-timeout 7 --oom-score-adj 100
    --health-cmd 'exit 0' --health-interval 30s --health-retries 2 --restart on-failure:3
    --group-add 27 --annotation org.criu.config=/run/phaul/x.conf --annotation a.b=c
    -v cfg-data:/data -v /anon -v /var/tmp/cfg-bind:/bind:ro
    --mount type=bind,src=/var/tmp/cfg-bind,dst=/mbind,bind-propagation=private,bind-nonrecursive
    --mount type=volume,source=cfg-data2,target=/data2,volume-nocopy
    --mount type=tmpfs,target=/t2,tmpfs-size=1m --mount type=volume,target=/anon2
    --entrypoint /bin/sleep
"""
FRONT = "--network cfg-front --ip 172.30.1.40 --network-alias web --mac-address 02:42:ac:1e:01:aa"
CASES = {
    "networks": f"{FRONT} {RICH} {IMAGE} 600",
    "bridge": f"--link cfg-db:db -P --expose 7000 -it --privileged {IMAGE} sleep 600",
    "mac": f"--mac-address 00:16:3e:01:02:03 --uts host {IMAGE} sleep 600",
    "host": f"--network host --restart always {IMAGE} sleep 600",
    "none": f"--network none --no-healthcheck {IMAGE} sleep 600",
}


def first(docker: Docker, case: str) -> None:
    """Make a container as a user does, and start it."""
    if case == "networks":
        docker("network", "create", "--subnet", "172.30.1.0/24", "cfg-front")
        docker("network", "create", "--subnet", "172.30.2.0/24", "cfg-back")
        docker.hosts.sh("a", "mkdir -p /var/tmp/cfg-bind")
    if case == "bridge":
        docker("run", "-d", "--name", "cfg-db", IMAGE, "sleep", "600")
    docker("create", "--name", "cfg-one", *shlex.split(CASES[case]))
    if case == "networks":
        driver = ("--alias", "api", "--driver-opt", "com.example=1")
        docker("network", "connect", "--ip", "172.30.2.40", *driver, "cfg-back", "cfg-one")
    docker("start", "cfg-one")


# Its limits need controllers; the rest of them is another way through the same.
MARKS = {"networks": [pytest.mark.needs("controllers"), pytest.mark.thorough], "bridge": []}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=MARKS.get(case, [pytest.mark.thorough])) for case in CASES],
)
def test_the_second_container_is_configured_as_the_first(docker: Docker, case: str) -> None:
    first(docker, case)
    before = docker.inspect("cfg-one")
    assert before["State"]["Status"] == "running"
    # Its name, ports and addresses are free, as at another host.
    docker("stop", "-t", "0", "cfg-one")
    docker("rename", "cfg-one", "cfg-before")
    plan = create_body(before, api_version=(1, 45), image=IMAGE)
    docker.make(plan)
    made = docker.inspect("cfg-one")
    assert made["HostConfig"]["RestartPolicy"]["Name"] == "no"
    assert "org.criu.config" not in (made["HostConfig"].get("Annotations") or {})
    docker("start", "cfg-one")
    docker.restore_policy(plan)
    after = docker.inspect("cfg-one")
    assert after["State"]["Status"] == "running"
    assert differences(before, after) == []
    same_in_every_key(before, after)
    same_addresses(before, after)
    if case == "networks":
        # The comparison sees what is not the same.
        docker("update", "--memory", "100m", "--memory-swap", "200m", "cfg-one")
        changed = differences(before, docker.inspect("cfg-one"))
        assert [line.split(":")[0] for line in changed] == [
            "HostConfig.Memory",
            "HostConfig.MemorySwap",
        ]


def same_in_every_key(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Hold docker's own words against one another, without the comparison under test."""
    for part in ("Config", "HostConfig"):
        for key in before[part].keys() | after[part].keys():
            one, other = before[part].get(key), after[part].get(key)
            if key == "Annotations":
                one = {name: value for name, value in one.items() if name != "org.criu.config"}
            if key == "Hostname" and before["HostConfig"]["UTSMode"] == "host":
                continue  # neither has one: docker makes it up
            assert (one or None) == (other or None), key
    keys = ("Type", "Destination", "Driver", "Mode", "RW", "Propagation")
    mounts = [
        sorted([mount.get(key) for key in keys] for mount in inspect["Mounts"])
        for inspect in (before, after)
    ]
    assert mounts[0] == mounts[1]


def same_addresses(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name, one in before["NetworkSettings"]["Networks"].items():
        other = after["NetworkSettings"]["Networks"][name]
        assert (one["IPAMConfig"] or None) == (other["IPAMConfig"] or None)
        if one["IPAMConfig"]:
            assert other["IPAddress"] == one["IPAddress"]
    assert after["Config"].get("MacAddress") == before["Config"].get("MacAddress")


@pytest.mark.thorough
def test_an_older_api_takes_one_network_at_a_time(docker: Docker) -> None:
    first(docker, "networks")
    before = docker.inspect("cfg-one", "1.43")
    docker("stop", "-t", "0", "cfg-one")
    docker("rename", "cfg-one", "cfg-before")
    plan = create_body(before, api_version=(1, 43), image=IMAGE)
    assert [network for network, _ in plan.connect] == ["cfg-back"]
    docker.make(plan, "1.43")
    docker("start", "cfg-one")
    docker.restore_policy(plan)
    after = docker.inspect("cfg-one", "1.43")
    assert differences(before, after) == []
    same_addresses(before, after)
    old = before["Id"][:12]
    for endpoint in after["NetworkSettings"]["Networks"].values():
        assert old not in endpoint["DNSNames"]


def test_an_address_is_pinned_that_docker_had_chosen(docker: Docker) -> None:
    docker("network", "create", "--subnet", "172.30.1.0/24", "cfg-front")
    docker("create", "--name", "cfg-first", "--network", "cfg-front", IMAGE, "sleep", "600")
    docker("create", "--name", "cfg-one", "--network", "cfg-front", IMAGE, "sleep", "600")
    docker("start", "cfg-first", "cfg-one")
    before = docker.inspect("cfg-one")
    address = before["NetworkSettings"]["Networks"]["cfg-front"]["IPAddress"]
    docker("stop", "-t", "0", "cfg-first", "cfg-one")
    docker("rename", "cfg-one", "cfg-before")
    pinned = {"cfg-front": address}
    plan = create_body(before, api_version=(1, 45), image=IMAGE, addresses=pinned)
    docker.make(plan)
    docker("start", "cfg-one")
    after = docker.inspect("cfg-one")
    assert after["NetworkSettings"]["Networks"]["cfg-front"]["IPAddress"] == address
    assert differences(before, after, addresses=pinned) == []
    said = [line.split(":")[0] for line in differences(before, after)]
    assert said == ["Networks.cfg-front.IPAMConfig"]


@pytest.mark.needs("docker-networks")
@pytest.mark.thorough
def test_nothing_is_found_against_the_laboratory_s_docker(docker: Docker) -> None:
    version = docker.api("GET", "/version")
    found = daemon_findings(
        version["Version"],
        version["ApiVersion"],
        docker.api("GET", "/info"),
        private_netns=True,
        destination=True,
    )
    assert [finding for finding in found if finding.level != OK] == []
    assert parse_api_version(version["ApiVersion"]) >= (1, 45)
    docker("run", "-d", "--name", "cfg-one", IMAGE, "sleep", "600")
    found = findings(docker.inspect("cfg-one"))
    assert [finding for finding in found if finding.level != OK] == []
    docker("pause", "cfg-one")
    found = findings(docker.inspect("cfg-one"))
    assert [finding.check for finding in found if finding.level != OK] == ["docker-state"]
    docker("unpause", "cfg-one")
