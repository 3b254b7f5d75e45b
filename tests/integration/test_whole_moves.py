"""Whole moves over loopback: client, transport, agent, fake engine; CRIU is a stand-in."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from phaul_runtime.config.model import AgentConfig, Config, TransportConfig
from phaul_runtime.criu.page_format import PageFormat
from phaul_runtime.criu.session import Criu
from phaul_runtime.engine import DestinationHalf, Finding, Handover, interface
from phaul_runtime.errors import CheckFailed
from phaul_runtime.events import Event
from phaul_runtime.library.api import Outcome, PhaulConfig
from phaul_runtime.memory.pagemap import read_pagemap
from phaul_runtime.source.migration import Migration
from phaul_runtime.system.cancel import Cancellation
from phaul_runtime.testing import FakeCase, FakeEngine, Place
from phaul_runtime.testing.fake import FakeDestination, FakeLocal, FakeSource
from tests.integration import fakecriu
from tests.integration.fleet import Fleet, Tap, tapped
from tests.integration.serving import serving, wait

pytest.importorskip("pycriu")
FINAL = b"".join(fakecriu.content(page) for page in range(10**6, 10**6 + fakecriu.PAGES))


class Local(FakeLocal):
    """Dumps memory as well, as an engine with CRIU would."""

    def dump_copy_restore(
        self, criu: Criu, config: PhaulConfig, last_client_images_dir: str | None
    ) -> Outcome:
        channel = socket.socket(fileno=os.dup(config.memfd))
        with channel:
            fakecriu.send_round(channel, FINAL)
        return super().dump_copy_restore(criu, config, last_client_images_dir)


class Source(FakeSource):
    def local(self, handover: Handover, cancellation: Cancellation) -> Any:
        return Local(self, handover)


class Destination(FakeDestination):
    """Its copy lives in another directory: the hosts are one."""

    case: FakeCase

    def check(self, manifest: Mapping[str, Any]) -> Any:
        return [Finding("name", "ok", "it is free")]

    def prepare(self, manifest: Mapping[str, Any], migration_id: str) -> None:
        super().prepare(self.case.there(manifest), migration_id)

    def restore(self, criu: Criu, images_dir: Path, *, lazy: bool = False) -> int:
        for number in range(1, int(images_dir.name) + 1):
            directory = images_dir.with_name(str(number))
            fakecriu.note("taken", (directory / "pages-1.img").read_bytes())
            if (directory / "page-server-was-here").exists():
                fakecriu.note("by criu", b"")
            else:
                written = read_pagemap(directory / "pagemap-1.img").format
                fakecriu.note(written.name, b"")
        return super().restore(criu, images_dir, lazy=lazy)


class Engine(FakeEngine):
    def __init__(self, case: FakeCase | None = None) -> None:
        self.case = case

    def source(self, target: str, options: Any, *, criu_log_level: int) -> FakeSource:
        return Source(target)

    def destination(self, options: Any, *, criu_log_level: int, hold_s: float) -> DestinationHalf:
        half = Destination(hold_s)
        assert self.case is not None
        half.case = self.case
        return half


class Moves:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.notes = root / "notes"
        self.criu = self.stand_in("criu")
        self.engine = Engine()
        self.case = self.engine.case = FakeCase(root / "v", self.engine)
        self.told: list[Event] = []

    def stand_in(self, name: str, settings: str = "") -> Path:
        """A CRIU of that name."""
        path = self.root / name
        program = f'{sys.executable} {fakecriu.__file__} "$@" 2>>{self.root}/errors'
        path.write_text(f"#!/bin/sh\n{settings} exec {program}\n")
        path.chmod(0o755)
        return path

    def run(
        self, url: str, transport: TransportConfig, page_server: str = "phaul"
    ) -> dict[str, Any]:
        config = Config.model_validate({
            "engine": "fake",
            "workdir": str(self.root / "here"),
            "state_dir": str(self.root / "state here"),
            "log_dir": str(self.root / "log"),
            "criu": {"binary": str(self.criu), "page_server": page_server},
            "policy": {"max_iterations": 3, "max_downtime_ms": 1},
            "checks": {"ignore": ["workdir", "state", "space"]},
            "transport": {**transport.model_dump(), "to": url},
        })  # fmt: skip
        report = Migration(config, self.case.start(), self.told.append).run()
        return report.to_json()

    def went_through(self) -> dict[str, list[str]]:
        kinds = ("sent", "taken", "by criu", *PageFormat.__members__)
        found: dict[str, list[str]] = {kind: [] for kind in kinds}
        for line in self.notes.read_text().splitlines():
            what, size, digest = line.rsplit(" ", 2)
            found[what].append(f"{size} {digest}")
        return found


@pytest.fixture
def moves(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Moves]:
    found = Moves(root)
    monkeypatch.setenv("FAKECRIU_NOTES", str(found.notes))
    monkeypatch.setattr(interface, "load_engine", lambda _: found.engine)
    yield found
    # Of the stand-in; shown where a test fails.
    sys.stdout.write((root / "errors").read_text())
    found.case.clear()


def check(moves: Moves, report: dict[str, Any], tap: Tap, page_server: str = "phaul") -> None:
    """It has moved, once and whole, and what CRIU sent was what the destination got."""
    assert (report["result"], len(report["iterations"])) == ("moved", 3)
    assert not moves.case.alive(Place.SOURCE)
    before = moves.case.told(Place.DESTINATION)
    assert before is not None
    wait(lambda: (now := moves.case.told(Place.DESTINATION)) and now.passes > before.passes + 1)
    after = moves.case.told(Place.DESTINATION)
    assert after is not None
    assert after.wrong == 0
    through = moves.went_through()
    assert len(through["sent"]) == 4
    assert through["sent"] == through["taken"]
    assert len(through["by criu"]) == (4 if page_server == "criu" else 0)
    assert len(tap.seen) > 0


ZSTD = {"compression": "zstd", "bandwidth_limit": "200MiB", "proxy_buffer": "1MiB"}


@pytest.mark.parametrize("scheme", ["tcp", "tls"])
@pytest.mark.parametrize("proxy", [{}, ZSTD], ids=["plain", "zstd"])
def test_a_whole_move(moves: Moves, root: Path, scheme: str, proxy: dict[str, Any]) -> None:
    if scheme == "tls":
        fleet = Fleet(root / "fleet")
        there, here = fleet.there(), fleet.here(**proxy)
    else:
        there = AgentConfig(listen="tcp://127.0.0.1:0", insecure=True)
        here = TransportConfig.model_validate({"insecure": True, **proxy})
    with serving(root, there, criu=str(moves.criu)) as served, tapped(served.port) as tap:
        url = served.url.replace(str(served.port), str(tap.port))
        report = moves.run(url, here)
        check(moves, report, tap)
        seen = bytes(tap.seen)
    # Of each page a part that is in no other, of the three rounds and of the final dump.
    numbers = range(fakecriu.PAGES, 4 * fakecriu.PAGES)
    pages = [fakecriu.content(page)[:64] in seen for page in numbers]
    clear = scheme == "tcp" and not proxy
    assert pages == [clear] * len(pages)
    assert (FINAL[:64] in seen) == clear
    assert (json.dumps(str(root)).strip('"').encode() in seen) == (scheme == "tcp")
    if proxy:
        sent = 4 * fakecriu.PAGES * 4096
        assert 0 < report["link_bytes"] < sent / 4
    else:
        assert report["link_bytes"] is None


def test_pages_may_be_left_to_criu(moves: Moves, root: Path) -> None:
    there = AgentConfig(listen="tcp://127.0.0.1:0", insecure=True)
    here = TransportConfig.model_validate({"insecure": True})
    with serving(root, there, criu=str(moves.criu)) as served, tapped(served.port) as tap:
        url = served.url.replace(str(served.port), str(tap.port))
        check(moves, moves.run(url, here, "criu"), tap, "criu")


@pytest.mark.parametrize(("here", "there"), [(1, 2), (2, 1)])
def test_the_other_host_has_another_criu(
    moves: Moves, root: Path, monkeypatch: pytest.MonkeyPatch, here: int, there: int
) -> None:
    monkeypatch.setenv("FAKECRIU_MINOR", str(here))
    other = moves.stand_in("criu-there", f"FAKECRIU_MINOR={there}")
    agent = AgentConfig(listen="tcp://127.0.0.1:0", insecure=True)
    transport = TransportConfig.model_validate({"insecure": True})
    with serving(root, agent, criu=str(other)) as served:
        with pytest.raises(CheckFailed, match=r"criu\.page_server: criu"):
            moves.run(served.url, transport, "criu")
        with tapped(served.port) as tap:
            url = served.url.replace(str(served.port), str(tap.port))
            check(moves, moves.run(url, transport), tap)
    assert len(moves.went_through()[PageFormat(there).name]) == 4


AGENT = """
import sys
from pathlib import Path
from phaul_runtime.cli.main import cli
from phaul_runtime.engine import interface
from phaul_runtime.testing import FakeCase
from tests.integration.test_whole_moves import Engine
engine = Engine()
engine.case = FakeCase(Path(sys.argv.pop(1)), engine)
engine.case._count = int(sys.argv.pop(1))
interface.load_engine = lambda _: engine
cli()
"""


class Service:
    """The command as a unit has it: a process of its own, on the same port each time."""

    def __init__(self, moves: Moves, config: AgentConfig, count: int, port: int) -> None:
        self.state = moves.root / "state there"
        self.url = f"tls://127.0.0.1:{port}"
        settings = {"agent": {**config.model_dump(), "listen": self.url}}
        file = moves.root / "agent.yaml"
        file.write_text(json.dumps(settings))
        argv = [sys.executable, "-c", AGENT, str(moves.root / "v"), str(count), "agent"]
        argv += ["--config", str(file), "--criu", str(moves.criu)]
        argv += ["--workdir", str(moves.root / "there"), "--state-dir", str(self.state)]
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline().split()[-1] == self.url

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        code = self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["ended", "killed"])
def test_a_restart_leaves_what_was_restored_running(
    moves: Moves, root: Path, number: signal.Signals
) -> None:
    fleet = Fleet(root / "fleet")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    service = Service(moves, fleet.there(), 1, port)
    restored = [moves.run(service.url, fleet.here())["restored_pid"]]
    assert service.end(number) == (0 if number == signal.SIGTERM else -number)
    again = Service(moves, fleet.there(), 2, port)
    try:
        restored.append(moves.run(again.url, fleet.here())["restored_pid"])
        for pid in restored:
            # Neither a zombie nor stopped.
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            assert state in "RSD"
    finally:
        assert again.end(signal.SIGTERM) == 0
        for pid in restored:
            os.kill(pid, signal.SIGKILL)
    assert list((root / "there").iterdir()) == []


def test_several_moves_by_one_service_and_restored_ones_outlive_it(
    moves: Moves, root: Path
) -> None:
    fleet = Fleet(root / "fleet")
    with serving(root, fleet.there(), criu=str(moves.criu)) as served:
        first = moves.run(served.url, fleet.here())
        assert first["result"] == "moved"
        moves.notes.unlink()
        second = moves.run(served.url, fleet.here())
        assert second["result"] == "moved"
    assert moves.case.alive(Place.DESTINATION)
    for pid in (first["restored_pid"], second["restored_pid"]):
        os.kill(pid, 0)
    os.kill(first["restored_pid"], 9)
