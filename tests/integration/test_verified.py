"""Areas that a restore has not registered, against the kernel: nothing is wrong in silence."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from phaul_runtime.errors import DestinationError
from phaul_runtime.memory.fill_plan import FillPlan, Run
from phaul_runtime.pager.client import PagerClient
from tests.integration.test_pager import BASE, PAGES, Place, accounted, kill_one, place, pytestmark

__all__ = ["place", "pytestmark"]

ROOT = Path(__file__).parents[2]
TASK = [sys.executable, "-m", "tests.integration.held_task"]
PID = 42
# Of held_task.py: pages of the first area that is left out, and those that are there already.
FIRST, STAINED = 8, 3
# The areas that are left out are filled last, and by then must have been acted on.
SLOWLY = ("--pause", "150")


class Held:
    """A task that plays a held restore."""

    def __init__(self, place: Place, act: str) -> None:
        argv = [*TASK, str(place.workdir), str(BASE), str(PAGES), act]
        self.process = subprocess.Popen(
            argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        place.tasks.append(self.process)
        assert self.says() == "held"

    @property
    def pids(self) -> dict[int, int]:
        return {PID: self.process.pid}

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def runs(self) -> None:
        """Let it run, and do what it is to do."""
        self.go_on()
        assert self.says() == "runs"
        assert self.says() == "did"

    def looks(self) -> tuple[int, str]:
        """Let it look at its memory: exit code, and what it says of wrong pages."""
        said, _ = self.process.communicate("\n", timeout=60)
        return self.process.returncode, said


Begin = Callable[[str], tuple[PagerClient, Held]]


@pytest.fixture
def held(place: Place) -> Begin:
    def begin(act: str) -> tuple[PagerClient, Held]:
        pager = place.pager(*(() if act == "look" else SLOWLY))
        pager.plan(place.plan)
        return pager, Held(place, act)

    return begin


@pytest.fixture(autouse=True)
def over(place: Place) -> Iterator[None]:
    """A copy that never ran keeps no pager waiting."""
    yield
    for task in place.tasks:
        task.kill()
    for client in place.clients:
        with contextlib.suppress(DestinationError):
            client.stop()


def until(client: PagerClient, condition: Callable[[dict[str, Any]], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition(client.status()):
        assert time.monotonic() < deadline, client.status()
        time.sleep(0.01)


def test_what_a_restore_left_out_is_registered_and_right(held: Begin) -> None:
    pager, task = held("look")
    found = pager.verify(task.pids)
    assert (found["registered"], found["overwritten"]) == (2, STAINED)
    # It may be asked again: there is nothing more to do.
    found = pager.verify(task.pids)
    assert (found["registered"], found["overwritten"]) == (0, 0)
    task.runs()
    assert task.looks() == (0, "")
    result = pager.wait(30)
    assert result["filled"] == result["pages"] == PAGES
    assert result["notes"] == []


def test_without_it_pages_are_wrong_and_it_is_told(held: Begin) -> None:
    pager, task = held("look")
    task.runs()
    result = pager.wait(30)
    code, said = task.looks()
    assert code == 1
    assert "[0, 0, 0], not 1" in said
    assert accounted(result)
    assert (result["lost"], result["filled"]) == (2 * FIRST, PAGES - 2 * FIRST)
    (note,) = result["notes"]
    assert note.startswith(f"process 42: {2 * FIRST} pages from {BASE:#x} on have no place")


@pytest.mark.parametrize("at", [0, 1])
def test_a_kill_changes_nothing(held: Begin, at: int) -> None:
    pager, task = held("look")
    kill_one(pager, at)
    assert pager.verify(task.pids)["verified"]
    kill_one(pager, at)
    found = pager.verify(task.pids)
    assert (found["registered"], found["overwritten"]) == (0, 0)
    task.runs()
    kill_one(pager, at)
    assert task.looks() == (0, "")
    result = pager.wait(30)
    assert accounted(result)
    assert (result["lost"], result["notes"]) == (0, [])


@pytest.mark.parametrize(
    ("act", "why"),
    [
        ("hole", rf"the area at {BASE + 4 * 4096:#x} of process 42 does not exist"),
        ("shared", rf"the area at {BASE + 4 * 4096:#x} of process 42 is not its own alone"),
    ],
)
def test_what_cannot_be_served_is_an_error(held: Begin, act: str, why: str) -> None:
    pager, task = held(act)
    with pytest.raises(DestinationError, match=why):
        pager.verify(task.pids)


def test_processes_that_are_not_what_the_plan_says(place: Place) -> None:
    plan = FillPlan.load(place.plan)
    plan.save(place.plan)
    pager = place.pager()
    with pytest.raises(DestinationError, match="no restored tree is held"):
        pager.verify({PID: os.getpid()})
    pager.plan(place.plan)
    task = Held(place, "look")
    with pytest.raises(DestinationError, match="process 42 is not below the restored root"):
        pager.verify({})
    ended = subprocess.Popen(["true"])
    ended.wait(10)
    with pytest.raises(DestinationError, match=r"memory of process 42, .* be verified: No"):
        pager.verify({PID: ended.pid})
    task.process.kill()
    until(pager, lambda now: now["state"] == "listening")
    plan.tasks[43] = type(plan.tasks[PID])()
    plan.tasks[43].append(Run(BASE, 1, 0, 0))
    plan.save(place.plan)
    pager.plan(place.plan)
    with pytest.raises(DestinationError, match="not handed over the memory of process 43"):
        pager.verify(Held(place, "look").pids)


def test_an_area_that_is_served_no_more_is_served_again_and_told(held: Begin) -> None:
    pager, task = held("unregister")
    pager.verify(task.pids)
    task.runs()
    result = pager.wait(30)
    # But the page that was looked at meanwhile; nobody can know what came of that.
    assert task.looks() == (0, "")
    assert accounted(result)
    assert (result["lost"], result["filled"]) == (1, PAGES - 1)
    late = f"process 42: {FIRST - 2} pages from {BASE:#x} on were in areas that could be served"
    touched = f"process 42: 1 pages from {BASE + 2 * 4096:#x} on were touched before"
    first, second = result["notes"]
    assert first.startswith(late)
    assert second.startswith(touched)


def test_what_took_the_place_of_an_area_is_left_alone(held: Begin) -> None:
    pager, task = held("replace")
    pager.verify(task.pids)
    task.runs()
    result = pager.wait(30)
    assert task.looks() == (0, "")
    assert accounted(result)
    assert result["lost"] == FIRST - 2
    (note,) = result["notes"]
    assert note.startswith(f"process 42: {FIRST - 2} pages from {BASE + 2 * 4096:#x} on have no")


def test_what_is_left_out_of_a_fork_is_nobodys(held: Begin) -> None:
    pager, task = held("fork")
    pager.verify(task.pids)
    task.runs()
    until(pager, lambda now: now["unshared"] == FIRST - 2)
    assert task.looks() == (0, "")
    result = pager.wait(30)
    assert accounted(result)
    assert result["pages"] > PAGES
    assert (result["lost"], result["notes"]) == (0, [])
