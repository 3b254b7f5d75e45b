"""Whatever fails at whatever moment: one copy runs, no page is wrong, nothing is left behind.

`FAULTS=full` runs every cell of cells.py for one ENGINE (`make faults`), or for one MODE of it;
otherwise it is a few of each, of which CI has time for some.
"""

from __future__ import annotations

import os
import random
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.conftest import wait_until
from tests.e2e.docker_hosts import restart_dockerd
from tests.e2e.faults.cells import BY_MODE, LARGE_MIB, Cell, cells
from tests.e2e.faults.stage import CONFIG, Stage
from tests.e2e.faults.victims import Victim
from tests.e2e.observer import Observer

FULL = os.environ.get("FAULTS") == "full"
SEED = int(os.environ.get("SEED", "1"))
COUNT = int(os.environ.get("COUNT", "2"))
ENGINE = os.environ.get("ENGINE", "process")
MODES = os.environ.get("MODE", "").split() or tuple(BY_MODE)
ENDS_WITHIN_S = 180
EVERY_CRIU = "/etc/criu/default.conf"
# What is seen from outside to be happening, by the host on which it is seen.
SEEN: dict[str, tuple[str, dict[str, Any]]] = {
    "predump": ("b", {"glob": "/run/phaul/*/1/pages-*.img", "bytes": 2 << 20}),
    "dump": ("a", {"glob": "/run/phaul/out-*/final/*.img"}),
    "restore": ("b", {"glob": "/run/phaul/*/*/restore.log", "bytes": 1}),
}


@pytest.fixture
def victim(stage: Stage, observer: Observer, request: pytest.FixtureRequest) -> Iterator[Victim]:
    cell = getattr(request.node, "callspec", None)
    cell = cell.params.get("cell") if cell else None
    engine = cell.engine if cell else ENGINE
    if engine == "docker":
        request.getfixturevalue("docker_lab")
    # Little memory is over before anybody can look.
    large = cell is not None and (cell.large or cell.moment == "serving")
    found = stage.victim(observer, engine, LARGE_MIB if large else 0)
    found.mode = cell.mode if cell else MODES[0]
    yield found
    stage.clear(found)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(
            cell,
            marks=[
                pytest.mark.needs(*cell.needs),
                *([] if FULL or cell.in_ci else [pytest.mark.thorough]),
            ],
        )
        for engine in ((ENGINE,) if FULL else ("process", "runc", "docker"))
        for cell in cells(engine, quick=not FULL, modes=MODES)
    ],
    ids=str,
)
def test_one_copy_whatever_fails(
    stage: Stage, observer: Observer, victim: Victim, cell: Cell
) -> None:
    stop_at = "" if cell.moment in SEEN else cell.moment
    argv = [*victim.migrate(), "--output", "json"]
    stage.a.do("run", argv=[*argv, "--config", CONFIG], stop_at=stop_at)
    if stop_at:
        stopped = stage.a.do("await", seconds=ENDS_WITHIN_S)
        assert stopped == {"stopped": True}, stopped
    else:
        host, what = SEEN[cell.moment]
        seen = (stage.a if host == "a" else stage.b).do("when", **what)
        assert seen["found"], "the moment was not seen"
    undo = strike(stage, cell, victim)
    if stop_at and cell.fault != "kill-cli":
        stage.a.do("go")
    ended = stage.a.do("await", seconds=ENDS_WITHIN_S)
    undo()
    assert "code" in ended, ended
    outcome = f"exit {ended['code']}" if ended["code"] >= 0 else "killed"
    if ended["code"] < 0 or ended["code"] == 5:
        recovered = stage.recover()
        assert recovered["code"] == 0, recovered
        outcome += ", recovered"
    else:
        assert ended["code"] in (0, 4), ended
        if told := re.search(r"recover ([0-9a-f]+) puts it away", ended["out"]):
            # It could not be reached any more, and may have been prepared: only this host knows.
            assert cell.fault == "cut-for-good"
            recovered = stage.recover("a", told[1])
            assert recovered["code"] == 0, recovered
            outcome += ", recovered"
    runs = stage.judge(victim, observer)
    assert (runs == "b") == (ended["code"] == 0) or ended["code"] in (5, -9)
    name, _, moment = str(cell).partition("@")
    stage.rows.append((name.replace(":", " "), moment, f"{runs} runs", outcome))


