"""A container with an address of its own takes its connections along."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.e2e.conftest import Hosts, wait_until
from tests.e2e.containers import Containers, containers
from tests.e2e.outside import Outside

__all__ = ["containers"]

ADDRESS = "10.77.9.50"
# The same namespace and address on both hosts; the route to it only where the container runs, which
# is also the host that answers for it (proxy ARP). Docker, if a test has started it, lets nothing
# be forwarded but its own.
NAMESPACE = f"""
set -e
ip netns add app
ip link add veth-app type veth peer name eth0 netns app
ip addr add 169.254.1.1/32 dev veth-app
ip link set veth-app up
ip -n app link set lo up
ip -n app link set eth0 up
ip -n app addr add {ADDRESS}/32 dev eth0
ip -n app route add 169.254.1.1 dev eth0
ip -n app route add default via 169.254.1.1
ip route add 10.77.9.0/24 dev eth1
sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.eth1.proxy_arp=1 net.ipv4.neigh.eth1.proxy_delay=0
iptables -I FORWARD -d {ADDRESS} -j ACCEPT
iptables -I FORWARD -s {ADDRESS} -j ACCEPT
"""
HOOK = f"[[phaul-move-address, {ADDRESS}, veth-app, eth1]]"
CONFIG = f"""
hooks:
  post_restore: {HOOK}
  committed: {HOOK}
  on_rollback: {HOOK}
"""
CLEAR = f"""
ip netns pids app 2>/dev/null | xargs -r kill -9; ip netns del app
ip link del veth-app; ip route del 10.77.9.0/24
iptables -D FORWARD -d {ADDRESS} -j ACCEPT; iptables -D FORWARD -s {ADDRESS} -j ACCEPT
sysctl -qw net.ipv4.conf.eth1.proxy_arp=0
rm -f /etc/phaul-runtime/config.yaml
"""


@pytest.fixture
def network(hosts: Hosts, containers: Containers) -> Iterator[Containers]:
    """Both hosts prepared, the address on a."""
    for host in ("a", "b"):
        hosts.sh(host, CLEAR, check=False)
        hosts.sh(host, NAMESPACE)
        hosts.sh(
            host, 'mkdir -p /etc/phaul-runtime; printf "%s" "$1" > $2', CONFIG,
            "/etc/phaul-runtime/config.yaml",
        )  # fmt: skip
    Outside(hosts).make()
    hosts.sh("a", f"ip route add {ADDRESS}/32 dev veth-app")
    yield containers
    containers.clear()
    with contextlib.suppress(Exception):
        Outside(hosts).clear()
    for host in ("a", "b"):
        with contextlib.suppress(Exception):
            hosts.sh(host, CLEAR, check=False)


def cli(hosts: Hosts, host: str, *argv: str) -> str:
    enter = ["nsenter", "--net=/run/netns/app", "redis-cli", "-h", ADDRESS, *argv]
    return hosts.lab.exec(host, enter, check=False).stdout.strip()


@pytest.mark.timeout(900)
def test_redis_moves_there_and_back_with_its_connection(hosts: Hosts, network: Containers) -> None:
    redis = network.run(
        "a", "redis", "redis-server", "--save", "", "--bind", "0.0.0.0", "--protected-mode", "no",
        "--enable-debug-command", "yes",
        network="/run/netns/app",
    )  # fmt: skip
    wait_until("redis answers", lambda: cli(hosts, "a", "PING") == "PONG")
    assert cli(hosts, "a", "DEBUG", "POPULATE", "60000", "key", "1024") == "OK"
    client = Outside(hosts)
    client.start(ADDRESS)
    # Without the option its connection is a reason to refuse.
    refused = redis.migrate("a", "b")
    assert refused.code == 3
    assert f"{ADDRESS}:6379 > 10.77.8.2:" in refused.stderr
    for source, destination in (("a", "b"), ("b", "a")):
        moved = redis.migrate(source, destination, "--tcp-established")
        assert moved.code == 0, moved.stderr
        assert moved.report["warnings"] == [] or "budget" in moved.report["warnings"][0]
        assert moved.report["iterations"][0]["bytes"] > 60 << 20
        status = client.wait_writes(50)
        print(f"{source} > {destination}: downtime {moved.report['downtime_ms']:.0f} ms, "
              f"longest wait of the client so far {status['worst_ms']} ms")  # fmt: skip
        numbers = cli(hosts, destination, "LRANGE", "seq", "0", "-1").split()
        assert numbers == [str(n) for n in range(1, len(numbers) + 1)]
        assert len(numbers) >= status["acknowledged"]
        assert cli(hosts, destination, "DBSIZE") == "60001"
        for host in ("a", "b"):
            assert hosts.leftovers(host) == ""
            # CRIU's lock is gone, on both hosts.
            rules = hosts.sh(host, "nsenter --net=/run/netns/app iptables-save; iptables-save")
            assert "CRIU" not in rules
            assert "0xc114" not in rules
        assert hosts.sh(source, f"ip route show {ADDRESS}") == ""
        assert "veth-app" in hosts.sh(destination, f"ip route show {ADDRESS}")
