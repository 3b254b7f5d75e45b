"""Journals with wrong bytes: nothing wrong follows from them, and what surveys them goes on."""

from __future__ import annotations

import collections
import itertools
import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from pydantic import BaseModel

from phaul_runtime import config as config_module
from phaul_runtime import incoming as incoming_module
from phaul_runtime import journal as journal_module
from phaul_runtime import leftovers, once, settle
from phaul_runtime.checks import compare_hosts
from phaul_runtime.cli.main import cli
from phaul_runtime.config import load_config
from phaul_runtime.criu import Criu
from phaul_runtime.engine import WARNING
from phaul_runtime.errors import ExitCode, JournalDamaged, NoSuchMigration, PhaulError
from phaul_runtime.hostfacts import gather_facts
from phaul_runtime.journal import (
    Journal,
    examine,
    forget_old,
    journal_path,
    migration_ids,
    read_records,
    replay,
    unsettled,
)
from phaul_runtime.journalformat import HEADER, STEP, Contents, closed_state, decode
from phaul_runtime.settle import Settler
from phaul_runtime.states import Role, State, Verdict, decide
from phaul_runtime.wire import from_wire, to_wire

ID = "ab" * 8
FORWARD = [State.ITERATING, State.FROZEN, State.PREPARED, State.COMMITTING, State.DONE]
LIVE, DEAD = [[1, 11]], [[2, 22]]
V1 = Path(__file__).parent / "journals" / "v1"


@dataclass(frozen=True)
class World:
    """What is true on two hosts."""

    source: State
    members: list[list[int]]
    destination: State
    truth: Verdict


WORLDS = [
    World(State.COMMITTING, LIVE, State.PREPARED, Verdict.DISCARD),
    World(State.COMMITTING, DEAD, State.PREPARED, Verdict.RUN),
    World(State.PREPARED, LIVE, State.PREPARED, Verdict.DISCARD),
    World(State.COMMITTING, DEAD, State.COMMITTING, Verdict.RUN),
    World(State.ITERATING, LIVE, State.ITERATING, Verdict.DISCARD),
    World(State.COMMITTING, DEAD, State.DONE, Verdict.RUN),
]


def build(state_dir: Path, role: Role, upto: State, members: list[list[int]]) -> Journal:
    """An end as a move leaves it, still open."""
    facts: dict[State, dict[str, Any]] = {
        State.ITERATING: {"engine": "process", "target": "1", "options": {}, "lost_s": 20.0},
        State.PREPARED: {"pid": 4711},
        State.DONE: {"pid": 4711, "downtime_ms": 12.3},
    }
    identity = {"root": members[0][0], "members": members}
    if role is Role.SOURCE:
        facts[State.ITERATING] |= {"to": "ssh://root@b", "identity": identity}
        facts[State.FROZEN] = {"identity": identity}
    else:
        facts[State.ITERATING] |= {"peer": "a", "manifest": {"pids": [1]}, "workdir": "/work"}
        facts[State.FROZEN] = {"images_dir": f"/work/{ID}/3"}
    journal = Journal.create(state_dir, ID, role)
    for state in FORWARD[: FORWARD.index(upto) + 1]:
        journal.enter(state, **facts.get(state, {}))
        if state is State.ITERATING:
            journal.add("made", "/srv/a", "/srv/b c")
    return journal


class _Options(BaseModel):
    pass


class _Source:
    """Knows a tree again by its members, as the engines do."""

    def __init__(self) -> None:
        self._members: list[tuple[int, int]] = []

    def recall(self, identity: Any) -> None:
        self._members = [(int(pid), int(start)) for pid, start in identity["members"]]

    def gone(self) -> bool:
        return [list(each) for each in self._members] != LIVE

    def end_rest(self) -> None:
        assert self.gone()


class _Engine:
    options_model = _Options

    @staticmethod
    def source(*_: object, **__: object) -> _Source:
        return _Source()


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settle, "load_engine", lambda _: _Engine)
    # The disk is not what this is about.
    monkeypatch.setattr(os, "fdatasync", lambda _: None)
    monkeypatch.setattr(journal_module, "sync_directory", lambda _: None)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def mutations(data: bytes, upto: int, step: int = 1) -> Iterator[bytes]:
    """Every flip of a bit of the first `upto` bytes, every length below that; or each `step`th."""
    for number in range(0, upto * 8, step):
        at, bit = divmod(number, 8)
        yield data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]
    for end in range(0, upto, step):
        yield data[:end]


