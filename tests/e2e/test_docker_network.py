"""A container of a docker network takes its address and its connections along."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from phaul_engines.docker.arrival import is_ours
from phaul_engines.docker.config import differences
from phaul_lab import Lab

from tests.e2e.conftest import Hosts, wait_until
from tests.e2e.docker_hosts import DockerContainer, DockerHosts, docker_hosts, docker_lab
from tests.e2e.outside import ADDRESS as CLIENT
from tests.e2e.outside import CLIENTS, Outside

__all__ = ["docker_hosts", "docker_lab"]

pytestmark = pytest.mark.needs("docker-networks")

NETWORK, BRIDGE, VOLUME = "phaul-net", "br-phaul", "phaul-redis"
SUBNET, ADDRESS = "10.79.0.0/24", "10.79.0.10"
PEERS = {"a": "10.77.0.2", "b": "10.77.0.1"}
CONFIG = "/etc/phaul-runtime/config.yaml"
VETO = "/etc/phaul-runtime/hooks/post_restore.d/50-veto"
KEYS = 20000
# Some 20 MiB, each value another one; unlike those of DEBUG POPULATE they get into its file.
LOOP = f"""
local function value(i) return string.rep(i .. '.', 180) end
for i = 1, {KEYS} do
    %s
end
return 'all'
"""
FILL = LOOP % "redis.call('SET', 'key:' .. i, value(i))"
INTACT = LOOP % "if redis.call('GET', 'key:' .. i) ~= value(i) then return i end"
CLEAR = f"""
phaul-move-docker-address --clear {ADDRESS} "$1" {CLIENTS}
rm -f {CONFIG} {VETO}
docker network rm {NETWORK}
"""


@pytest.fixture
def network(docker_hosts: DockerHosts) -> Iterator[DockerHosts]:
    """Both hosts prepared as the documentation says, the address on a."""
    create = f"docker network create --subnet {SUBNET} "
    create += f"-o com.docker.network.bridge.name={BRIDGE} {NETWORK}"
    for host, peer in PEERS.items():
        docker_hosts.sh(host, CLEAR, peer, check=False)
        hook = f"[[phaul-move-docker-address, {ADDRESS}, {peer}, {CLIENTS}]]"
        events = ("post_restore", "committed", "on_rollback")
        config = "hooks:\n" + "".join(f"  {event}: {hook}\n" for event in events)
        docker_hosts.sh(host, 'mkdir -p ${2%/*}; printf "%s" "$1" > "$2"', config, CONFIG)
        docker_hosts.sh(host, create)
        where = "--here" if host == "a" else "--away"
        docker_hosts.sh(host, f"phaul-move-docker-address {where} {ADDRESS} {peer} {CLIENTS}")
    docker_hosts.volumes.append(VOLUME)
    outside = Outside(docker_hosts.hosts)
    outside.make()
    yield docker_hosts
    docker_hosts.clear()
    with contextlib.suppress(Exception):
        outside.clear()
    for host, peer in PEERS.items():
        with contextlib.suppress(Exception):
            docker_hosts.sh(host, CLEAR, peer, check=False)


def run_redis(network: DockerHosts) -> DockerContainer:
    """On a, with its data on the volume."""
    redis = network.run(
        "a", "redis", "redis-server", "--dir", "/store", "--save", "", "--appendonly", "yes",
        "--protected-mode", "no", "--loglevel", "verbose",
        flags=f"--network {NETWORK} --ip {ADDRESS} --volume {VOLUME}:/store",
    )  # fmt: skip
    wait_until("redis answers", lambda: cli(redis, "a", "PING") == "PONG")
    return redis


def cli(redis: DockerContainer, host: str, *argv: str) -> str:
    """redis-cli in the container."""
    inside = ["docker", "exec", redis.name, "redis-cli", *argv]
    return redis.docker.hosts.lab.exec(host, inside, check=False).stdout.strip()


def connection(redis: DockerContainer, host: str, port: int) -> str:
    """The number that redis gave the client's connection when it was opened."""
    for line in cli(redis, host, "CLIENT", "LIST").splitlines():
        words = line.split()
        if f"addr={CLIENT}:{port}" in words:
            return words[0]
    raise AssertionError(f"redis has no connection with port {port}")


