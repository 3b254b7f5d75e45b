"""`phaul-runtime recover` as an operator meets it: from either host, twice, with one host away."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.conftest import Hosts, wait_until
from tests.e2e.faults.stage import CONFIG, Stage
from tests.e2e.faults.victims import Victim
from tests.e2e.observer import Observer
from tests.e2e.test_move import SELF_TALKER


@pytest.fixture
def victim(stage: Stage, observer: Observer) -> Iterator[Victim]:
    found = stage.victim(observer)
    yield found
    stage.clear(found)


def killed_at(stage: Stage, victim: Victim, moment: str) -> str:
    """Kill the command there; returns the migration's id."""
    argv = ["migrate", str(victim.pid), "--to", "ssh://root@b", "--config", CONFIG]
    stage.a.do("run", argv=argv, stop_at=moment)
    assert stage.a.do("await", seconds=120) == {"stopped": True}
    assert stage.a.do("kill", what="cli")["killed"]
    assert stage.a.do("await", seconds=30)["code"] == -9
    found = [path.split("/")[-2] for path in stage.unsettled("a")]
    assert len(found) == 1
    return found[0]


def recover(stage: Stage, host: str, *argv: str) -> tuple[int, str, str]:
    hand = stage.a if host == "a" else stage.b
    hand.do("run", argv=["recover", *argv, "--config", CONFIG])
    ended = hand.do("await", seconds=150)
    return ended["code"], ended["out"], ended["err"]


@pytest.mark.timeout(600)
def test_from_the_destinations_side_and_again_from_both(
    stage: Stage, observer: Observer, victim: Victim
) -> None:
    migration = killed_at(stage, victim, "committing")
    code, _, said = recover(stage, "b", migration)
    assert code == 5
    assert "only the source's host knows" in said
    assert "--to ssh://root@a" in said
    for host, argv in (("b", ["--to", "ssh://root@a"]), ("b", []), ("a", []), ("b", [])):
        code, said, trouble = recover(stage, host, migration, *argv)
        assert code == 0, trouble
        assert "the destination's copy is the one" in said
    assert stage.judge(victim, observer) == "b"
    assert recover(stage, "a") == (0, "nothing to recover\n", "")


@pytest.mark.timeout(600)
def test_while_the_other_host_is_away(stage: Stage, observer: Observer, victim: Victim) -> None:
    migration = killed_at(stage, victim, "committing")
    wait_until("b has given up", lambda: not stage.b.do("alive", what="agent")["pids"])
    stage.hosts.lab.cut()
    try:
        code, _, said = recover(stage, "a", migration)
        assert code == 5
        assert "the destination does not answer" in said
        assert stage.where(victim) == []
        # The operator knows that host a will not come back.
        code, said, trouble = recover(stage, "b", migration, "--source-is-dead")
        assert code == 0, trouble
    finally:
        stage.hosts.lab.mend()
    assert recover(stage, "a")[0] == 0
    assert stage.judge(victim, observer) == "b"


@pytest.mark.timeout(600)
def test_a_source_that_was_not_given_up_needs_no_destination(
    stage: Stage, observer: Observer, victim: Victim
) -> None:
    migration = killed_at(stage, victim, "prepared")
    stage.hosts.lab.cut()
    try:
        code, said, trouble = recover(stage, "a", migration)
        assert code == 0, trouble
        assert "the destination was not reached" in said
    finally:
        stage.hosts.lab.mend()
    # What waits at the destination is settled by asking the source.
    code, said, trouble = recover(stage, "b", migration, "--to", "ssh://root@a")
    assert code == 0, trouble
    assert "the source's copy is the one" in said
    assert stage.judge(victim, observer) == "a"


@pytest.mark.needs("dirty-tracking")
@pytest.mark.thorough
@pytest.mark.timeout(600)
def test_check_names_what_is_left(stage: Stage, observer: Observer, victim: Victim) -> None:
    migration = killed_at(stage, victim, "opened")
    check = ["phaul-runtime", "check", "--to", "ssh://root@b"]
    said = stage.hosts.lab.exec("a", check).stdout
    assert f"here: leftovers: migration {migration} stands at iterating at its source" in said
    assert f"phaul-runtime recover {migration}" in said
    history = stage.hosts.lab.exec("a", ["phaul-runtime", "history"]).stdout
    assert [line for line in history.splitlines() if migration in line and "iterating" in line]
    assert recover(stage, "a")[0] == 0
    assert "leftovers" not in stage.hosts.lab.exec("a", check).stdout
    shown = stage.hosts.lab.exec("a", ["phaul-runtime", "show", migration]).stdout
    states = [line.split()[2] for line in shown.splitlines() if line.startswith("  20")]
    assert states == ["iterating", "aborting", "aborted"]
    assert stage.judge(victim, observer) == "a"


@pytest.mark.parametrize("killed", ["cli", "criu"])
@pytest.mark.timeout(600)
def test_the_network_lock_does_not_outlive_a_failure(stage: Stage, killed: str) -> None:
    hosts: Hosts = stage.hosts
    log = "/var/tmp/selftalk.log"
    start = 'setsid python3 -c "$1" </dev/null >/dev/null 2>&1 & echo $!'
    pid = int(hosts.sh("a", start, SELF_TALKER))
    try:
        wait_until("it talks", lambda: len(hosts.sh("a", f"cat {log}", check=False)) > 10)
        argv = ["migrate", str(pid), "--to", "ssh://root@b", "--config", CONFIG]
        stage.a.do("run", argv=[*argv, "--tcp-established"], stop_at="prepared")
        assert stage.a.do("await", seconds=120) == {"stopped": True}
        assert "0xc114" in hosts.sh("a", "iptables-save")
        assert stage.a.do("kill", what=killed)["killed"]
        if killed == "criu":
            stage.a.do("go")
        ended = stage.a.do("await", seconds=120)["code"]
        assert ended == (4 if killed == "criu" else -9)
        if killed == "cli":
            assert recover(stage, "a")[0] == 0
        assert "0xc114" not in hosts.sh("a", "iptables-save")
        if killed == "cli":
            # A CRIU that is killed itself leaves the connection in repair mode: it breaks.
            before = int(hosts.sh("a", f"tail -1 {log}"))
            wait_until("it talks on", lambda: int(hosts.sh("a", f"tail -1 {log}")) > before + 5)
    finally:
        for host in ("a", "b"):
            hosts.sh(host, "kill -9 $1; rm -f /var/tmp/selftalk.log", str(pid), check=False)


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["recover", "../x"], 2, "malformed migration id"),
        (["recover", "1f1f1f1f1f1f1f1f"], 3, "no migration 1f1f1f1f1f1f1f1f"),
        (["recover", "--source-is-dead"], 2, "name its ID"),
        (["show", "1f1f1f1f1f1f1f1f"], 3, "no migration 1f1f1f1f1f1f1f1f"),
    ],
)
def test_wrong_input(stage: Stage, argv: list[str], code: int, says: str) -> None:
    done = stage.hosts.lab.exec("a", ["phaul-runtime", *argv], check=False)
    assert done.returncode == code
    assert says in done.stderr
