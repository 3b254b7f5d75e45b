"""Batches on hosts that are directories: the real command line, killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("dbos")

FAKE = Path(__file__).parent / "batch" / "fakehosts.py"
SSH = FAKE.with_name("fakessh.py")
ENGINES = ("process", "runc", "docker")
WITHIN_S = 120.0


@dataclass
class World:
    """Two hosts, and a controller of batches."""

    root: Path
    store: str
    # Starts a module or a file, as Python does, but for the seconds of its imports.
    python: list[str]
    env: dict[str, str] = field(default_factory=dict)
    # An interpreter of its own for each controller, as users have it.
    by_itself: bool = False
    running: list[subprocess.Popen[str]] = field(default_factory=list)

    @classmethod
    def make(cls, root: Path, python: list[str], store: str = "", **env: str) -> World:
        world = cls(root, store or str(root / "store"), python)
        world.env = {**os.environ, "FAKE_HOSTS": str(root / "hosts"), **env}
        for host in ("a", "b"):
            (root / "hosts" / host / "victims").mkdir(parents=True)
            (root / "hosts" / host / "config.yaml").write_text(
                f"state_dir: {root}/hosts/{host}/state\nworkdir: {root}/hosts/{host}/work\n"
            )
        transport = {
            "ssh_command": [sys.executable, "-I", "-S", str(SSH)],
            "agent_command": [*world.python, str(FAKE)],
        }
        (root / "config.yaml").write_text(yaml.safe_dump({"transport": transport}))
        return world

    def moves(self, count: int, **keys: Any) -> Path:
        """A file of `count` moves of mixed engines, every other one the other way."""
        moves = []
        for number in range(count):
            source, to = ("a", "b") if number % 2 else ("b", "a")
            target = f"victim{number}"
            (self.root / "hosts" / source / "victims" / target).write_text("0")
            moves.append(
                {
                    "name": f"move{number}", "engine": ENGINES[number % 3], "target": target,
                    "from": f"ssh://root@{source}", "to": f"ssh://root@{to}",
                }
            )  # fmt: skip
        path = self.root / "moves.yaml"
        path.write_text(yaml.safe_dump({"moves": moves, "retry_pause_s": 0.1, **keys}))
        return path

    def start(self, *argv: str) -> subprocess.Popen[str]:
        """A controller."""
        python = [sys.executable, "-m"] if self.by_itself else self.python
        process = subprocess.Popen(
            [*python, "phaul_runtime", "batch", *argv, "--store", self.store,
             "--config", str(self.root / "config.yaml")],
            env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.running.append(process)
        return process

    def batch(self, *argv: str, code: int | None = 0) -> list[dict[str, Any]]:
        process = self.start(*argv)
        out, err = process.communicate(timeout=WITHIN_S)
        assert code is None or process.returncode == code, (process.returncode, out, err)
        assert "Traceback" not in err, err
        return [json.loads(line) for line in out.splitlines()]

    def log(self) -> list[dict[str, Any]]:
        """What happened at the hosts."""
        path = self.root / "hosts" / "moves.log"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    @property
    def held(self) -> Path:
        """While this file is there, no move gets to its end."""
        return self.root / "hosts" / "held"

    def moved(self) -> int:
        return sum(line["what"] == "moved" for line in self.log())

    def wait(self, what: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WITHIN_S
        while not condition():
            assert time.monotonic() < deadline, what
            if (newest := self.running[-1]).poll():
                pytest.fail(f"{what}: it ended with {newest.returncode}: {newest.communicate()}")
            time.sleep(0.02)

    def where(self) -> dict[str, list[tuple[str, int]]]:
        """Each victim's copies: host, and how often it was moved."""
        found: dict[str, list[tuple[str, int]]] = {}
        for host in ("a", "b"):
            for path in (self.root / "hosts" / host / "victims").iterdir():
                found.setdefault(path.name, []).append((host, int(path.read_text())))
        return found

    def most_at_once(self, key: Callable[[dict[str, Any]], str]) -> int:
        """The most attempts that ran at the same time with the same key, by the hosts' log."""
        at_once: Counter[str] = Counter()
        most, open_ids = 0, set()
        for line in self.log():
            if line["what"] == "begins":
                open_ids.add(line["id"])
                at_once[key(line)] += 1
                most = max(most, at_once[key(line)])
            elif line["id"] in open_ids:
                open_ids.remove(line["id"])
                at_once[key(line)] -= 1
        return most

    def assert_done_once(self, count: int) -> None:
        """Every victim is at its destination, moved once; no attempt was made twice."""
        for number in range(count):
            there = "b" if number % 2 else "a"
            assert self.where()[f"victim{number}"] == [(there, 1)], number
        begun = Counter(line["id"] for line in self.log() if line["what"] == "begins")
        assert set(begun.values()) == {1}
        moved = Counter(line["target"] for line in self.log() if line["what"] == "moved")
        assert set(moved.values()) == {1}
        assert len(moved) == count