def rules(network: DockerHosts, host: str) -> list[str]:
    """The hook's, that of POSTROUTING only if it is the first there; CRIU has left none."""
    saved = network.sh(host, "iptables-save").splitlines()
    assert not [line for line in saved if "CRIU" in line or "0xc114" in line]
    first = next(line for line in saved if line.startswith("-A POSTROUTING"))
    return [first, *(line for line in saved if f" {ADDRESS}/32 " in line and line != first)]


RULES = [
    f"-A POSTROUTING -s {ADDRESS}/32 -d {CLIENTS} -j ACCEPT",
    f"-A DOCKER-USER -s {ADDRESS}/32 -j ACCEPT",
    f"-A DOCKER-USER -d {ADDRESS}/32 -j ACCEPT",
]


def assert_address_is_at(network: DockerHosts, host: str) -> None:
    """The other one routes it there; both let it pass, once each."""
    for other, peer in PEERS.items():
        route = network.sh(other, f"ip route show {ADDRESS}").split()
        assert route[:3] == ([] if other == host else [ADDRESS, "via", peer])
        assert rules(network, other) == RULES


def assert_nothing_is_left(network: DockerHosts, redis: DockerContainer, host: str) -> None:
    """Of the move, on both hosts; of the container, on the one that is not `host`."""
    for both in PEERS:
        assert network.hosts.leftovers(both) == ""
        assert network.leftovers(both) == ""
        plugged = network.sh(both, f"ls /sys/class/net/{BRIDGE}/brif").split()
        assert len(plugged) == (1 if both == host else 0)
    # CRIU's lock of the container's namespace went.
    inside = f"nsenter --net=/proc/{redis.pid(host)}/ns/net iptables-save"
    assert "CRIU" not in network.sh(host, inside)


@pytest.mark.timeout(1200)
@pytest.mark.thorough
def test_redis_moves_there_and_back_with_its_connection(network: DockerHosts) -> None:
    """One connection, no write lost; docker can do all with it, and its volume came along."""
    redis = run_redis(network)
    assert cli(redis, "a", "EVAL", FILL, "0") == "all"
    client = Outside(network.hosts)
    client.start(ADDRESS)
    port = client.status()["port"]
    opened = connection(redis, "a", port)
    before = redis.inspect("a")
    # Without the option its connection is a reason to refuse.
    refused = redis.migrate("a", "b")
    assert refused.code == 3
    assert f"{ADDRESS}:6379 > {CLIENT}:{port}" in refused.stderr
    for source, destination in (("a", "b"), ("b", "a")):
        waits = client.status()["long_ms"]
        moved = redis.migrate(source, destination, "--tcp-established")
        assert moved.code == 0, moved.stderr
        status = client.wait_writes(50)
        new = status["long_ms"][len(waits) :]
        print(f"{source} > {destination}: downtime {moved.report['downtime_ms']:.0f} ms, "
              f"the client's waits above a second: {new} ms, "
              f"{moved.report['warnings']}")  # fmt: skip
        assert moved.report["iterations"][0]["bytes"] > 20 << 20
        assert status["port"] == port
        assert connection(redis, destination, port) == opened
        numbers = cli(redis, destination, "LRANGE", "seq", "0", "-1").split()
        assert numbers == [str(n) for n in range(1, len(numbers) + 1)]
        assert len(numbers) >= status["acknowledged"]
        assert cli(redis, destination, "EVAL", INTACT, "0") == "all"
        assert differences(before, redis.inspect(destination), ours=is_ours) == []
        assert redis.status(source) == ""
        listed = network.sh(destination, "docker ps --format '{{.Names}} {{.State}}'").splitlines()
        assert "redis running" in listed
        # What it says from now on is in docker's log.
        assert "Accepted 127.0.0.1" in network.sh(destination, "docker logs redis 2>&1")
        assert_address_is_at(network, destination)
        assert_nothing_is_left(network, redis, destination)
    written = client.stop()["acknowledged"]
    assert cli(redis, "a", "LLEN", "seq") == str(written)
    # Out of its file, which went over and back with the volume.
    network.sh("a", "docker stop redis && docker start redis")
    wait_until("redis answers again", lambda: cli(redis, "a", "PING") == "PONG")
    numbers = cli(redis, "a", "LRANGE", "seq", "0", "-1").split()
    assert numbers == [str(n) for n in range(1, written + 1)]
    assert cli(redis, "a", "EVAL", INTACT, "0") == "all"
    assert redis.inspect("a")["NetworkSettings"]["Networks"][NETWORK]["IPAddress"] == ADDRESS


