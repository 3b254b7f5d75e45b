"""What a crowd at a service costs another client: `make bench-service`.

One run, one service in a process of its own (tls://, the fake engine, a stand-in for CRIU). A
client moves victims alone; then beside SILENT connections that say nothing, OPEN migrations of
another host that are open with their memory channels, and one Open that takes as long as all of it;
then alone once more. The ratio of the medians is what counts: above LIMIT the exit code is 1.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import logging
import os
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc

from phaul_runtime.agent.service import Service
from phaul_runtime.config.model import AgentConfig, Config
from phaul_runtime.criu.session import Criu
from phaul_runtime.engine import DestinationHalf, Handover, SourceHalf
from phaul_runtime.hooks.lifecycle import Hooks
from phaul_runtime.library.api import Outcome, PhaulConfig
from phaul_runtime.preflight.wiring import Wiring
from phaul_runtime.rpc import phaul_pb2 as pb
from phaul_runtime.rpc import phaul_pb2_grpc
from phaul_runtime.rpc.protocol import PROTOCOL, VERSION_KEY
from phaul_runtime.source.migration import Migration
from phaul_runtime.system.cancel import Cancellation
from phaul_runtime.testing import FakeCase, FakeEngine
from phaul_runtime.testing.fake import FakeDestination, FakeLocal, FakeSource
from phaul_runtime.transport import Channel, Destination, load_transport
from phaul_runtime.transport.certs import Host, add_hosts
from tests.environment import know_pycriu
from tests.integration import fakecriu
from tests.integration.fleet import Fleet

_ROOT = Path(__file__).parents[2]
SILENT, OPEN, LIMIT = 1000, 500, 2.0
# The crowd opens and connects in so many threads.
_HANDS = 16
_BEAT_S, _LOST_S = 10.0, 3600.0
_SLOW = "slow"
_FILES = {"ca": "ca.pem", "cert": "host.pem", "key": "host.key"}
_VERSION = ((VERSION_KEY, str(PROTOCOL)),)


class Local(FakeLocal):
    """Dumps memory as well, as an engine with CRIU would."""

    def dump_copy_restore(
        self, criu: Criu, config: PhaulConfig, last_client_images_dir: str | None
    ) -> Outcome:
        with socket.socket(fileno=os.dup(config.memfd)) as channel:
            fakecriu.send_round(channel, fakecriu.round_of(1000))
        return super().dump_copy_restore(criu, config, last_client_images_dir)


class Here(FakeSource):
    def local(self, handover: Handover, cancellation: Cancellation) -> Local:
        return Local(self, handover)


class There(FakeDestination):
    """Its copies live beside the originals; one that is called slow takes its time to prepare."""

    def check(self, manifest: Mapping[str, Any]) -> Any:
        return []

    def prepare(self, manifest: Mapping[str, Any], migration_id: str) -> None:
        if Path(manifest["path"]).name == _SLOW:
            time.sleep(600)
        super().prepare({"path": f"{manifest['path']}-there"}, migration_id)


class Engine(FakeEngine):
    def source(self, target: str, options: Any, *, criu_log_level: int) -> SourceHalf:
        return Here(target)

    def destination(self, options: Any, *, criu_log_level: int, hold_s: float) -> DestinationHalf:
        return There(hold_s)


WIRING = Wiring(engine=lambda _: Engine())


def serve(root: Path) -> None:
    """The service's process, until its standard input ends; it prints its address."""
    place = root / "fleet" / "there"
    files = {name: str(place / file) for name, file in _FILES.items()}
    config = AgentConfig.model_validate({"listen": "tls://127.0.0.1:0", **files})
    criu = Criu(str(root / "criu"))
    logging.disable(logging.WARNING)
    service = Service(
        config, root / "work there", root / "state there", criu, Hooks(), wiring=WIRING
    )
    sys.stdout.write(f"{service.start()}\n")
    sys.stdout.flush()
    sys.stdin.read()
    # The slow one is still at it: nothing of this is worth a wait.
    os._exit(0)


class Mover:
    """The client that counts."""

    def __init__(self, root: Path, url: str, fleet: Fleet) -> None:
        self._root, self._url, self._fleet = root, url, fleet
        self._case = FakeCase(root / "v", Engine())

    def move(self) -> float:
        """Move a new victim; returns seconds."""
        config = Config.model_validate(
            {
                "engine": "fake",
                "workdir": str(self._root / "here"),
                "state_dir": str(self._root / "state here"),
                "log_dir": str(self._root / "log"),
                "criu": {"binary": str(self._root / "criu")},
                "policy": {"max_iterations": 3, "max_downtime_ms": 1},
                "checks": {"ignore": ["workdir", "state", "space"]},
                "transport": {**self._fleet.files("here"), "to": self._url},
            }
        )
        victim = self._case.start()
        begun = time.monotonic()
        report = Migration(config, victim, lambda _: None, wiring=WIRING).run()
        seconds = time.monotonic() - begun
        assert report.result == "moved"
        # It verifies its memory all the time, which the next move would have to pay for.
        assert report.restored_pid
        os.kill(report.restored_pid, signal.SIGKILL)
        return seconds

    def close(self) -> None:
        self._case.clear()


