"""Real moves to an agent that is a service: tls:// and tcp://, compressed, across its restarts."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from phaul_runtime.transport.certs import Host, make_fleet
from tests.e2e.conftest import Hosts, wait_until

COPY = ("--files", "copy")
CONFIG = "/var/tmp/transport.yaml"
START = """
setsid sh -c 'echo $$ >/var/tmp/agent.pid; exec phaul-runtime agent --config /var/tmp/agent.yaml' \
    >/var/tmp/agent.log 2>&1 </dev/null &
"""
FILES = ("ca.pem", "host.pem", "host.key")
WHERE = "/var/tmp/tls"


class Agents:
    """The agent of host b, as its unit would start and end it; certificates on both hosts."""

    def __init__(self, hosts: Hosts, root: Path) -> None:
        self.hosts = hosts
        self.root = root
        for place in make_fleet(root / "fleet", [Host.parse("a"), Host.parse("b,10.77.0.2")]):
            hosts.sh(place.name, "mkdir -p -m 700 $1", WHERE)
            for file in FILES:
                hosts.lab.push(place.name, place / file, f"{WHERE}/{file}")

    def _tls(self) -> dict[str, str]:
        ca, cert, key = (f"{WHERE}/{file}" for file in FILES)
        return {"ca": ca, "cert": cert, "key": key}

    def put(self, host: str, target: str, settings: object) -> None:
        file = self.root / "settings.yaml"
        file.write_text(json.dumps(settings))
        self.hosts.lab.push(host, file, target)

    def start(self, scheme: str) -> str:
        settings = {"listen": f"{scheme}://0.0.0.0:7007", "insecure": scheme == "tcp"}
        self.put("b", "/var/tmp/agent.yaml", {"agent": {**settings, **self._tls()}})
        self.hosts.sh("b", f"rm -f /var/tmp/agent.log; {START}")
        ready = "grep ' agent ready ' /var/tmp/agent.log"
        wait_until("the agent listens", lambda: self.hosts.sh("b", ready, check=False) != "")
        return f"{scheme}://b"

    def end(self, signal: str = "TERM") -> None:
        pid = self.hosts.sh("b", "cat /var/tmp/agent.pid; rm -f /var/tmp/agent.pid", check=False)
        if pid:
            self.hosts.sh("b", "kill -$1 $2", signal, pid, check=False)
            wait_until("the agent has ended", lambda: not self.hosts.alive("b", int(pid)))

    def client(self, **transport: object) -> tuple[str, ...]:
        self.put("a", CONFIG, {"transport": {**self._tls(), **transport}})
        return ("--config", CONFIG)


@pytest.fixture
def agents(hosts: Hosts, tmp_path: Path) -> Iterator[Agents]:
    found = Agents(hosts, tmp_path)
    yield found
    found.end()
    hosts.sh("b", "rm -rf /run/phaul/agent-*")
    for host in ("a", "b"):
        assert hosts.leftovers(host) == ""


@pytest.mark.parametrize(
    ("scheme", "transport"),
    [
        ("tls", {}),
        ("tcp", {"insecure": True}),
        ("tls", {"compression": "zstd", "bandwidth_limit": "20MiB", "proxy_buffer": "32MiB"}),
    ],
    ids=["tls", "tcp", "tls-zstd"],
)
def test_a_process_moves(
    hosts: Hosts, agents: Agents, scheme: str, transport: dict[str, object]
) -> None:
    to = agents.start(scheme)
    victim = hosts.dirtier("a", "service", "--mib", "32", "--hot-mib", "2", "--writes", "200")
    moved = hosts.migrate("a", victim.pid, to, *COPY, *agents.client(**transport))
    assert moved.code == 0, moved.stderr
    assert not hosts.alive("a", victim.pid)
    assert victim.verified_on("b")["wrong"] == 0
    if "compression" in transport:
        assert 0 < moved.report["link_bytes"] < moved.report["bytes_transferred"]
    # The agent goes, what it has restored stays.
    agents.end()
    assert victim.verified_on("b")["wrong"] == 0


def test_ssh_is_compressed_too(hosts: Hosts, agents: Agents) -> None:
    victim = hosts.dirtier("a", "packed", "--mib", "16")
    flags = agents.client(compression="zstd")
    moved = hosts.migrate("a", victim.pid, "ssh://root@b", *COPY, *flags)
    assert moved.code == 0, moved.stderr
    assert moved.report["link_bytes"] > 0
    assert victim.verified_on("b")["wrong"] == 0


def test_a_killed_agent_leaves_pager_and_copy_to_each_other(hosts: Hosts, agents: Agents) -> None:
    to = agents.start("tls")
    victim = hosts.dirtier("a", "orphan", "--mib", "96", "--hot-mib", "2", "--writes", "200")
    argv = ["phaul-runtime", "migrate", str(victim.pid), "--to", to, "--output", "json"]
    argv += [*COPY, *agents.client(), "--restore", "lazy"]
    with subprocess.Popen(
        hosts.lab.exec_argv("a", argv), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line).get("event") == "committed":
                agents.end("KILL")
                break
        process.stdout.read()
    assert not hosts.alive("a", victim.pid)
    assert victim.verified_on("b")["wrong"] == 0
    wait_until(
        "the pager is done",
        lambda: not hosts.sh("b", "pgrep -f '[p]haul_runtime.pager'", check=False),
    )
    agents.start("tls")
    assert victim.verified_on("b")["wrong"] == 0


def test_a_host_without_a_certificate_gets_nothing(hosts: Hosts, agents: Agents) -> None:
    to = agents.start("tls")
    victim = hosts.dirtier("a", "stranger", "--mib", "4")
    make_fleet(agents.root / "others", [Host.parse("a")])
    for file in ("host.pem", "host.key"):
        hosts.lab.push("a", agents.root / "others/a" / file, f"{WHERE}/{file}")
    moved = hosts.migrate("a", victim.pid, to, *COPY, *agents.client())
    assert moved.code == 3
    assert "does not know the CA of this host's certificate" in moved.stderr
    assert victim.verified_on("a")["wrong"] == 0
