"""Two controllers share a batch in a PostgreSQL of their own; either may die."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.test_batch import LIMITS, WITHIN_S, World
from tests.postgres import server

__all__ = ["server"]


@pytest.fixture
def world(server: str, tmp_path: Path, python: list[str]) -> Iterator[World]:
    world = World.make(tmp_path, python, server)
    yield world
    for process in world.running:
        if process.poll() is None:
            process.kill()
            process.communicate(timeout=60)


def test_two_controllers_killed_and_resumed_every_move_is_done_once(world: World) -> None:
    world.env["FAKE_SECONDS"] = "1.5"
    file = world.moves(12, limits=LIMITS)
    world.held.touch()
    one = world.start("run", str(file), "--id", "shared", "--controller", "one")
    # As many at once as may be, however long a start takes.
    world.wait("3 begun", lambda: len(world.log()) >= 3)
    two = world.start("resume", "shared", "--controller", "two")
    world.held.unlink()
    world.wait("2 moved", lambda: world.moved() >= 2)
    # The first decides what starts: the second takes that over, and what the first had under way.
    one.kill()
    one.communicate(timeout=60)
    world.wait("5 moved", lambda: world.moved() >= 5)
    one = world.start("resume", "shared", "--controller", "one")
    world.wait("8 moved", lambda: world.moved() >= 8)
    two.kill()
    told, _ = two.communicate(timeout=60)
    assert "taken_over" in told
    out, err = one.communicate(timeout=WITHIN_S)
    assert one.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["states"] == {"moved": 12}
    world.assert_done_once(12)
    assert world.most_at_once(lambda _: "all") == 3
    assert world.most_at_once(lambda line: line["host"]) <= 2
    assert world.most_at_once(lambda line: line["to"]) <= 2
    (status,) = world.batch("status", "shared")
    who = {each["controller"] for move in status["moves"] for each in move["attempts"]}
    assert who == {"one", "two"}


def test_batches_in_one_database_are_apart(world: World) -> None:
    file = world.moves(4)
    world.held.touch()
    first = world.start("run", str(file), "--id", "first", "--controller", "same")
    world.wait("all have begun", lambda: len(world.log()) == 4)
    first.kill()
    first.communicate(timeout=60)
    begun = len(world.log())
    other = World.make(world.root / "other", world.python, world.store)
    assert other.batch("run", str(other.moves(2)), "--id", "second", "--controller", "same")
    # Another batch does not take up what the first left.
    assert len(world.log()) == begun
    world.held.unlink()
    assert world.batch("resume", "first", "--controller", "same")[-1]["states"] == {"moved": 4}
    world.assert_done_once(4)
    ids = [each["batch"] for each in world.batch("status")]
    assert ids.index("first") < ids.index("second")


def test_a_controllers_name_is_taken_while_it_lives(world: World) -> None:
    file = world.moves(1)
    world.held.touch()
    runner = world.start("run", str(file), "--id", "named", "--controller", "one")
    world.wait("it has begun", lambda: len(world.log()) >= 1)
    second = world.start("resume", "named", "--controller", "one")
    _, err = second.communicate(timeout=WITHIN_S)
    assert second.returncode == 3
    assert "another process is controller one of batch named" in err
    world.held.unlink()
    assert runner.wait(WITHIN_S) == 0


def test_a_database_that_does_not_answer_is_a_clear_error(
    tmp_path: Path, python: list[str]
) -> None:
    world = World.make(tmp_path, python, f"postgresql://phaul@/postgres?host={tmp_path}")
    process = world.start("run", str(world.moves(1)))
    _, err = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 3
    assert "cannot reach postgresql+psycopg://phaul@/postgres" in err
    assert "Traceback" not in err
