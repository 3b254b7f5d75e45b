"""A container with an address of its own takes its connections along."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Hosts, wait_until
from tests.e2e.containers import Containers, containers

__all__ = ["containers"]

ADDRESS = "10.77.9.50"
CLIENT = Path(__file__).parent / "programs/sequence_client.py"
STATUS = "/var/tmp/sequence.status"
# The same namespace and address on both hosts; the route to it only where the container runs, which
# is also the host that answers for it (proxy ARP).
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
"""
# A third namespace, on host a, with an address that b reaches through a.
OUTSIDE = """
set -e
ip netns add client
ip link add veth-c type veth peer name eth0 netns client
ip addr add 10.77.8.1/24 dev veth-c
ip link set veth-c up
ip -n client link set eth0 up
ip -n client addr add 10.77.8.2/24 dev eth0
ip -n client route add default via 10.77.8.1
"""
HOOK = f"[[phaul-move-address, {ADDRESS}, veth-app, eth1]]"
CONFIG = f"""
hooks:
  post_restore: {HOOK}
  committed: {HOOK}
  on_rollback: {HOOK}
"""
CLEAR = """
for n in app client; do ip netns pids $n 2>/dev/null | xargs -r kill -9; ip netns del $n; done
ip link del veth-app; ip link del veth-c; ip route del 10.77.9.0/24; ip route del 10.77.8.0/24
sysctl -qw net.ipv4.ip_forward=0 net.ipv4.conf.eth1.proxy_arp=0
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
    hosts.sh("a", OUTSIDE)
    hosts.sh("a", f"ip route add {ADDRESS}/32 dev veth-app")
    hosts.sh("b", "ip route add 10.77.8.0/24 via 10.77.0.1")
    yield containers
    containers.clear()
    for host in ("a", "b"):
        with contextlib.suppress(Exception):
            hosts.sh(host, CLEAR, check=False)


def client_status(hosts: Hosts) -> dict[str, Any]:
    text = hosts.sh("a", f"cat {STATUS}", check=False)
    found: dict[str, Any] = json.loads(text or '{"acknowledged": 0, "ended": ""}')
    return found


def writes_on(hosts: Hosts, number: int) -> bool:
    """It has got so far, or has ended."""
    status = client_status(hosts)
    return bool(status["acknowledged"] > number or status["ended"])


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
    hosts.lab.push("a", CLIENT, "/var/tmp/sequence_client.py")
    hosts.sh(
        "a",
        f"rm -f {STATUS}; nsenter --net=/run/netns/client setsid python3 "
        f"/var/tmp/sequence_client.py {ADDRESS} {STATUS} </dev/null >/dev/null 2>&1 &",
    )
    wait_until("the client writes", lambda: client_status(hosts)["acknowledged"] > 20)
    # Without the option its connection is a reason to refuse.
    refused = redis.migrate("a", "b")
    assert refused.code == 3
    assert f"{ADDRESS}:6379 > 10.77.8.2:" in refused.stderr
    for source, destination in (("a", "b"), ("b", "a")):
        before = client_status(hosts)["acknowledged"]
        moved = redis.migrate(source, destination, "--tcp-established")
        assert moved.code == 0, moved.stderr
        assert moved.report["warnings"] == [] or "budget" in moved.report["warnings"][0]
        assert moved.report["iterations"][0]["bytes"] > 60 << 20
        wait_until("the client writes on", partial(writes_on, hosts, before + 50))
        status = client_status(hosts)
        assert status["ended"] == ""
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
