"""Two hosts with a stagehand each, an observer of the victim, and verdicts."""

from __future__ import annotations

import json
import subprocess
import threading
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Hosts, wait_until
from tests.e2e.faults.victims import Victim, start
from tests.e2e.observer import Observer

PYTHON = "/opt/phaul-runtime/bin/python3"
STAGEHAND = Path(__file__).parent / "stagehand.py"
CONFIG = "/var/tmp/faults.yaml"
LOST_S = 12
# Short waits: a cell with a cut cable lasts as long as its longest.
SETTINGS = f"""
filesystem: {{files: copy}}
policy: {{max_iterations: 3, max_downtime_ms: 1}}
transport: {{connect_timeout_s: 240}}
timeouts: {{heartbeat_s: 1, lost_s: {LOST_S}, call_s: 30, prepare_s: 90, commit_s: 20,
           recover_s: 30}}
"""


class Stagehand:
    """The stagehand of one host."""

    def __init__(self, hosts: Hosts, host: str) -> None:
        hosts.lab.push(host, STAGEHAND, "/var/tmp/stagehand.py")
        hosts.sh(host, 'printf "%s" "$1" > $2', SETTINGS, CONFIG)
        argv = hosts.lab.exec_argv(host, [PYTHON, "/var/tmp/stagehand.py"])
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._lock = threading.Lock()
        assert self._read() == {"ready": True}

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def do(self, order: str, /, **fields: Any) -> dict[str, Any]:
        """Give an order and wait for its answer."""
        assert self._process.stdin is not None
        with self._lock:
            self._process.stdin.write(json.dumps({"do": order, **fields}) + "\n")
            self._process.stdin.flush()
            return self._read()

    def close(self) -> None:
        """It ends with its stdin."""
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait(30)


@dataclass
class Stage:
    """The laboratory set for faults."""

    hosts: Hosts
    a: Stagehand
    b: Stagehand
    rows: list[tuple[str, str, str, str]] = field(default_factory=list)
    number: int = 0

    def victim(self, observer: Observer, engine: str = "process", mib: int = 0) -> Victim:
        """A new victim on host a that the observer hears; `mib` of memory, or little."""
        self.number += 1
        name = f"fault{self.number}"
        victim = start(self.hosts, engine, name, observer, mib)
        wait_until("the observer hears the victim", lambda: len(observer.heard) > 5)
        return victim

    def where(self, victim: Victim) -> list[str]:
        """The hosts on which it exists."""
        return [host for host in ("a", "b") if victim.pids(host)]

    def recover(self, host: str = "a", *ids: str) -> dict[str, Any]:
        """`phaul-runtime recover [ID]` to its end."""
        hand = self.a if host == "a" else self.b
        hand.do("run", argv=["recover", *ids, "--config", CONFIG])
        return hand.do("await", seconds=150)

    def clear(self, victim: Victim) -> None:
        """After a cell, however it ended: nothing that the next one could stumble over."""
        self.a.do("kill", what="cli")
        self.hosts.lab.mend()
        for hand in (self.a, self.b):
            hand.do("unfill", directory="/run/phaul")
            hand.do("unfill", directory="/var/lib")
        for host in ("a", "b"):
            victim.remove(host)
            self.hosts.sh(host, "sleep 0.2; rmdir /sys/fs/cgroup/phaul-runtime/*/", check=False)
            if self.hosts.leftovers(host):
                self.hosts.sh(host, "sleep 15; rm -rf /run/phaul/*", check=False)
            for path in self.unsettled(host):
                self.hosts.sh(host, 'rm "$1"', path)

    def judge(self, victim: Victim, observer: Observer) -> str:
        """Hold the end against what must be true; returns the host on which the copy runs."""
        copies = self.where(victim)
        assert len(copies) == 1, f"copies on {copies}"
        heard = len(observer.heard)
        wait_until("the copy goes on", lambda: len(observer.heard) > heard + 10)
        status = victim.verified_on(copies[0])
        assert status["wrong"] == 0, status
        assert observer.heard[-1][2] == copies[0]
        assert observer.complaints() == []
        for host in ("a", "b"):
            try:
                wait_until("clean", partial(self.clean, victim, host), 2 * LOST_S)
            except pytest.fail.Exception:
                left = self.hosts.leftovers(host) + victim.traces(host)
                pytest.fail(f"left on {host}: {left}")
            assert self.unsettled(host) == []
        victim.judge(copies[0])
        return copies[0]

    def clean(self, victim: Victim, host: str) -> bool:
        """Whether nothing of a move is left there."""
        return self.hosts.leftovers(host) == "" and victim.traces(host) == ""

    def unsettled(self, host: str) -> list[str]:
        """What `history` lists and is neither done nor aborted."""
        out = self.hosts.sh(
            host,
            'grep -L \'"state":"\\(done\\|aborted\\)"\' /var/lib/phaul-runtime/*/*.journal',
            check=False,
        )
        return out.split()