@pytest.mark.timeout(900)
@pytest.mark.thorough
def test_a_move_that_is_undone_leaves_the_address_and_the_connection(network: DockerHosts) -> None:
    """The hook had taken the address over when the next one refused."""
    redis = run_redis(network)
    client = Outside(network.hosts)
    client.start(ADDRESS)
    port = client.status()["port"]
    opened = connection(redis, "a", port)
    veto = f"ip route show {ADDRESS} > /tmp/route; exit 3"
    network.sh("b", f"mkdir -p {VETO.rpartition('/')[0]}")
    network.sh("b", f"printf '#!/bin/sh\n%s\n' '{veto}' > {VETO}; chmod 755 {VETO}")
    undone = redis.migrate("a", "b", "--tcp-established")
    assert undone.code == 4, undone.stderr
    assert network.sh("b", "cat /tmp/route; rm /tmp/route") == ""
    client.wait_writes(50)
    assert connection(redis, "a", port) == opened
    assert redis.status("b") == ""
    assert_address_is_at(network, "a")
    assert_nothing_is_left(network, redis, "a")
    written = client.stop()["acknowledged"]
    assert cli(redis, "a", "LLEN", "seq") == str(written)


HOOKED = """
set -e
ip netns add hooked
trap 'ip netns del hooked' EXIT
ip -n hooked link add eth1 type veth peer name other
ip -n hooked link set other up
ip -n hooked addr add 10.0.0.1/24 dev eth1
ip -n hooked link set eth1 up
ip netns exec hooked sh -ec '
iptables -N DOCKER-USER
iptables -t nat -A POSTROUTING -s 10.79.0.0/24 -j MASQUERADE
for step; do
    for twice in 1 2; do
        export PHAUL_EVENT=${step%@*} PHAUL_ROLE=${step#*@}
        phaul-move-docker-address 10.79.0.10 10.0.0.2
        echo "$step:" $(ip route show 10.79.0.10) / \
            $(iptables-save | grep -c -- "/32 .*-j ACCEPT") \
            $(iptables -t nat -S POSTROUTING 1 | grep -c 10.0.0.2/32)
    done
done
phaul-move-docker-address --clear 10.79.0.10 10.0.0.2
echo "cleared:" $(ip route show 10.79.0.10) / $(iptables-save | grep -- "-j ACCEPT")
' sh "$@"
"""


@pytest.mark.thorough
def test_the_hook_at_each_event(lab: Lab) -> None:
    """Twice each: the second time changes nothing."""
    route = "10.79.0.10 via 10.0.0.2 dev eth1"
    steps = {
        "post_restore@destination": "",
        "committed@destination": "",
        "committed@source": route,
        "pre_freeze@source": route,
        "on_rollback@source": "",
        "on_rollback@destination": route,
    }
    said = Hosts(lab).sh("a", HOOKED, *steps).splitlines()
    expected = [f"{step}: {at} / 3 1".replace(":  /", ": /") for step, at in steps.items()]
    assert said == [*(line for line in expected for _ in (1, 2)), "cleared: /"]