class Crowd:
    """Another host of the fleet, and many who are of none."""

    def __init__(self, root: Path, url: str, fleet: Fleet) -> None:
        self._stack = contextlib.ExitStack()
        destination = Destination.parse(url)
        self._address = ("127.0.0.1", destination.port)
        config = Config.model_validate(
            {"workdir": str(root / "crowd"), "transport": fleet.files("c")}
        )
        (root / "crowd").mkdir(exist_ok=True)
        self._channel: Channel = load_transport(destination).open(
            destination, config, Cancellation(), "cc" * 8
        )
        self._stack.callback(self._channel.close)
        way = grpc.insecure_channel(
            self._channel.control_target(), options=[("grpc.default_authority", "x")]
        )
        self._stack.callback(way.close)
        self._stub = phaul_pb2_grpc.AgentStub(way)
        self._ids = [f"{number:016x}" for number in range(OPEN)]
        self._gone, self._all_there = threading.Event(), threading.Event()
        self._root = root

    def come(self) -> None:
        with concurrent.futures.ThreadPoolExecutor(_HANDS) as hands:
            list(hands.map(self._open, self._ids))
        threading.Thread(target=self._beat, daemon=True).start()
        self._silence = threading.Thread(target=self._be_silent, daemon=True)
        self._silence.start()
        self._all_there.wait()
        request = self._request("f" * 16, _SLOW)
        self._stack.callback(self._stub.Open.future(request, 600, _VERSION).cancel)

    def _request(self, migration_id: str, name: str) -> pb.OpenRequest:
        manifest = f'{{"path": "{self._root}/crowd/{name}"}}'.encode()
        return pb.OpenRequest(
            id=migration_id, engine="fake", target=name, source="c", manifest=manifest,
            lost_s=_LOST_S, commit_s=60, restore="full", page_format=1,
        )  # fmt: skip

    def _open(self, migration_id: str) -> None:
        reply = self._stub.Open(self._request(migration_id, migration_id), 600, _VERSION)
        assert not reply.HasField("error"), reply.error
        self._stack.enter_context(self._channel.open_memory(migration_id))

    def _be_silent(self) -> None:
        """So many connections at any moment; those that the service closes come again."""
        poll = select.poll()
        here: dict[int, socket.socket] = {}
        while not self._gone.is_set():
            while len(here) < SILENT:
                channel = socket.create_connection(self._address, 60)
                here[channel.fileno()] = channel
                poll.register(channel, select.POLLIN)
            self._all_there.set()
            for fd, _ in poll.poll(500):
                poll.unregister(fd)
                here.pop(fd).close()
        for channel in here.values():
            channel.close()

    def _beat(self) -> None:
        while not self._gone.wait(_BEAT_S):
            for each in self._ids:
                with contextlib.suppress(grpc.RpcError, ValueError):
                    self._stub.Beat(pb.MigrationRef(id=each), 60, _VERSION)

    def go(self) -> None:
        self._gone.set()
        self._silence.join()
        with concurrent.futures.ThreadPoolExecutor(_HANDS) as hands:
            list(hands.map(self._abort, self._ids))
        self._stack.close()

    def _abort(self, migration_id: str) -> None:
        self._stub.Abort(pb.MigrationRef(id=migration_id), 600, _VERSION)


@contextlib.contextmanager
def a_service(root: Path) -> Iterator[tuple[str, int]]:
    """Its address, and its pid."""
    program = f'exec {sys.executable} -I {fakecriu.__file__} "$@" 2>/dev/null'
    (root / "criu").write_text(f"#!/bin/sh\n{program}\n")
    (root / "criu").chmod(0o755)
    know_pycriu()
    argv = [sys.executable, "-P", "-m", "tests.bench.service", "--serve", str(root)]
    path = f"{_ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path},
    ) as it:  # fmt: skip
        assert it.stdout is not None
        assert it.stdin is not None
        try:
            yield it.stdout.readline().strip(), it.pid
        finally:
            it.stdin.close()


def _status(pid: int) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    memory = int(found["VmRSS"].split()[0]) >> 10
    return f"{memory} MiB, {found['Threads'].strip()} threads, {descriptors} descriptors"


def _told(what: str, seconds: list[float]) -> None:
    each = " ".join(f"{one:.2f}" for one in seconds)
    sys.stdout.write(f"{what}: median {statistics.median(seconds):.2f} s ({each})\n")
    sys.stdout.flush()


def measure(moves: int) -> int:
    """All of it; the exit code."""
    with tempfile.TemporaryDirectory(prefix="phaul-") as name:
        root = Path(name)
        os.environ["FAKECRIU_NOTES"] = str(root / "notes")
        fleet = Fleet(root / "fleet")
        add_hosts(fleet.root, [Host.parse("c,127.0.0.1")], days=9)
        with a_service(root) as (url, pid), contextlib.closing(Mover(root, url, fleet)) as mover:
            mover.move()
            alone = [mover.move() for _ in range(moves)]
            _told("alone", alone)
            crowd = Crowd(root, url, fleet)
            crowd.come()
            sys.stdout.write(f"the service with all of them: {_status(pid)}\n")
            beside = [mover.move() for _ in range(moves)]
            _told(f"beside {SILENT} silent connections, {OPEN} open and a slow one", beside)
            crowd.go()
            again = [mover.move() for _ in range(moves)]
            _told("alone again", again)
    ratio = statistics.median(beside) / statistics.median(alone + again)
    sys.stdout.write(f"ratio {ratio:.2f}, at most {LIMIT:g} allowed\n")
    return int(ratio > LIMIT)


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.bench.service", description=__doc__)
    parser.add_argument("--moves", type=int, default=5, help="in each of the three parts")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve is not None:
        serve(given.serve)
    return measure(given.moves)


if __name__ == "__main__":
    sys.exit(main())