def verdict(settler: Settler) -> str:
    """What a recovery decides, or how that ends."""
    try:
        ends = [settler.look(ID, role, wait_s=0) for role in Role]
        return decide(*ends).verdict.value
    except PhaulError as error:
        return type(error).__name__


def judged(world: World, said: str) -> str:
    if said in (world.truth.value, Verdict.UNKNOWN.value, JournalDamaged.__name__):
        return said
    return f"WRONG: {said}"


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("world", WORLDS)
def test_no_flip_and_no_cut_is_taken_for_another_state(
    tmp_path: Path, world: World, closed: bool
) -> None:
    """All of them by `decode`; what it does not see, and a sample, by all that a recovery does."""
    settler = Settler(tmp_path, tmp_path / "work", Criu("none"))
    built = {
        Role.SOURCE: build(tmp_path, Role.SOURCE, world.source, world.members),
        Role.DESTINATION: build(tmp_path, Role.DESTINATION, world.destination, world.members),
    }
    left = {role: journal.path.read_bytes() for role, journal in built.items()}
    for journal in built.values():
        journal.close()
        if not closed:
            journal.path.write_bytes(left[journal.role])
    assert verdict(settler) == world.truth.value
    files = open_files()
    found: collections.Counter[str] = collections.Counter()
    chosen = random.Random(1)
    thorough = bool(os.environ.get("THOROUGH"))
    for journal in built.values():
        data = journal.path.read_bytes()
        good = decode(data)
        step = 1 if closed or thorough else 7
        for wrong in mutations(data, len(data.rstrip(b"\0")), step):
            contents = decode(wrong)
            seen = contents.damage is not None
            assert seen or contents.records == good.records or not contents.records
            if seen and not thorough and chosen.random() > 0.01:
                found["seen"] += 1
                continue
            journal.path.write_bytes(wrong)
            found[judged(world, verdict(settler))] += 1
            unsettled(tmp_path)
        journal.path.write_bytes(data)
    assert not [said for said in found if said.startswith("WRONG")], found
    assert found["seen"] + found[JournalDamaged.__name__] > 0.99 * found.total()
    assert open_files() == files


@pytest.mark.parametrize("role", Role)
def test_wrong_bytes_in_one_of_version_1_end_in_an_error_of_ours(
    tmp_path: Path, role: Role
) -> None:
    """It has no checksums: what can be seen is seen, and the rest is never a traceback."""
    path = journal_path(tmp_path, ID, role)
    path.parent.mkdir()
    data = (V1 / ("c0ffee00" * 2) / path.name).read_bytes()
    settler = Settler(tmp_path, tmp_path / "work", Criu("none"))
    files = open_files()
    found: collections.Counter[str] = collections.Counter()
    step = 1 if os.environ.get("THOROUGH") else 37
    for wrong in mutations(data, len(data), step):
        path.write_bytes(wrong)
        found[verdict(settler)] += 1
        unsettled(tmp_path)
    assert found["JournalDamaged"] > 0.2 * found.total()
    assert open_files() == files


# -- a writer that dies ------------------------------------------------------------------------


def crashed(tmp_path: Path, records: int, size: int = 30) -> tuple[bytes, bytes, Contents]:
    """A file before its last append, and after, as a killed writer leaves it."""
    journal = Journal.create(tmp_path, ID, Role.SOURCE)
    journal.enter(State.ITERATING, text="x" * size)
    for number in range(records):
        journal.note(number=number, text="y" * size)
    before = journal.path.read_bytes()
    journal.enter(State.FROZEN, text="z" * size)
    after = journal.path.read_bytes()
    os.close(journal._fd)
    return before.ljust(len(after), b"\0"), after, decode(before)


