"""Journals with wrong bytes: no other state and no traceback follows from them."""

from __future__ import annotations

import collections
import itertools
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from phaul_runtime.criu.session import Criu
from phaul_runtime.cutover import journal as journal_module
from phaul_runtime.cutover import orphans
from phaul_runtime.cutover.journal import (
    Journal,
    examine,
    journal_path,
    read_records,
    replay,
    unsettled,
)
from phaul_runtime.cutover.journal_format import HEADER, STEP, Contents, closed_state, decode
from phaul_runtime.cutover.states import Role, State, Verdict, decide
from phaul_runtime.engine import interface
from phaul_runtime.errors import JournalDamaged, PhaulError
from phaul_runtime.recovery.resolve import Settler
from tests.movejournals import (
    DEAD,
    FORWARD,
    ID,
    LIVE,
    ProcessesEngine,
    build,
    open_files,
    processes,
)

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


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "load_engine", lambda _: ProcessesEngine)
    # The disk is not what this is about.
    monkeypatch.setattr(os, "fdatasync", lambda _: None)
    monkeypatch.setattr(journal_module, "sync_directory", lambda _: None)


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
    settler = Settler(tmp_path, tmp_path / "work", Criu("none"), engines=processes)
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
    settler = Settler(tmp_path, tmp_path / "work", Criu("none"), engines=processes)
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
    settler = Settler(tmp_path, tmp_path / "work", Criu("none"), engines=processes)
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
    with Journal.create(tmp_path, ID, Role.DESTINATION) as journal:
        journal.enter(State.ITERATING, engine="process", options={}, post_copy=post_copy)
        journal.enter(State.FROZEN)
        journal.enter(State.PREPARED)
        journal.enter(State.COMMITTING)
        journal.enter(State.POST_COPY)
    settler = Settler(tmp_path, tmp_path / "work", Criu("none"), engines=processes)
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
    settler = Settler(tmp_path, tmp_path / "work", Criu("none"), engines=processes)
    with pytest.raises(PhaulError):
        settler.settle(ID, Role.DESTINATION, Verdict.DISCARD)
    settler._tidy(ID)
    assert images.exists()
    assert orphans.sweep(tmp_path / "work", tmp_path) == []
