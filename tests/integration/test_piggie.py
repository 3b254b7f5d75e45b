"""The victims notice what they are there to notice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PIGGIE = Path(__file__).resolve().parents[2] / "piggie"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("built")
    for source, name in (("piggie.c", "piggie"), ("dirty.c", "piggie-dirty")):
        subprocess.run(
            ["gcc", "-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-o", str(target / name),
             str(PIGGIE / source)],
            check=True, timeout=120,
        )  # fmt: skip
    return target


class Victim:
    def __init__(self, built: Path, status: Path, *flags: str) -> None:
        self.file = status
        argv = [str(built / "piggie-dirty"), "--status", str(status), "--mib", "2", *flags]
        self.process = subprocess.Popen(argv)
        wait(lambda: status.exists() and status.read_text().endswith("\n"))

    @property
    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.file.read_text())
        return found


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def victim(built: Path, tmp_path: Path) -> Iterator[Victim]:
    found = Victim(built, tmp_path / "status", "--children", "1")
    yield found
    found.process.kill()
    found.process.wait(10)


def test_it_verifies_and_ends_well(victim: Victim) -> None:
    wait(lambda: victim.status["passes"] > 3 and victim.status["tokens"] > 10)
    assert victim.status["wrong"] == 0
    assert victim.status["written"] > 0
    victim.process.send_signal(signal.SIGTERM)
    assert victim.process.wait(10) == 0


def test_a_page_changed_from_outside_is_seen(victim: Victim) -> None:
    with Path(f"/proc/{victim.process.pid}/mem").open("r+b", buffering=0) as memory:
        os.pwrite(memory.fileno(), b"!", victim.status["base"] + 300 * 4096 + 77)
    wait(lambda: bool(victim.status["wrong"] == 1))
    assert victim.status["last_wrong"] == 300
    victim.process.send_signal(signal.SIGTERM)
    assert victim.process.wait(10) == 1


def test_sigusr1_spoils_exactly_one_page(victim: Victim) -> None:
    victim.process.send_signal(signal.SIGUSR1)
    wait(lambda: bool(victim.status["wrong"] > 0))
    passes = victim.status["passes"]
    wait(lambda: bool(victim.status["passes"] > passes + 2))
    assert victim.status["wrong"] == 1


def test_a_child_that_dies_is_seen(victim: Victim) -> None:
    children = Path(f"/proc/{victim.process.pid}/task/{victim.process.pid}/children")
    os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
    wait(lambda: bool(victim.status["wrong"] > 0))


def test_piggie_counts_as_the_first_of_its_namespace(built: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("requires root: a pid namespace")
    file = tmp_path / "count"
    started = subprocess.run(
        [str(built / "piggie"), str(file), "10"], capture_output=True, text=True, check=True,
        timeout=30,
    )  # fmt: skip
    pid = int(started.stdout)
    try:
        wait(lambda: len(file.read_text().splitlines()) > 5)
        status = Path(f"/proc/{pid}/status").read_text()
        inside = next(line for line in status.splitlines() if line.startswith("NSpid"))
        assert inside.split()[-1] == "1"
        numbers = [int(line.split()[0]) for line in file.read_text().splitlines()]
        assert numbers == list(range(len(numbers)))
    finally:
        os.kill(pid, signal.SIGKILL)
