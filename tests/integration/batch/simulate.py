"""A batch on simulated hosts: a controller in this process, moves that only take their time.

    python simulate.py --store DIR --ledger DIR --moves N [...]

The ledger stands for the hosts' journals: a file for each attempt that has ended, written before
the controller hears of it. One that was interrupted has none, and is begun anew under its id.
`kill -9` it at any time and run it again with the same arguments. The last line says how long it
took, how long it would have taken at least within its limits, and what memory it needed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from phaul_runtime.batch.events import MoveEnded
from phaul_runtime.batch.model import Batch, Move
from phaul_runtime.batch.outcome import Answer
from phaul_runtime.batch.run import Controller, Pace
from phaul_runtime.batch.store import Store
from phaul_runtime.events import Event
from phaul_runtime.system.cancel import Cancellation

ID = "simulated"


def simulated(moves: int, hosts: int, limits: dict[str, int], retries: int, seed: int) -> Batch:
    draw = random.Random(seed)
    listed = []
    for number in range(moves):
        source = draw.randrange(hosts)
        to = (source + draw.randrange(1, hosts)) % hosts
        listed.append(
            {
                "name": f"m{number}", "engine": ("process", "runc", "docker")[number % 3],
                "target": f"t{number}", "from": f"ssh://h{source}", "to": f"ssh://h{to}",
            }
        )  # fmt: skip
    return Batch.from_json(
        {"moves": listed, "limits": limits, "retries": retries, "retry_pause_s": 0.0}
    )


class Hosts:
    """All of them."""

    def __init__(self, ledger: Path, seconds: float, failing: float) -> None:
        ledger.mkdir(exist_ok=True)
        self._ledger = ledger
        self._seconds = seconds
        self._failing = failing
        self._lock = threading.Lock()
        self._running: dict[str, Counter[str]] = {"from": Counter(), "to": Counter()}
        self.most = {"total": 0, "from": 0, "to": 0}
        self.work: dict[str, dict[str, float]] = {"from": {}, "to": {}}

    def ask(self, move: Move, migration_id: str, _: Cancellation, timeout_s: float) -> Answer:
        del timeout_s
        path = self._ledger / migration_id
        if path.exists():
            return _answer(json.loads(path.read_text()))
        draw = random.Random(migration_id)
        seconds = self._seconds * draw.uniform(0.5, 1.5)
        self._count(move, 1)
        time.sleep(seconds)
        self._count(move, -1, seconds)
        told = {"name": move.name, "moved": draw.random() >= self._failing}
        # Whole or not at all, and never twice.
        new = path.with_suffix(".new")
        new.write_text(json.dumps(told))
        os.link(new, path)
        new.unlink()
        return _answer(told)

    def _count(self, move: Move, by: int, seconds: float = 0.0) -> None:
        with self._lock:
            for key, host in (("from", move.source_host), ("to", move.destination_host)):
                self._running[key][host] += by
                self.most[key] = max(self.most[key], self._running[key][host])
                self.work[key][host] = self.work[key].get(host, 0.0) + seconds
            total = sum(self._running["from"].values())
            self.most["total"] = max(self.most["total"], total)

    def at_least(self, batch: Batch) -> float:
        """Seconds that no schedule within the limits can do without, for what was done here."""
        limits, sources, destinations = batch.limits, self.work["from"], self.work["to"]
        return max(
            sum(sources.values()) / limits.total,
            max(sources.values(), default=0.0) / limits.per_source,
            max(destinations.values(), default=0.0) / limits.per_destination,
        )


def _answer(told: dict[str, Any]) -> Answer:
    if told["moved"]:
        return Answer(0, {"result": "moved", "downtime_ms": 1.0})
    return Answer(4, {"result": "failed", "error": "drawn to fail", "error_kind": "CriuError"})


def resident_mib() -> float:
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", required=True)
    parser.add_argument("--ledger", type=Path, required=True)
    parser.add_argument("--moves", type=int, default=1000)
    parser.add_argument("--hosts", type=int, default=10)
    parser.add_argument("--total", type=int, default=20)
    parser.add_argument("--per-host", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a move, plus or minus half")
    parser.add_argument("--failing", type=float, default=0.1, help="share of attempts")
    parser.add_argument("--retries", type=int, default=9)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    limits = {
        "total": given.total,
        "per_source": given.per_host,
        "per_destination": given.per_host,
    }
    batch = simulated(given.moves, given.hosts, limits, given.retries, given.seed)
    hosts = Hosts(given.ledger, given.seconds, given.failing)
    store = Store.parse(given.store, Path("/nonexistent"))
    memory: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, MoveEnded):
            memory.append(resident_mib())
            # Several threads tell: a line is written as a whole.
            sys.stdout.write(json.dumps(event.to_json()) + "\n")
            sys.stdout.flush()

    controller = Controller(store, ID, hosts.ask, listen, pace=Pace())
    began, cpu = time.monotonic(), time.process_time()
    ended = controller.resume() if ID in store.batches() else controller.run(batch)
    took, least = time.monotonic() - began, hosts.at_least(batch)
    quarter = len(memory) // 4
    told = {
        "states": ended.states,
        "took_s": round(took, 2),
        "at_least_s": round(least, 2),
        "ratio": round(took / least, 3) if least else None,
        "cpu_s": round(time.process_time() - cpu, 1),
        "mib": [round(memory[at], 1) for at in (quarter, 2 * quarter, 3 * quarter, -1)],
        "most": hosts.most,
    }
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