@pytest.mark.parametrize(("records", "size"), [(1, 30), (3, 900), (1, STEP)])
def test_a_record_cut_short_at_any_byte_is_as_if_never_written(
    tmp_path: Path, records: int, size: int
) -> None:
    before, after, good = crashed(tmp_path, records, size)
    path = journal_path(tmp_path, ID, Role.SOURCE)
    end = len(after.rstrip(b"\0"))
    ends = {*range(good.end, min(good.end + 150, end)), *range(end - 150, end)}
    for cut in sorted(each for each in ends if each >= good.end):
        torn = after[:cut] + before[cut:]
        contents = decode(torn)
        assert contents.damage is None, cut
        assert contents.records == good.records
        if cut % 37 and cut < end - 3:
            continue
        path.write_bytes(torn)
        with Journal.open(tmp_path, ID, Role.SOURCE) as journal:
            assert journal.state is State.ITERATING
            journal.enter(State.ABORTING)
            assert examine(path).damage is None
        assert replay(read_records(tmp_path, ID, Role.SOURCE))[0] is State.ABORTING


def test_sectors_that_a_dead_host_did_not_write(tmp_path: Path) -> None:
    """Any of those that the last append is in: what went before stays, and it is no damage."""
    before, after, good = crashed(tmp_path, 2, 700)
    first, last = good.end // 512, len(after.rstrip(b"\0")) // 512
    assert last - first >= 2
    for kept in itertools.product([True, False], repeat=last - first + 1):
        data = bytearray(after)
        for number, keep in enumerate(kept, first):
            if not keep:
                data[number * 512 : number * 512 + 512] = before[number * 512 : number * 512 + 512]
        contents = decode(bytes(data))
        assert contents.damage is None, kept
        assert contents.records[: len(good.records)] == good.records
        assert len(contents.records) == len(good.records) + all(kept)