@pytest.fixture
def world(tmp_path: Path, python: list[str]) -> Iterator[World]:
    world = World.make(tmp_path, python)
    yield world
    for process in world.running:
        if process.poll() is None:
            process.kill()
            process.communicate(timeout=60)


LIMITS = {"total": 3, "per_source": 2, "per_destination": 2}


def test_killed_twice_and_resumed_every_move_is_done_once(world: World) -> None:
    world.env["FAKE_SECONDS"] = "1.5"
    file = world.moves(12, limits=LIMITS)
    world.held.touch()
    runner = world.start("run", str(file), "--id", "b12")
    # As many at once as may be, however long a start takes.
    world.wait("3 begun", lambda: len(world.log()) >= 3)
    world.held.unlink()
    for least in (2, 6):
        world.wait(f"{least} moved", lambda least=least: world.moved() >= least)  # type: ignore[misc]
        runner.kill()
        runner.communicate(timeout=60)
        # What was under way goes on without the controller.
        runner = world.start("resume")
    out, err = runner.communicate(timeout=WITHIN_S)
    assert runner.returncode == 0, err
    ended = json.loads(out.splitlines()[-1])
    assert (ended["event"], ended["states"]) == ("batch_ended", {"moved": 12})
    world.assert_done_once(12)
    assert world.most_at_once(lambda _: "all") <= 3
    assert world.most_at_once(lambda line: line["host"]) <= 2
    assert world.most_at_once(lambda line: line["to"]) <= 2
    # The limits were used, too.
    assert world.most_at_once(lambda _: "all") == 3
    (status,) = world.batch("status", "b12")
    assert status["states"] == {"moved": 12}
    assert status["exit_code"] == 0
    assert all(len(move["attempts"]) == 1 for move in status["moves"])


def test_a_lost_connection_is_asked_again_and_a_failure_retried(world: World) -> None:
    # That none of the ten fails is one chance in ten thousand.
    world.env.update(FAKE_LOST="0.3", FAKE_FAILING="0.6")
    file = world.moves(10, retries=60, limits={"total": 5, "per_source": 5, "per_destination": 5})
    events = world.batch("run", str(file))
    assert events[-1]["states"] == {"moved": 10}
    failed = [line for line in world.log() if line["what"] == "failed"]
    retried = [event for event in events if event["event"] == "move_retried"]
    assert len([event for event in retried if event["what"] == "another attempt"]) == len(failed)
    assert failed
    assert [event for event in retried if event["what"] == "asked again"]
    world.assert_done_once(10)


def test_what_fails_ends_with_7_and_can_be_retried(world: World) -> None:
    file = world.moves(4, retries=0)
    gone = world.root / "hosts" / "a" / "victims" / "victim1"
    gone.unlink()
    settings = yaml.safe_load(file.read_text())
    settings["moves"][3]["after"] = ["move1"]
    file.write_text(yaml.safe_dump(settings))
    events = world.batch("run", str(file), "--id", "part", code=7)
    assert events[-1]["states"] == {"moved": 2, "refused": 1, "skipped": 1}
    assert events[-1]["exit_code"] == 7
    (status,) = world.batch("status", "part")
    error = status["moves"][1]["attempts"][0]["error"]
    assert "victim1 does not run at a" in error
    assert world.batch("resume", "part", code=7)[-1]["states"] == events[-1]["states"]
    gone.write_text("0")
    assert world.batch("resume", "part", "--retry-failed")[-1]["states"] == {"moved": 4}
    world.assert_done_once(4)


def test_ctrl_c_lets_end_what_is_under_way_and_resume_goes_on(world: World) -> None:
    world.env["FAKE_SECONDS"] = "1"
    file = world.moves(8, limits={"total": 2})
    runner = world.start("run", str(file), "--id", "paused")
    world.wait("one moved", lambda: world.moved() >= 1)
    runner.send_signal(signal.SIGINT)
    out, err = runner.communicate(timeout=WITHIN_S)
    assert runner.returncode == 7, err
    ended = json.loads(out.splitlines()[-1])
    assert ended["states"]["moved"] + ended["states"]["waiting"] == 8
    assert ended["states"]["moved"] < 8
    # Nothing goes on behind its back.
    begun = [line["id"] for line in world.log() if line["what"] == "begins"]
    assert len(begun) == world.moved() == ended["states"]["moved"]
    assert world.batch("resume")[-1]["states"] == {"moved": 8}
    world.assert_done_once(8)


def test_ctrl_c_twice_cancels_what_is_under_way(world: World) -> None:
    file = world.moves(4, limits={"total": 2})
    world.held.touch()
    runner = world.start("run", str(file), "--id", "cancelled")
    world.wait("two begun", lambda: len(world.log()) >= 2)
    runner.send_signal(signal.SIGINT)
    assert runner.stdout is not None
    for line in runner.stdout:
        if json.loads(line)["event"] == "pausing":
            break
    runner.send_signal(signal.SIGINT)
    out, err = runner.communicate(timeout=WITHIN_S)
    assert runner.returncode == 7, err
    assert json.loads(out.splitlines()[-1])["states"] == {"cancelled": 2, "waiting": 2}
    assert world.moved() == 0
    world.held.unlink()
    assert world.batch("resume")[-1]["states"] == {"moved": 4}


