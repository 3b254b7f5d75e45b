"""A container with an address of its own takes its connections along."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.app_network import ADDRESS, AppNetwork
from tests.e2e.conftest import Hosts, wait_until
from tests.e2e.containers import Containers, containers
from tests.e2e.outside import Outside

__all__ = ["containers"]


@pytest.fixture
def network(hosts: Hosts, containers: Containers) -> Iterator[Containers]:
    """Both hosts prepared, the address on a."""
    app = AppNetwork(hosts)
    app.make()
    yield containers
    containers.clear()
    app.clear()


def cli(hosts: Hosts, host: str, *argv: str) -> str:
    return AppNetwork(hosts).cli(host, *argv)


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
        assert moved.report["bytes_transferred"] > 60 << 20
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