def strike(stage: Stage, cell: Cell, victim: Victim) -> Any:
    """Let the fault happen; returns what mends it once the command has ended."""
    lab = stage.hosts.lab

    def nothing() -> None:
        pass

    match cell.fault:
        case "kill-cli" | "kill-ssh":
            assert stage.a.do("kill", what=cell.fault.removeprefix("kill-"))["killed"]
        case "kill-runtime-a" | "kill-runtime-b":
            hand = stage.a if cell.fault.endswith("a") else stage.b
            assert hand.do("kill", what=victim.runtime)["killed"]
        case "kill-agent":
            assert stage.b.do("kill", what="agent")["killed"]
        case "kill-criu-a":
            assert stage.a.do("kill", what="criu")["killed"]
        case "kill-pager-b" | "kill-pagers-b":
            assert stage.b.do("kill", what=cell.fault[5:-2])["killed"]
        case "kill-criu-b":
            # There may be none just then: it is killed as soon as there is one.
            killed: list[int] = []

            def kill() -> None:
                killed.extend(stage.b.do("kill", what="criu", seconds=ENDS_WITHIN_S)["killed"])

            late = threading.Thread(target=kill)
            late.start()

            def was_killed() -> None:
                late.join()
                assert killed, "there was no criu"

            return was_killed
        case "cut-5s":
            lab.cut()
            threading.Timer(5, lab.mend).start()
        case "cut-for-good":
            lab.cut()
            return lab.mend
        case "full-tmpfs-b" | "full-disk-b":
            directory = "/run/phaul" if "tmpfs" in cell.fault else "/var/lib"
            stage.b.do("fill", directory=directory)
            return lambda: stage.b.do("unfill", directory=directory)
        case "restore-refused":
            return victim.refuse()
        case "criu-refuses-b":
            # Every CRIU of that host reads this, and ends on a word that it does not know.
            stage.hosts.sh("b", f"mkdir -p /etc/criu; echo no-such-option > {EVERY_CRIU}")
            return lambda: stage.hosts.sh("b", f"rm {EVERY_CRIU}")
        case "kill-shim-b":
            assert stage.b.do("kill", what="containerd-shim")["killed"]
        case "kill-dockerd-a" | "kill-dockerd-b":
            restart_dockerd(stage.hosts, cell.fault[-1])
        case "clock-forward" | "clock-back":
            seconds = 3600 if cell.fault == "clock-forward" else -3600
            for hand in (stage.a, stage.b):
                hand.do("clock", seconds=seconds)
            return lambda: [hand.do("clock", seconds=-seconds) for hand in (stage.a, stage.b)]
    return nothing


@pytest.mark.parametrize(
    ("sabotage", "code", "says"),
    [("acknowledge-early", 5, r"copies on \[\]"), ("commit-early", 4, r"copies on \['a', 'b'\]")],
)
@pytest.mark.timeout(600)
def test_a_broken_order_is_seen(
    stage: Stage, observer: Observer, victim: Victim, sabotage: str, code: int, says: str
) -> None:
    argv = [*victim.migrate(), "--config", CONFIG]
    stage.a.do("run", argv=argv, sabotage=sabotage)
    ended = stage.a.do("await", seconds=ENDS_WITHIN_S)
    assert ended["code"] == code, ended
    with pytest.raises(AssertionError, match=says):
        stage.judge(victim, observer)
    if code == 4:
        # Both speak: the observer hears it too.
        wait_until("the observer hears both", lambda: bool(observer.complaints()))


@pytest.mark.parametrize("number", range(COUNT))
@pytest.mark.timeout(600)
def test_random_kills(stage: Stage, observer: Observer, victim: Victim, number: int) -> None:
    chance = random.Random(f"{SEED}-{number}")
    what, hand = chance.choice(
        [
            ("cli", stage.a),
            ("ssh", stage.a),
            ("criu", stage.a),
            ("agent", stage.b),
            ("criu", stage.b),
        ]
    )
    argv = [*victim.migrate(), "--output", "json"]
    stage.a.do("run", argv=[*argv, "--config", CONFIG])
    # From the moment at which the agent opens the migration to a little after the commit.
    stage.a.do("when", glob="/run/phaul/out-*")
    time.sleep(chance.uniform(0, 7))
    killed = hand.do("kill", what=what)["killed"]
    ended = stage.a.do("await", seconds=ENDS_WITHIN_S)
    assert "code" in ended, ended
    outcome = f"exit {ended['code']}" if ended["code"] >= 0 else "killed"
    if ended["code"] < 0 or ended["code"] == 5:
        recovered = stage.recover()
        assert recovered["code"] == 0, recovered
        outcome += ", recovered"
    runs = stage.judge(victim, observer)
    side = "a" if hand is stage.a else "b"
    stage.rows.append(
        (f"{number}: kill {what} on {side}", f"{len(killed)}", f"{runs} runs", outcome)
    )
