"""A network whose address moves with a container, and redis in it from outside."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from tests.e2e.conftest import Hosts
from tests.e2e.outside import Outside

ADDRESS = "10.77.9.50"
# The same namespace and address on both hosts; the route to it only where the container runs, which
# is also the host that answers for it (proxy ARP). Docker, if a test has started it, lets nothing
# be forwarded but its own.
_NAMESPACE = f"""
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
_HOOK = f"[[phaul-move-address, {ADDRESS}, veth-app, eth1]]"
_CONFIG = f"""
hooks:
  post_restore: {_HOOK}
  committed: {_HOOK}
  on_rollback: {_HOOK}
"""
_CLEAR = f"""
ip netns pids app 2>/dev/null | xargs -r kill -9; ip netns del app
ip link del veth-app; ip route del 10.77.9.0/24
iptables -D FORWARD -d {ADDRESS} -j ACCEPT; iptables -D FORWARD -s {ADDRESS} -j ACCEPT
sysctl -qw net.ipv4.conf.eth1.proxy_arp=0
rm -f /etc/phaul-runtime/config.yaml
"""


@dataclass
class AppNetwork:
    """The namespace `app` on both hosts, the address on a, and the network of a client."""

    hosts: Hosts

    def make(self) -> None:
        """Make it; what was left of it goes."""
        for host in ("a", "b"):
            self.hosts.sh(host, _CLEAR, check=False)
            self.hosts.sh(host, _NAMESPACE)
            self.hosts.sh(
                host, 'mkdir -p /etc/phaul-runtime; printf "%s" "$1" > $2', _CONFIG,
                "/etc/phaul-runtime/config.yaml",
            )  # fmt: skip
        Outside(self.hosts).make()
        self.hosts.sh("a", f"ip route add {ADDRESS}/32 dev veth-app")

    def clear(self) -> None:
        """End and remove everything."""
        with contextlib.suppress(Exception):
            Outside(self.hosts).clear()
        for host in ("a", "b"):
            with contextlib.suppress(Exception):
                self.hosts.sh(host, _CLEAR, check=False)

    def cli(self, host: str, *argv: str) -> str:
        """What redis answers, asked from within."""
        enter = ["nsenter", "--net=/run/netns/app", "redis-cli", "-h", ADDRESS, *argv]
        return self.hosts.lab.exec(host, enter, check=False).stdout.strip()
