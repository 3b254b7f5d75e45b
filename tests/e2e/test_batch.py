"""A batch of mixed engines in both directions; its runner is on this machine, and is killed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.conftest import Dirtier, Hosts, wait_until
from tests.e2e.containers import Container, Containers, containers
from tests.e2e.docker_hosts import DockerContainer, DockerHosts, docker_hosts, docker_lab
from tests.postgres import server

__all__ = ["containers", "docker_hosts", "docker_lab", "server"]

LIMITS = {"total": 2, "per_source": 2, "per_destination": 1}
WITHIN_S = 1500.0
FLAGS = ("--mib", "8", "--hot-mib", "1", "--writes", "100")


@dataclass
class Victim:
    """What is moved there and back."""

    name: str
    engine: str
    target: str
    home: str
    at: Callable[[str], Dirtier]
    runs: Callable[[str], bool]

    def moves(self) -> list[dict[str, Any]]:
        away = "b" if self.home == "a" else "a"
        there = {
            "name": f"{self.name}-there", "engine": self.engine, "target": self.target,
            "from": f"ssh://root@{self.home}", "to": f"ssh://root@{away}",
        }  # fmt: skip
        back = {**there, "name": f"{self.name}-back", "from": there["to"], "to": there["from"],
                "after": [there["name"]]}  # fmt: skip
        return [there, back]


@pytest.fixture
def runner(hosts: Hosts, tmp_path: Path) -> Iterator[Runner]:
    found = Runner(hosts, tmp_path, str(tmp_path / "store"))
    found.configure()
    yield found
    found.kill()


@pytest.fixture
def controllers(hosts: Hosts, tmp_path: Path, server: str) -> Iterator[list[Runner]]:
    found = [Runner(hosts, tmp_path, server, name) for name in ("one", "two")]
    found[0].configure()
    yield found
    for each in found:
        each.kill()


class Runner:
    """`phaul-runtime batch` on this machine."""

    def __init__(self, hosts: Hosts, directory: Path, store: str, name: str = "") -> None:
        self.hosts = hosts
        self.directory = directory
        self._store = store
        self._flags = ("--controller", name) if name else ()
        self._process: subprocess.Popen[str] | None = None

    def configure(self) -> None:
        """The hosts by their names, as an operator's ssh configuration has them."""
        lines = []
        for name in ("a", "b"):
            options = self.hosts.lab.host(name).ssh_config()
            lines += [f"Host {name}", *(f" {key} {value}" for key, value in options.items())]
        (self.directory / "ssh").write_text("\n".join(lines) + "\n")
        transport = {"ssh_command": ["ssh", "-F", str(self.directory / "ssh")]}
        (self.directory / "config.yaml").write_text(yaml.safe_dump({"transport": transport}))

    def _argv(self, *words: str) -> list[str]:
        return [
            sys.executable, "-m", "phaul_runtime", "batch", *words,
            "--config", str(self.directory / "config.yaml"),
            "--store", self._store,
        ]  # fmt: skip

    def start(self, *words: str) -> None:
        with (self.directory / "stderr").open("a") as stderr:
            self._process = subprocess.Popen(
                self._argv(*words, *self._flags), stdout=subprocess.PIPE, stderr=stderr, text=True
            )

    def until(self, name: str, count: int) -> None:
        """Read on until that event of a move was told so many times."""
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if json.loads(line).get("told", {}).get("event") == name:
                count -= 1
                if count == 0:
                    return
        pytest.fail(f"it ended before: {self.said()}")

    def kill(self) -> None:
        """SIGKILL; what is under way at the hosts goes on."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.communicate(timeout=60)

    def end(self) -> tuple[int, dict[str, Any]]:
        assert self._process is not None
        out, _ = self._process.communicate(timeout=WITHIN_S)
        return self._process.returncode, json.loads(out.splitlines()[-1])

    def ask(self, *words: str) -> tuple[int, list[dict[str, Any]]]:
        done = subprocess.run(
            self._argv(*words), capture_output=True, text=True, timeout=WITHIN_S, check=False
        )
        return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]

    def said(self) -> str:
        return (self.directory / "stderr").read_text()


def victims(hosts: Hosts, containers: Containers, docker_hosts: DockerHosts) -> list[Victim]:
    found = []
    # A pid has to be free on both hosts: both begin at the same one.
    for number in (1, 2):
        process = hosts.dirtier("a", f"batch{number}", *FLAGS)
        found.append(process_victim(f"process{number}", process))
    for host, name in (("a", "batch-runc1"), ("b", "batch-runc2")):
        found.append(runc_victim(host, containers.dirtier(host, name, *FLAGS)))
    for host, name in (("a", "batch-docker1"), ("b", "batch-docker2")):
        found.append(docker_victim(host, docker_hosts.dirtier(host, name, *FLAGS)))
    for victim in found:
        wait_until(f"{victim.name} tells", partial(tells, hosts, victim))
    return found


def tells(hosts: Hosts, victim: Victim) -> bool:
    status = victim.at(victim.home).status_file
    return hosts.sh(victim.home, 'cat "$1"', status, check=False) != ""


def process_victim(name: str, process: Dirtier) -> Victim:
    def runs(host: str) -> bool:
        return process.hosts.alive(host, process.pid)

    return Victim(name, "process", str(process.pid), "a", lambda _: process, runs)


def runc_victim(home: str, box: Container) -> Victim:
    def runs(host: str) -> bool:
        return box.state(host) == "running"

    return Victim(box.name, "runc", box.name, home, box.dirtier, runs)


def docker_victim(home: str, web: DockerContainer) -> Victim:
    def runs(host: str) -> bool:
        return web.status(host) == "running"

    return Victim(web.name, "docker", web.name, home, web.dirtier, runs)


def test_twelve_moves_killed_twice_each_done_once(
    hosts: Hosts, containers: Containers, docker_hosts: DockerHosts, runner: Runner
) -> None:
    all_of_them = victims(hosts, containers, docker_hosts)
    file, moves = written(runner.directory, all_of_them)
    code, plan = runner.ask("run", str(file), "--dry-run")
    assert code == 0, plan
    assert len(plan) == 12
    assert all(each["ok"] for each in plan if not each["after"]), plan

    runner.start("run", str(file), "--id", "lab")
    runner.until("frozen", 2)  # in a freeze
    runner.kill()
    runner.start("resume", "lab")
    runner.until("prepared", 3)  # in a cut-over
    runner.kill()
    runner.start("resume", "lab", "--report", str(runner.directory / "report.html"))
    code, ended = runner.end()
    assert code == 0, (ended, runner.said())
    assert ended["states"] == {"moved": 12}
    done_once(hosts, docker_hosts, runner, all_of_them, moves)
    assert "Plotly.newPlot" in (runner.directory / "report.html").read_text()


@pytest.mark.thorough
def test_two_controllers_of_which_either_is_killed(
    hosts: Hosts, containers: Containers, docker_hosts: DockerHosts, controllers: list[Runner]
) -> None:
    one, two = controllers
    all_of_them = victims(hosts, containers, docker_hosts)
    file, moves = written(one.directory, all_of_them)
    one.start("run", str(file), "--id", "lab")
    one.until("frozen", 1)
    two.start("resume", "lab")
    two.until("iteration_done", 1)
    one.kill()  # it decided what starts: the other takes that over
    one.start("resume", "lab")
    two.until("frozen", 1)
    two.kill()
    code, ended = one.end()
    assert code == 0, (ended, one.said())
    assert ended["states"] == {"moved": 12}
    # The second is seen moving above; what it had under way, the first has asked for again.
    assert "one" in done_once(hosts, docker_hosts, one, all_of_them, moves)


def written(directory: Path, all_of_them: list[Victim]) -> tuple[Path, list[dict[str, Any]]]:
    moves = [move for victim in all_of_them for move in victim.moves()]
    file = directory / "moves.yaml"
    defaults = {"files": "copy"}
    file.write_text(
        yaml.safe_dump({"defaults": defaults, "limits": LIMITS, "retries": 2, "moves": moves})
    )
    return file, moves


def done_once(
    hosts: Hosts,
    docker_hosts: DockerHosts,
    runner: Runner,
    all_of_them: list[Victim],
    moves: list[dict[str, Any]],
) -> set[str]:
    """Each runs where it should and nowhere else, within the limits; who asked for moves."""
    for victim in all_of_them:
        away = "b" if victim.home == "a" else "a"
        assert victim.runs(victim.home), victim.name
        assert not victim.runs(away), victim.name
        assert victim.at(victim.home).verified_on(victim.home)["wrong"] == 0, victim.name
    _, (status,) = runner.ask("status", "lab")
    spans = [span for move in status["moves"] for span in journal_spans(hosts, moves, move)]
    # By one clock: that of one host, or the runner's.
    assert at_most(spans, lambda span: span[2]) <= LIMITS["per_source"]
    assert at_most(spans, lambda span: span[3]) <= LIMITS["per_destination"]
    attempts = [each for move in status["moves"] for each in move["attempts"]]
    asked = [(each["began"], each["ended"], "", "") for each in attempts]
    assert at_most(asked, lambda _: "all") <= LIMITS["total"]
    for host in ("a", "b"):
        assert hosts.leftovers(host) == ""
        assert docker_hosts.leftovers(host) == ""
    return {each["controller"] for each in attempts}


Span = tuple[float, float, str, str]


def journal_spans(
    hosts: Hosts, moves: list[dict[str, Any]], move: dict[str, Any]
) -> Iterator[Span]:
    """When each attempt of a move was under way, by its source's journal: one of them moved it."""
    told = next(each for each in moves if each["name"] == move["name"])
    source, to = (told[key].rpartition("@")[2] for key in ("from", "to"))
    states = []
    for attempt in move["attempts"]:
        argv = ["phaul-runtime", "show", attempt["id"], "--output", "json"]
        shown = hosts.lab.exec(source, argv, check=False).stdout
        if shown:  # else it was refused before it began
            records = json.loads(shown)["source"]
            states.append([record["state"] for record in records if "state" in record][-1])
            yield records[0]["time"], records[-1]["time"], source, to
    assert states.count("done") == 1, (move["name"], states)


def at_most(spans: list[Span], key: Callable[[Span], str]) -> int:
    """The most that were under way at the same time with the same key."""
    return max(
        sum(
            key(other) == key(span) and other[0] <= span[0] < other[1] for other in spans
        )
        for span in spans
    )  # fmt: skip
