"""A client of redis in a network of its own, which writes over one connection."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.e2e.conftest import Hosts, wait_until

ADDRESS = "10.77.8.2"
CLIENTS = "10.77.8.0/24"
PROGRAM = Path(__file__).parent / "programs/sequence_client.py"
STATUS = "/var/tmp/sequence.status"
# A third namespace, on host a, with an address that b reaches through a.
_MAKE = f"""
set -e
ip netns add client
ip link add veth-c type veth peer name eth0 netns client
ip addr add 10.77.8.1/24 dev veth-c
ip link set veth-c up
ip -n client link set eth0 up
ip -n client addr add {ADDRESS}/24 dev eth0
ip -n client route add default via 10.77.8.1
"""
_CLEAR = f"""
ip netns pids client 2>/dev/null | xargs -r kill -9; ip netns del client; ip link del veth-c
ip route del {CLIENTS}
rm -f {STATUS}
"""


@dataclass
class Outside:
    """The network of the client, and the client."""

    hosts: Hosts

    def make(self) -> None:
        """The network; what an earlier test left of it goes."""
        self.clear()
        self.hosts.sh("a", _MAKE)
        self.hosts.sh("b", f"ip route add {CLIENTS} via 10.77.0.1")

    def clear(self) -> None:
        """End and remove everything."""
        for host in ("a", "b"):
            self.hosts.sh(host, _CLEAR, check=False)

    def start(self, address: str) -> None:
        """Start the client; returns once it writes."""
        self.hosts.lab.push("a", PROGRAM, "/var/tmp/sequence_client.py")
        self.hosts.sh(
            "a",
            f"rm -f {STATUS}; nsenter --net=/run/netns/client setsid python3 "
            f"/var/tmp/sequence_client.py {address} {STATUS} </dev/null >/dev/null 2>&1 &",
        )
        self.wait_writes(20)

    def status(self) -> dict[str, Any]:
        """What it says of itself."""
        text = self.hosts.sh("a", f"cat {STATUS}", check=False)
        found: dict[str, Any] = json.loads(text or '{"acknowledged": 0, "ended": ""}')
        return found

    def wait_writes(self, more: int) -> dict[str, Any]:
        """Wait until so many more writes were acknowledged; over the same connection."""
        number = self.status()["acknowledged"] + more
        wait_until("the client writes on", lambda: self._got(number))
        status = self.status()
        assert status["ended"] == ""
        return status

    def _got(self, number: int) -> bool:
        """It has got so far, or has ended."""
        status = self.status()
        return bool(status["acknowledged"] > number or status["ended"])

    def stop(self) -> dict[str, Any]:
        """End it; what it says then is exact."""
        self.hosts.sh("a", "ip netns pids client | xargs kill")
        wait_until("the client ends", lambda: bool(self.status()["ended"]))
        status = self.status()
        assert status["ended"] == "stopped"
        return status