def test_a_sector_lost_of_what_had_reached_the_disk_is_damage(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, ID, Role.SOURCE)
    for state in FORWARD[:3]:
        journal.enter(state, text="x" * 700)
    begin = journal._end
    journal.note(text="y" * 2000)
    data = journal.path.read_bytes()
    os.close(journal._fd)
    # The note says what had been synced before it: if that is lost, too, nothing does.
    for number in {*range(len(data.rstrip(b"\0")) // 512 + 1)} - {begin // 512}:
        wrong = data[: number * 512] + bytes(512) + data[number * 512 + 512 :]
        contents = decode(wrong)
        states = [record["state"] for record in contents.records if "state" in record]
        assert contents.damage or states == ["iterating", "frozen", "prepared"], number
        assert contents.damage or number > begin // 512


def test_what_is_no_journal_yet(tmp_path: Path) -> None:
    path = journal_path(tmp_path, ID, Role.SOURCE)
    path.parent.mkdir()
    for data in (
        b"",
        bytes(STEP),
        bytes(100),
        HEADER.ljust(STEP, b"\0"),
        b"phaul".ljust(STEP, b"\0"),
    ):
        path.write_bytes(data)
        assert read_records(tmp_path, ID, Role.SOURCE) == []
        with Journal.open(tmp_path, ID, Role.SOURCE) as journal:
            assert journal.state is None
        assert read_records(tmp_path, ID, Role.SOURCE) == []
        with Journal.open(tmp_path, ID, Role.SOURCE) as journal:
            journal.enter(State.ITERATING)
        assert replay(read_records(tmp_path, ID, Role.SOURCE))[0] is State.ITERATING


def test_damage_that_no_crash_makes(tmp_path: Path) -> None:
    journal = build(tmp_path, Role.SOURCE, State.COMMITTING, DEAD)
    left = journal.path.read_bytes()
    journal.close()
    closed = journal.path.read_bytes()
    end = len(left.rstrip(b"\0"))
    lines = closed.splitlines(keepends=True)
    wrong = {
        "no newline but something else": left[: end - 1] + b"\v" + left[end:],
        "a record and more": left[: end - 1] + b"xyz" + left[end + 2 :],
        "something in the reserve": left[: end + 9] + b"x" + left[end + 10 :],
        "something after the mark": closed + b"x",
        "a record twice": b"".join([*lines[:3], lines[2], *lines[3:]]),
        "a record less": b"".join([*lines[:3], *lines[4:]]),
        "two records changed places": b"".join([*lines[:3], lines[4], lines[3], *lines[5:]]),
        "no mark": b"".join(lines[:-1]),
        "a mark that was overtaken": b"".join([*lines[:4], lines[-1]]),
        "another version": closed.replace(b":2\n", b":3\n"),
        "no first line": b"".join(lines[1:]),
        "text": b"hello\n",
        "zeros in the middle": left[:300] + bytes(20) + left[320:],
    }
    for name, data in wrong.items():
        assert decode(data).damage is not None, name
    # What follows the damage can be looked at.
    flipped = closed.replace(b"4711", b"4712", 1)
    contents = decode(flipped)
    assert [record["state"] for record in contents.later] == ["committing"]


def test_a_closing_mark_speaks_for_itself(tmp_path: Path) -> None:
    journal = build(tmp_path, Role.SOURCE, State.DONE, DEAD)
    journal.close()
    data = journal.path.read_bytes()
    begin = data.rfind(b"\n", 0, -1) + 1
    assert closed_state(data) is State.DONE
    assert closed_state(data[begin:]) is State.DONE
    for wrong in mutations(data[begin:], len(data) - begin):
        assert closed_state(wrong) is None


# -- what surveys journals ---------------------------------------------------------------------


GOOD, WAITING, BROKEN = "11" * 8, "22" * 8, "33" * 8


@pytest.fixture(name="state_dir")
def _state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One that is settled, one that waits, one that is damaged."""
    monkeypatch.setattr(config_module, "SYSTEM_CONFIG", tmp_path / "etc.yaml")
    state_dir = tmp_path / "state"
    (tmp_path / "etc.yaml").write_text(
        f"state_dir: {state_dir}\nworkdir: {tmp_path / 'work'}\ntransport: {{to: 'local://'}}\n"
    )
    for migration_id, last in ((GOOD, State.DONE), (BROKEN, State.PREPARED)):
        journal = build(state_dir, Role.SOURCE, last, DEAD)
        journal.close()
        (state_dir / ID).rename(state_dir / migration_id)
    with Journal.create(state_dir, WAITING, Role.SOURCE) as journal:
        journal.enter(State.ITERATING, engine="process", target="9")
    spoil(state_dir)
    return state_dir


def spoil(state_dir: Path) -> Path:
    """A state that there is not, in the middle."""
    path = journal_path(state_dir, BROKEN, Role.SOURCE)
    path.write_bytes(path.read_bytes().replace(b"frozen", b"frozeo"))
    return path


def run(*argv: str) -> Result:
    result = CliRunner().invoke(cli, argv, standalone_mode=False)
    assert result.exception is None or isinstance(result.exception, PhaulError), result.exception
    return result


def rows(*argv: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run(*argv, "--output", "json").stdout.splitlines()]


def test_status_names_it(state_dir: Path) -> None:
    shown = run("status")
    path = journal_path(state_dir, BROKEN, Role.SOURCE)
    assert shown.return_value is None
    (told,) = [line for line in shown.output.splitlines() if line.startswith(f"{BROKEN}: ")]
    assert told.startswith(f"{BROKEN}: {path} is damaged at byte ")
    assert told.endswith(f": phaul-runtime show {BROKEN}")
    found = {row["id"]: row for row in rows("status")}
    assert found.keys() == {WAITING, BROKEN}
    assert (found[BROKEN]["state"], found[BROKEN]["engine"]) == ("damaged", "process")
    assert "damage" not in found[WAITING]
    assert rows("status", BROKEN)[0]["damage"] in told


def test_history_names_it(state_dir: Path) -> None:
    told = run("history").output.splitlines()
    assert len(told) == 5
    assert f"{BROKEN}: {state_dir / BROKEN}/source.journal is damaged at byte" in told[-1]
    assert {row["id"]: row["state"] for row in rows("history")} == {
        GOOD: "done", WAITING: "iterating", BROKEN: "damaged",
    }  # fmt: skip


def test_show_shows_what_can_be_read(state_dir: Path) -> None:
    told = run("show", BROKEN).output.splitlines()
    assert [line.split()[2] for line in told if "  20" in line] == ["iterating", "note", "prepared"]
    assert f"  {state_dir / BROKEN}/source.journal is damaged at byte" in told[3]
    (row,) = rows("show", BROKEN)
    assert [record.get("state") for record in row["source"]] == ["iterating", None]
    assert "is damaged" in row["damage"]["source"]
    assert row["later"]["source"][0]["state"] == "prepared"
    assert "damage" not in rows("show", GOOD)[0]
    with pytest.raises(NoSuchMigration):
        raise run("show", ID).exception or AssertionError


def test_recover_settles_the_others(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def recover(_: object, migration_id: str) -> Any:
        asked.append(migration_id)
        raise JournalDamaged("as if")

    workdir = state_dir.parent / "work"
    for name in (BROKEN, f"out-{BROKEN}", f"out-{GOOD}"):
        (workdir / name).mkdir(parents=True)
    with monkeypatch.context() as patched:
        patched.setattr("phaul_runtime.recovery.Recovery.recover", recover)
        result = run("recover")
    assert result.return_value == ExitCode.UNKNOWN
    assert asked == [WAITING]
    assert f"{BROKEN}: {state_dir / BROKEN}/source.journal is damaged at byte" in result.stderr
    assert f"phaul-runtime show {BROKEN}" in result.stderr
    # Its images may be all that is left.
    assert sorted(path.name for path in workdir.iterdir()) == [BROKEN, f"out-{BROKEN}"]
    found = run("recover", BROKEN).exception
    assert isinstance(found, JournalDamaged)
    assert found.exit_code == ExitCode.UNKNOWN


def test_hello_and_check_name_it(state_dir: Path) -> None:
    workdir = state_dir.parent / "work"
    (line, _) = sorted(leftovers.find(workdir, state_dir), key=lambda line: BROKEN not in line)
    facts = gather_facts(str(workdir), str(state_dir), Criu("no-such-criu"))
    assert line in facts.leftovers
    findings = compare_hosts(facts, facts, ("here", "there"))
    texts = [each.finding for each in findings if each.finding.text == line]
    assert [finding.level for finding in texts] == [WARNING, WARNING]


def test_it_is_never_forgotten(state_dir: Path) -> None:
    for _ in range(2):
        forget_old(state_dir, 1)
        assert set(migration_ids(state_dir)) >= {WAITING, BROKEN}


def test_a_move_asked_for_again_is_not_made_again(state_dir: Path) -> None:
    config = load_config(None, {"engine": "process"})
    asked = {"engine": "process", "target": "1", "to": "ssh://root@b"}
    path = journal_path(state_dir, BROKEN, Role.SOURCE)
    with once.claimed(state_dir, BROKEN, wait_s=0), pytest.raises(JournalDamaged):
        once.settled_before(config, BROKEN, asked)
    assert path.exists()
    # A journal that lost all that it said, beside a report of what was done.
    (state_dir / GOOD / "report.json").write_text('{"result": "moved"}')
    path = journal_path(state_dir, GOOD, Role.SOURCE)
    for spoiled in (b"", bytes(STEP), None):
        if spoiled is None:
            path.unlink()
        else:
            path.write_bytes(spoiled)
        with (
            once.claimed(state_dir, GOOD, wait_s=0),
            pytest.raises(JournalDamaged, match="the report beside it says moved"),
        ):
            once.settled_before(config, GOOD, asked)


@pytest.mark.parametrize("data", [b"\xff\xfe", b"[" * 100_000, b"[1]", b'{"iterations": 7}', b""])
def test_wrong_bytes_beside_a_journal(state_dir: Path, data: bytes) -> None:
    (state_dir / GOOD / "report.json").write_bytes(data)
    (state_dir / WAITING / "source.progress").write_bytes(data)
    for argv in (["status"], ["history"], ["show", GOOD], ["status", WAITING]):
        assert run(*argv).exception is None
    config = load_config(None, {"engine": "process"})
    (state_dir / GOOD / "report.json").write_bytes(b'{"result": "moved", "iterations": [7]}')
    report = once.settled_before(
        config, GOOD, {"engine": "process", "target": "1", "to": "ssh://root@b"}
    )
    assert report is not None
    assert report.restored_pid == 4711


def test_one_that_the_disk_does_not_give(state_dir: Path) -> None:
    path = journal_path(state_dir, BROKEN, Role.SOURCE)
    path.unlink()
    path.mkdir()
    with pytest.raises(JournalDamaged, match="cannot be read: Is a directory"):
        read_records(state_dir, BROKEN, Role.SOURCE)
    with pytest.raises(JournalDamaged, match="cannot be read: Is a directory"):
        Journal.open(state_dir, BROKEN, Role.SOURCE)
    assert len(rows("status")) == 2


def test_one_that_is_being_written_is_read_again(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = journal_path(state_dir, WAITING, Role.SOURCE)
    good = path.read_bytes()
    seen = iter([good[:-5], good])
    monkeypatch.setattr(Path, "read_bytes", lambda _: next(seen))
    assert examine(path).damage is None


def test_damage_arrives_from_the_other_host_as_such() -> None:
    error = from_wire(to_wire(JournalDamaged("f is damaged", hint="look")), "b")
    assert isinstance(error, JournalDamaged)
    assert str(error) == "b: f is damaged\n    hint: look"


# -- facts that are of no use ------------------------------------------------------------------


@pytest.mark.parametrize(
    "spoil_facts",
    [
        lambda facts: facts.pop("engine"),
        lambda facts: facts.update(identity=7),
        lambda facts: facts.update(identity={"members": [[1]]}),
        lambda facts: facts.update(identity={"members": [["x", 1]]}),
        lambda facts: facts.update(options=[]),
        lambda facts: facts.update(hold={"group": 1}),
    ],
)
def test_facts_of_no_use_are_damage(
    tmp_path: Path, spoil_facts: Callable[[dict[str, Any]], object]
) -> None:
    facts = {"engine": "process", "target": "1", "options": {}, "identity": {"members": LIVE}}
    spoil_facts(facts)
    with Journal.create(tmp_path, ID, Role.SOURCE) as journal:
        journal.enter(State.ITERATING, **facts)
    settler = Settler(tmp_path, tmp_path / "work", Criu("none"))
    files = open_files()
    with pytest.raises(JournalDamaged, match="a fact is missing or of no use"):
        settler.look(ID, Role.SOURCE)
    with pytest.raises(JournalDamaged):
        settler.settle(ID, Role.SOURCE, Verdict.DISCARD)
    assert open_files() == files


@pytest.mark.parametrize("post_copy", [False, True])
def test_facts_of_no_use_at_the_destination(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, post_copy: bool
) -> None:
    monkeypatch.setattr(incoming_module, "load_engine", lambda _: _Engine)
    with Journal.create(tmp_path, ID, Role.DESTINATION) as journal:
        journal.enter(State.ITERATING, engine="process", options={}, post_copy=post_copy)
        journal.enter(State.FROZEN)
        journal.enter(State.PREPARED)
        journal.enter(State.COMMITTING)
        journal.enter(State.POST_COPY)
    settler = Settler(tmp_path, tmp_path / "work", Criu("none"))
    files = open_files()
    with pytest.raises(JournalDamaged, match="lost_s"):
        settler.settle(ID, Role.DESTINATION, Verdict.RUN)
    assert open_files() == files


def test_a_damaged_end_keeps_the_directories_of_the_other(tmp_path: Path) -> None:
    """Both ends are on this host; one is settled while the other cannot be read."""
    build(tmp_path, Role.SOURCE, State.ITERATING, LIVE).close()
    path = build(tmp_path, Role.DESTINATION, State.PREPARED, LIVE).path
    path.write_bytes(path.read_bytes().replace(b"frozen", b"frozeo"))
    images = tmp_path / "work" / ID
    images.mkdir(parents=True)
    settler = Settler(tmp_path, tmp_path / "work", Criu("none"))
    with pytest.raises(PhaulError):
        settler.settle(ID, Role.DESTINATION, Verdict.DISCARD)
    settler._tidy(ID)
    assert images.exists()
    assert leftovers.sweep(tmp_path / "work", tmp_path) == []
