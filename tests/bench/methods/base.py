"""What every method is: a way to move one victim from host a to host b, once."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from tests.bench.result import Carried
from tests.bench.workloads import Workload
from tests.e2e.conftest import Dirtier, Hosts

NAME = "bench"
SCRIPTS = Path(__file__).parent.parent / "scripts"
MOVE_S = 900


class Unavailable(Exception):
    """The hosts have not what a method needs; the message says what."""


class Method(ABC):
    """One way to move one victim, once.

    Attributes:
        key: how it is selected.
        title: for people.
        redis: it can move redis with its connection, too.
        local: it moves within host a.
        lazy: pages come after it runs there.
    """

    key: ClassVar[str]
    title: ClassVar[str]
    redis: ClassVar[bool] = False
    local: ClassVar[bool] = False
    lazy: ClassVar[bool] = False

    def __init__(self, hosts: Hosts, workload: Workload) -> None:
        self.hosts = hosts
        self.workload = workload

    @classmethod
    def takes(cls, workload: Workload) -> bool:
        """Whether it can move that at all."""
        return cls.redis or not workload.redis

    @classmethod  # noqa: B027 - some need nothing
    def prepare(cls, hosts: Hosts) -> None:
        """What the hosts need before the first move, and is not measured.

        Raises:
            Unavailable: it cannot be had.
        """

    @classmethod  # noqa: B027 - some need nothing
    def tidy(cls, hosts: Hosts) -> None:
        """Undo `prepare`, after the last move."""

    @abstractmethod
    def start(self, observer: str) -> None:
        """Start piggie-dirty on a; it sends ticks to `observer`."""

    @abstractmethod
    def move(self) -> Carried:
        """Move it, and remove it from a."""

    @abstractmethod
    def dirtier(self, host: str) -> Dirtier:
        """The program, by its status file; `pid` is the host's."""

    @abstractmethod
    def clear(self) -> None:
        """Remove it from both hosts, wherever it is."""

    def push_script(self, name: str) -> None:
        """Lay a script of SCRIPTS on a."""
        self.hosts.lab.push("a", SCRIPTS / name, f"/var/tmp/{name}")

    def run_script(self, name: str, *args: str) -> Carried:
        """Run it; its last line is what was carried."""
        return self.run_mover("bash", f"/var/tmp/{name}", *args)

    def run_mover(self, *argv: str) -> Carried:
        """Run a command on a whose last line is what was carried."""
        done = self.hosts.lab.exec("a", argv, timeout=MOVE_S, check=False)
        if done.returncode:
            raise RuntimeError(failure(argv[0], done.returncode, done.stderr or done.stdout))
        return parse_carried(done.stdout)


def failure(what: str, code: int, output: str) -> str:
    """One line of how a command ended."""
    tail = " | ".join(line.strip() for line in output.strip().splitlines()[-3:])
    return f"{what.rpartition('/')[2]} ended with {code}: {tail}"


def parse_carried(output: str) -> Carried:
    """The last line of a script, or of the driver in Go: JSON with the names of `Carried`."""
    lines = output.strip().splitlines()
    if not lines:
        raise ValueError("it did not say what it carried")
    found: dict[str, Any] = json.loads(lines[-1])
    return Carried(**found)


def with_rounds(carried: Carried) -> Carried:
    """All of memory went over in one round before the final dump."""
    dumped = carried.pages + carried.final_pages
    return dataclasses.replace(carried, dumped_pages=dumped, rounds=1)
