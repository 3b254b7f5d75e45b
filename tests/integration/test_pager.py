"""The pager against the kernel's userfaultfd, with kills of either of its processes."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from phaul_runtime.errors import DestinationError
from phaul_runtime.memory.fill_plan import PAGE, FillPlan, Run, Runs
from phaul_runtime.pager.client import PagerClient

TASK = Path(__file__).with_name("lazy_task.py")
BASE = 0x7E0000000000
PAGES = 4096


def _userfaultfd() -> bool:
    number = {"x86_64": 323, "aarch64": 282}.get(os.uname().machine)
    if number is None:
        return False
    fd = int(ctypes.CDLL(None).syscall(number, os.O_CLOEXEC | os.O_NONBLOCK))
    if fd >= 0:
        os.close(fd)
    return fd >= 0


pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not _userfaultfd(), reason="requires root and a kernel with userfaultfd"
)


class Place:
    """A working directory with a plan, and what was started in it."""

    def __init__(self, path: Path) -> None:
        self.workdir = path / "work"
        self.workdir.mkdir(mode=0o700)
        self.images = path / "images"
        self.images.mkdir()
        self.plan = path / "plan"
        # The pages lie backwards in pieces of 100, so that there are runs.
        pieces = [range(at, min(at + 100, PAGES)) for at in range(0, PAGES, 100)]
        runs = {}
        with (self.images / "pages-1.img").open("wb") as file:
            for piece in reversed(pieces):
                runs[piece.start] = Run(BASE + piece.start * PAGE, len(piece), 0, file.tell())
                for page in piece:
                    file.write(struct.pack("=Q", page + 1) * 512)
        plan = FillPlan([str(self.images / "pages-1.img")], {42: Runs()})
        for _, run in sorted(runs.items()):
            plan.tasks[42].append(run)
        plan.save(self.plan)
        self.clients: list[PagerClient] = []
        self.tasks: list[subprocess.Popen[str]] = []

    def pager(self, *extra: str) -> PagerClient:
        client = PagerClient.start(self.workdir, extra=extra)
        self.clients.append(client)
        return client

    def task(self, seed: int = 1, steps: int = 200) -> subprocess.Popen[str]:
        argv = [sys.executable, str(TASK), str(self.workdir), str(BASE), str(PAGES), str(seed)]
        task = subprocess.Popen([*argv, str(steps)], stdout=subprocess.PIPE, text=True)
        self.tasks.append(task)
        return task


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    for task in place.tasks:
        if task.poll() is None:
            task.kill()
        task.communicate()
    for client in place.clients:
        with contextlib.suppress(DestinationError):
            client.wait(10)
        with contextlib.suppress(DestinationError):
            client.stop()


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def gone(pids: list[int], within_s: float = 60) -> bool:
    deadline = time.monotonic() + within_s
    while any(alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def accounted(result: dict[str, Any]) -> bool:
    """Whether exactly one thing became of every page."""
    fates = ("filled", "present", "dropped", "ended", "unshared", "lost", "missing")
    return bool(result["pages"] == sum(result[fate] for fate in fates))


def kill_one(client: PagerClient, at: int) -> bool:
    """Kill the worker (0) or the keeper (1), and wait for a new pair; False if it was over."""
    before = client.status()
    if before["state"] == "done":
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(before["pids"][at], signal.SIGKILL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        now = client.status()
        if now["state"] == "done":
            return True
        if before["pids"][at] not in now["pids"] and all(map(alive, now["pids"])):
            return True
        time.sleep(0.001)
    raise AssertionError("no new pair")


def test_every_page_arrives_without_the_images(place: Place) -> None:
    pager = place.pager()
    assert pager.status()["state"] == "waiting"
    pager.plan(place.plan)
    assert (place.workdir / "lazy-pages.socket").stat().st_mode & 0o777 == 0o600
    (place.images / "pages-1.img").unlink()
    task = place.task(steps=0)
    said, _ = task.communicate(timeout=60)
    assert (task.returncode, said) == (0, "runs\n")
    result = pager.wait(30)
    assert result["state"] == "done"
    assert result["pages"] == PAGES
    assert result["filled"] == PAGES
    assert result["missing"] == 0
    assert gone(result["pids"])
    assert not list(place.workdir.glob("*.socket"))
    assert json.loads((place.workdir / "pager.json").read_text())["filled"] == PAGES


@pytest.mark.parametrize("seed", range(8))
def test_what_the_process_does_to_its_memory(place: Place, seed: int) -> None:
    pager = place.pager("--pause", "5")
    pager.plan(place.plan)
    task = place.task(seed)
    said, _ = task.communicate(timeout=60)
    assert (task.returncode, said) == (0, "runs\n")
    result = pager.wait(30)
    assert accounted(result)
    assert (result["state"], result["present"], result["notes"]) == ("done", 0, [])
    assert result["pages"] >= PAGES


@pytest.mark.parametrize("seed", range(6))
def test_kills_of_either_process(place: Place, seed: int) -> None:
    rng = random.Random(seed)
    pager = place.pager("--pause", "40")
    pager.plan(place.plan)
    task = place.task(seed, steps=2000)
    assert task.stdout is not None
    assert task.stdout.readline() == "runs\n"
    kills = 0
    while task.poll() is None and kill_one(pager, rng.randrange(2)):
        kills += 1
        time.sleep(rng.random() * 0.02)
    said, _ = task.communicate(timeout=60)
    assert (task.returncode, said) == (0, "")
    result = pager.wait(30)
    assert accounted(result)
    assert (result["state"], result["notes"]) == ("done", [])
    assert kills > 2


@pytest.mark.parametrize("at", [0, 1])
def test_a_kill_at_any_moment_of_the_restore_is_survived_or_loud(place: Place, at: int) -> None:
    rng = random.Random(at)
    for seed in range(6):
        pager = place.pager()
        pager.plan(place.plan)
        task = place.task(seed, steps=20)
        time.sleep(rng.random() * 0.15)
        kill_one(pager, at)
        said, _ = task.communicate(timeout=60)
        assert task.returncode in (0, 2), said
        if task.returncode == 0:
            pager.wait(30)
        else:
            pager.stop()


def test_without_a_twin_a_kill_is_silent_corruption(place: Place) -> None:
    """Why there are two: this is what the tests above would see."""
    pager = place.pager("--no-twin", "--pause", "1000")
    pager.plan(place.plan)
    task = place.task(steps=0)
    assert task.stdout is not None
    assert task.stdout.readline() == "runs\n"
    os.kill(pager.status()["pids"][0], signal.SIGKILL)
    said, _ = task.communicate(timeout=60)
    assert task.returncode == 1
    assert "[0, 0, 0]" in said
    # The agent at least is told: no pager, no result.
    with pytest.raises(DestinationError, match="no answer"):
        pager.wait(5)


def test_a_failed_attempt_is_forgotten_and_the_next_succeeds(place: Place) -> None:
    pager = place.pager()
    pager.plan(place.plan)
    for _ in range(2):
        code = (
            f"import sys; sys.path.insert(0, {str(TASK.parent)!r}); import lazy_task as t\n"
            f"assert t.libc.mmap({BASE}, 409600, 3, 0x32, -1, 0) == {BASE}\n"
            f"c = t.hand_over({str(place.workdir)!r}, t.register({BASE}, 409600))\n"
            f"t.Memory({BASE}, 100).check({BASE})\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
    pager.plan(place.plan)
    task = place.task()
    assert task.wait(60) == 0
    assert pager.wait(30)["state"] == "done"


@pytest.mark.parametrize("killed", [None, 0, 1])
def test_a_restore_before_the_plan_waits_for_it(place: Place, killed: int | None) -> None:
    pager = place.pager()
    task = place.task()
    assert task.stdout is not None
    assert not select.select([task.stdout], [], [], 1)[0]
    assert pager.status()["state"] == "waiting"
    pager.plan(place.plan)
    if killed is not None:  # what the one has read, the other has not yet
        kill_one(pager, killed)
    said, _ = task.communicate(timeout=60)
    assert (task.returncode, said) == (0, "runs\n")
    assert pager.wait(30)["state"] == "done"


def test_without_a_plan_a_restore_fails(place: Place) -> None:
    pager = place.pager()
    task = place.task()
    pager.stop()
    assert task.wait(60) == 1


def test_stop_is_refused_while_a_process_needs_it(place: Place) -> None:
    pager = place.pager("--pause", "100")
    pager.plan(place.plan)
    task = place.task(steps=0)
    assert task.stdout is not None
    task.stdout.readline()
    with pytest.raises(DestinationError, match="still gets its pages"):
        pager.stop()
    assert task.wait(60) == 0


def test_it_ends_without_an_owner_and_not_with_one(place: Place) -> None:
    pager = place.pager("--grace", "0.2")
    pids = pager.status()["pids"]
    time.sleep(1.5)
    assert all(map(alive, pids))
    pager.close()
    assert gone(pids)
    with pytest.raises(DestinationError, match="no answer"):
        pager.status()


def test_a_bad_plan_is_refused(place: Place) -> None:
    pager = place.pager()
    plan = FillPlan.load(place.plan)
    plan.tasks[42].append(Run(BASE + PAGES * PAGE, 1, 0, PAGES * PAGE))
    plan.save(place.plan)
    with pytest.raises(DestinationError, match="bad runs of process 42"):
        pager.plan(place.plan)
    plan.files = ["/nowhere"]
    plan.save(place.plan)
    with pytest.raises(DestinationError, match="cannot map"):
        pager.plan(place.plan)
    with pytest.raises(DestinationError, match="cannot read the plan"):
        pager.plan(place.workdir / "none")
    pager.stop()


def test_a_process_that_is_killed_ends_its_part(place: Place) -> None:
    pager = place.pager("--pause", "50")
    pager.plan(place.plan)
    task = place.task(steps=0)
    assert task.stdout is not None
    task.stdout.readline()
    task.kill()
    result = pager.wait(10)
    assert result["state"] == "done"
    assert result["filled"] + result["ended"] == PAGES
    assert result["ended"] > 0
