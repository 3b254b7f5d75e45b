"""One move, seen from outside; and a plain socket between the same hosts."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from tests.bench.methods import Method
from tests.bench.methods.bundle import Bundle
from tests.bench.result import Carried, Run
from tests.bench.workloads import Workload
from tests.e2e.app_network import ADDRESS, AppNetwork
from tests.e2e.conftest import Dirtier, Hosts, wait_until
from tests.e2e.observer import Observer
from tests.e2e.outside import Outside

VERIFY_S = 600
FILL_S = 300
RAW_MIB = 64
_RECEIVE = """
import socket
server = socket.create_server(("10.77.0.2", 7799))
peer = server.accept()[0]
while peer.recv(1 << 18):
    pass
peer.sendall(b"k")
"""
_SEND = """
import socket, sys, time
block = bytes(range(256)) * 1024
for attempt in range(100):
    try:
        peer = socket.create_connection(("10.77.0.2", 7799))
        break
    except OSError:
        time.sleep(0.2)
begun = time.monotonic()
for _ in range(int(sys.argv[1]) * 4):
    peer.sendall(block)
peer.shutdown(socket.SHUT_WR)
assert peer.recv(1) == b"k"
print(int(sys.argv[1]) / (time.monotonic() - begun))
"""


def raw_mib_s(hosts: Hosts) -> float:
    """What one TCP connection carries from a to b."""
    script = 'timeout 300 python3 -I -c "$1" </dev/null >/dev/null 2>&1 &'
    hosts.sh("b", script, _RECEIVE)
    argv = ["python3", "-I", "-c", _SEND, str(RAW_MIB)]
    return float(hosts.lab.exec("a", argv, timeout=300).stdout)


def beside_mib_s(hosts: Hosts) -> float:
    """The same while a victim runs at a: pages are carried beside one, on the same processor."""
    victim = hosts.dirtier("a", "beside", *Workload("idle-64", 64).flags)
    try:
        wait_until("it runs", lambda: hosts.sh("a", f"cat {victim.status_file}", check=False) != "")
        return raw_mib_s(hosts)
    finally:
        hosts.sh("a", f"kill -KILL $1; rm -f {victim.status_file}", str(victim.pid))


def measure(method: Method) -> Run:
    """Start a victim, move it, verify all of it, remove it."""
    if method.workload.redis:
        assert isinstance(method, Bundle)
        return _redis(method)
    return _dirtier(method)


def _dirtier(method: Method) -> Run:
    observer = Observer(method.hosts.lab)
    try:
        method.start(observer.address)
        wait_until("the observer hears it", lambda: len(observer.heard) > 50, FILL_S)
        before = int(method.dirtier("a").status("a")["written"])
        begun, ended, wire, carried = _timed(method)
        host = "a" if method.local else "b"
        if not method.local:
            wait_until("the observer hears it from b", lambda: observer.heard[-1][2] == "b")
        time.sleep(2)
        dirtier = method.dirtier(host)
        after = int(dirtier.status(host)["written"])
        pauses = observer.pause_ms(begun, ended + 2)
        freeze = pauses if method.local else observer.freeze_ms("a", "b")
        verify(dirtier, host)
        # Again once the last page is in, which it is once all have been read.
        wrong = verify(dirtier, host)
        if complaints := observer.complaints():
            raise RuntimeError(f"two copies: {'; '.join(complaints)}")
        return Run(
            freeze_ms=round(freeze, 1),
            pause_ms=0.0 if method.local else round(pauses, 1),
            total_s=round(ended - begun, 2),
            wire_bytes=wire,
            rewritten_pages=after - before,
            wrong=wrong,
            carried=carried,
        )
    finally:
        method.clear()
        observer.close()


def verify(dirtier: Dirtier, host: str) -> int:
    """Read every page of it; how many were wrong since it started."""

    def verified() -> int:
        return int(dirtier.status(host)["verified"])

    target = verified() + int(dirtier.status(host)["pages"])
    dirtier.hosts.sh(host, f"kill -USR2 {dirtier.pid}")
    wait_until("every page is verified", lambda: verified() >= target, VERIFY_S)
    return int(dirtier.status(host)["wrong"])


def _redis(method: Bundle) -> Run:
    hosts, network, client = method.hosts, AppNetwork(method.hosts), Outside(method.hosts)
    try:
        network.make()
        method.start_redis()
        wait_until("redis answers", lambda: network.cli("a", "PING") == "PONG")
        keys = method.workload.mib * 900
        network.cli("a", "DEBUG", "POPULATE", str(keys), "key", "1024")
        client.start(ADDRESS)
        before = client.status()["worst_ms"]
        begun, ended, wire, carried = _timed(method)
        status = client.wait_writes(50)
        stopped = client.stop()
        found = network.cli("b", "LRANGE", "seq", "0", "-1").split()
        wanted = [str(number + 1) for number in range(int(stopped["acknowledged"]))]
        wrong = sum(one != other for one, other in zip(found, wanted, strict=False))
        wrong += abs(len(found) - len(wanted))
        wrong += abs(int(network.cli("b", "DBSIZE")) - keys - 1)
        waits = sorted([*status["long_ms"], before], reverse=True)
        return Run(
            freeze_ms=float(status["worst_ms"]),
            pause_ms=float(waits[1]) if len(waits) > 1 else 0.0,
            total_s=round(ended - begun, 2),
            wire_bytes=wire,
            rewritten_pages=0,
            wrong=wrong,
            carried=carried,
        )
    finally:
        method.clear()
        network.clear()
        hosts.sh("b", "ip netns del app", check=False)


def _timed(method: Method) -> tuple[float, float, int, Carried]:
    """Move it: from when, until when, with how many bytes on the wire."""
    wire = partial(_wire, method.hosts)
    before = wire()
    begun = time.monotonic()
    carried = method.move()
    ended = time.monotonic()
    return begun, ended, wire() - before, carried


def _wire(hosts: Hosts) -> int:
    counters = "cd /sys/class/net/eth1/statistics; cat tx_bytes rx_bytes"
    return sum(int(line) for line in hosts.sh("a", counters).split())


CLEAN = """
pgrep -x 'piggie-dirty|redis-server|criu' | xargs -r kill -9
rm -rf /run/bench-images /run/bench-ssh /var/tmp/bench.status
"""


def clean(hosts: Hosts, say: Callable[[str], None]) -> None:
    """After a failure: both hosts as the next move needs them."""
    for host in ("a", "b"):
        hosts.sh(host, CLEAN, check=False)
        done = hosts.lab.exec(host, ["phaul-runtime", "recover"], check=False, timeout=120)
        if done.returncode:
            say(f"recover on {host} ended with {done.returncode}")