def test_ctrl_c_twice_leaves_a_source_that_does_not_answer_for_later(world: World) -> None:
    file = world.moves(3, limits={"total": 1}, order="strict")
    away = world.root / "hosts" / "b"
    away.rename(world.root / "away")
    runner = world.start("run", str(file), "--id", "left")
    assert runner.stdout is not None
    for line in runner.stdout:
        event = json.loads(line)
        if event["event"] == "move_retried":
            assert (event["move"], event["what"]) == ("move0", "asked again")
            assert "No route to host" in event["error"]
            break
    for number in range(2):
        runner.send_signal(signal.SIGINT)
        if number == 0:
            assert any(json.loads(line)["event"] == "pausing" for line in runner.stdout)
    _, err = runner.communicate(timeout=WITHIN_S)
    assert runner.returncode == 5, err
    assert "left batch left before its end" in err
    (status,) = world.batch("status", "left")
    assert status["active"]
    (world.root / "away").rename(away)
    # It was asked to stop: what had begun is finished first, then the rest is done.
    ended = world.batch("resume")[-1]
    assert ended["states"] == {"moved": 3}
    world.assert_done_once(3)


def test_a_source_that_never_answers_is_unknown_and_asked_again_by_resume(world: World) -> None:
    file = world.moves(1, reconnect_s=0)
    away = world.root / "hosts" / "b"
    away.rename(world.root / "away")
    ended = world.batch("run", str(file), "--id", "gone", code=7)[-1]
    assert ended["states"] == {"unknown": 1}
    (world.root / "away").rename(away)
    assert world.batch("resume")[-1]["states"] == {"moved": 1}
    world.assert_done_once(1)


def test_killed_before_anything_was_begun(world: World) -> None:
    from phaul_runtime.batch.store import Store

    Store.parse(world.store, world.root).prepare("early")
    file = world.moves(1)
    process = world.start("resume", "early")
    _, err = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 3
    assert "was never begun" in err
    assert world.batch("status") == []
    assert world.batch("run", str(file), "--id", "early")[-1]["states"] == {"moved": 1}


def test_it_stops_at_n_failures(world: World) -> None:
    file = world.moves(20, retries=0, stop_after_failures=3, limits={"total": 1})
    for path in (world.root / "hosts" / "a" / "victims").iterdir():
        path.unlink()
    ended = world.batch("run", str(file), code=7)[-1]
    assert ended["states"]["refused"] == 3
    assert ended["states"]["waiting"] >= 10


def test_the_plan_has_every_preflight_and_moves_nothing(world: World) -> None:
    file = world.moves(4)
    (world.root / "hosts" / "a" / "victims" / "victim1").unlink()
    settings = yaml.safe_load(file.read_text())
    settings["moves"][2]["after"] = ["move0"]
    file.write_text(yaml.safe_dump(settings))
    plan = {each["move"]: each for each in world.batch("run", str(file), "--dry-run", code=3)}
    assert [plan[f"move{n}"]["ok"] for n in range(4)] == [True, False, True, True]
    assert "does not run at a" in plan["move1"]["problem"]
    assert (plan["move2"]["wave"], plan["move2"]["after"]) == (2, ["move0"])
    assert world.log() == []
    assert not Path(world.store).exists()


def test_the_same_moves_are_not_begun_twice(world: World) -> None:
    file = world.moves(2)
    world.held.touch()
    runner = world.start("run", str(file), "--id", "first")
    world.wait("it has begun", lambda: len(world.log()) >= 1)
    again = world.start("run", str(file))
    _, err = again.communicate(timeout=WITHIN_S)
    assert again.returncode == 3
    assert "batch resume first, or --again" in err
    second = world.start("resume", "first")
    _, err = second.communicate(timeout=WITHIN_S)
    assert second.returncode == 3
    assert "another process works on batch first" in err
    (status,) = world.batch("status", "first")
    assert (status["active"], status["exit_code"]) == (True, None)
    asked = world.start("status", "--output", "text")
    assert asked.communicate(timeout=WITHIN_S)[0] == "first  under way: 2 running\n"
    world.held.unlink()
    assert runner.wait(WITHIN_S) == 0
    world.assert_done_once(2)


def test_the_report_has_every_move_and_needs_no_network(world: World) -> None:
    pytest.importorskip("plotly")
    world.by_itself = True
    file = world.moves(3)
    page = world.root / "report.html"
    world.batch("run", str(file), "--id", "shown", "--report", str(page))
    text = page.read_text()
    for number in range(3):
        assert f"<td class=''>move{number}</td>" in text
    assert "Plotly.newPlot" in text
    assert "<script src=" not in text
    assert "seconds since the batch began" in text
