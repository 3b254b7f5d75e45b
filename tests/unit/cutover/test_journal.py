"""A journal: written, read again, and what is done with many of them."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from phaul_runtime.cutover import journal as journal_module
from phaul_runtime.cutover import journal_file, orphans
from phaul_runtime.cutover.journal import (
    Journal,
    forget_old,
    journal_path,
    lock_directory,
    migration_ids,
    read_records,
    replay,
    state_of,
    unsettled,
)
from phaul_runtime.cutover.journal_format import HEADER, STEP, Contents
from phaul_runtime.cutover.states import Role, State
from phaul_runtime.errors import JournalDamaged, MigrationFailed, NoSuchMigration, StillUnderWay

ID = "1f" * 8
FORWARD = [State.ITERATING, State.FROZEN, State.PREPARED, State.COMMITTING, State.DONE]
V1 = Path(__file__).parent / "journals" / "v1"
V1_ID = "c0ffee00" * 2


def on_disk(journal: Journal) -> State | None:
    """What another process reads."""
    return replay(read_records(journal.path.parents[1], journal.id, journal.role))[0]


def test_a_journal_is_read_again_as_it_was_written(tmp_path: Path) -> None:
    with Journal.create(tmp_path, ID, Role.SOURCE) as journal:
        journal.enter(State.ITERATING, engine="process", target="7")
        journal.add("staged", "/a", "/b")
        journal.add("staged", "/ü")
        journal.note(target="8")
        with pytest.raises(StillUnderWay):
            Journal.open(tmp_path, ID, Role.SOURCE, wait_s=0)
        # As after a SIGKILL: the reserve still follows the records.
        assert replay(read_records(tmp_path, ID, Role.SOURCE))[0] is State.ITERATING
        assert unsettled(tmp_path) == []
    assert unsettled(tmp_path) == [(ID, Role.SOURCE, State.ITERATING)]
    with Journal.open(tmp_path, ID, Role.SOURCE) as journal:
        assert journal.state is State.ITERATING
        assert journal.facts["target"] == "8"
        assert journal.facts["staged"] == ["/a", "/b", "/ü"]
        journal.enter(State.FROZEN)
    state, facts = replay(read_records(tmp_path, ID, Role.SOURCE))
    assert (state, facts["engine"]) == (State.FROZEN, "process")
    assert (tmp_path / ID).stat().st_mode & 0o777 == 0o700
    assert (tmp_path / ID / "source.journal").stat().st_mode & 0o777 == 0o600
    with pytest.raises(NoSuchMigration):
        Journal.open(tmp_path, ID, Role.DESTINATION)
    with pytest.raises(MigrationFailed):
        Journal.create(tmp_path, ID, Role.SOURCE)


def test_the_last_steps_fit_into_a_full_disk(tmp_path: Path) -> None:
    with Journal.create(tmp_path, ID, Role.SOURCE) as journal:
        reserved = journal.path.stat()
        for state in FORWARD:
            journal.enter(state)
        assert journal.path.stat().st_blocks == reserved.st_blocks
        assert reserved.st_blocks * 512 >= 32 << 10


def test_old_settled_migrations_are_forgotten(tmp_path: Path) -> None:
    for number in range(5):
        with Journal.create(tmp_path, f"{number:08x}", Role.SOURCE) as journal:
            journal.enter(State.ITERATING)
            if number:
                journal.enter(State.ABORTING)
                journal.enter(State.ABORTED)
    forget_old(tmp_path, 2)
    assert migration_ids(tmp_path) == ["00000000", "00000003", "00000004"]


def test_leftovers_are_what_nobody_works_in(tmp_path: Path) -> None:
    workdir, state_dir = tmp_path / "work", tmp_path / "state"
    assert orphans.find(workdir, state_dir) == []
    for name in (f"out-{ID}", f"agent-{ID}", "else"):
        (workdir / name).mkdir(parents=True)
        os.utime(workdir / name, (0, 0))
    lock = lock_directory(workdir / f"agent-{ID}")
    with Journal.create(state_dir, "2e" * 8, Role.DESTINATION) as journal:
        journal.enter(State.ITERATING)
        assert [line.split()[0] for line in orphans.find(workdir, state_dir)] == [
            f"{workdir}/out-{ID}"
        ]
    assert "phaul-runtime recover 2e2e2e2e" in orphans.find(workdir, state_dir)[0]
    assert orphans.sweep(workdir, state_dir) == [workdir / f"out-{ID}"]
    os.close(lock)
    assert orphans.sweep(workdir, state_dir) == [workdir / f"agent-{ID}"]
    assert [path.name for path in workdir.iterdir()] == ["else"]


def settled(state_dir: Path, number: int, role: Role = Role.DESTINATION) -> str:
    migration_id = f"{number:08x}"
    with Journal.create(state_dir, migration_id, role) as journal:
        for state in (State.ITERATING, State.ABORTING, State.ABORTED):
            journal.enter(state, manifest="x" * 500)
    return migration_id


def test_of_settled_journals_only_the_end_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state_dir = tmp_path / "state"
    # The disk is not what this is about.
    monkeypatch.setattr(os, "fdatasync", lambda _: None)
    monkeypatch.setattr(journal_module, "sync_directory", lambda _: None)
    first = settled(state_dir, 0)
    for number in range(1, 2000):
        shutil.copytree(state_dir / first, state_dir / f"{number:08x}")
    read: list[int] = []
    whole: list[Path] = []

    def examine(path: Path, real: Callable[[Path], Contents] = journal_module.examine) -> Contents:
        whole.append(path.parent)
        return real(path)

    monkeypatch.setattr(journal_module, "examine", examine)

    def pread(fd: int, size: int, offset: int, real: Callable[..., bytes] = os.pread) -> bytes:
        read.append(size)
        return real(fd, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    (tmp_path / "work" / f"agent-{first}").mkdir(parents=True)
    found = orphans.find(tmp_path / "work", state_dir)
    assert found == [f"{tmp_path}/work/agent-{first} belongs to nobody: phaul-runtime recover"]
    assert (len(read), max(read)) == (2000, 256)
    # Of one whose directory is still there.
    assert set(whole) == {state_dir / first}
    assert unsettled(state_dir) == []


def test_one_that_was_settled_and_not_closed_is_read_whole(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, ID, Role.SOURCE)
    for state in FORWARD:
        journal.enter(state)
    assert state_of(journal.path) is State.DONE
    journal.close()
    assert state_of(journal.path) is State.DONE
    with Journal.open(tmp_path, ID, Role.SOURCE) as again:
        assert state_of(again.path) is State.DONE
        again.note(late=1)
        assert state_of(again.path) is State.DONE
    assert state_of(journal.path) is State.DONE


def test_what_somebody_works_on_is_not_forgotten(tmp_path: Path) -> None:
    for number in range(3):
        settled(tmp_path, number)
    with Journal.open(tmp_path, "00000000", Role.DESTINATION):
        forget_old(tmp_path, 1)
        assert migration_ids(tmp_path) == ["00000000", "00000002"]
    forget_old(tmp_path, 1)
    assert migration_ids(tmp_path) == ["00000002"]
    forget_old(tmp_path / "nowhere", 1)


# -- what a file has, and when -----------------------------------------------------------------


def test_the_size_of_a_file(tmp_path: Path) -> None:
    with Journal.create(tmp_path, ID, Role.SOURCE) as journal:
        assert journal.path.read_bytes() == bytes(STEP)
        assert on_disk(journal) is None
        journal.enter(State.ITERATING)
        assert journal.path.stat().st_size == STEP
        journal.note(large="x" * STEP)
        assert journal.path.stat().st_size == 2 * STEP
        # There is room for what follows, whatever else fills the disk.
        assert journal.path.stat().st_blocks * 512 >= 2 * STEP
    closed = journal.path.read_bytes()
    assert closed.startswith(HEADER)
    assert closed.endswith(b"}\n")
    with Journal.open(tmp_path, ID, Role.SOURCE) as journal:
        assert journal.path.stat().st_size == 2 * STEP
    # One that only looked leaves it as it was.
    assert journal.path.read_bytes() == closed
    with Journal.open(tmp_path, ID, Role.SOURCE) as journal:
        journal.enter(State.FROZEN)
        assert b"closed" not in journal.path.read_bytes()
    assert on_disk(journal) is State.FROZEN
    assert len(closed) < journal.path.stat().st_size < 2 * STEP
    Journal.create(tmp_path, "2e" * 8, Role.SOURCE).close()
    assert journal_path(tmp_path, "2e" * 8, Role.SOURCE).read_bytes() == b""


def test_a_disk_without_room_gives_a_size_at_least(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Journal.create(tmp_path, ID, Role.SOURCE) as journal:
        journal.enter(State.ITERATING)

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with Journal.open(tmp_path, ID, Role.SOURCE) as journal:
        assert journal.path.stat().st_size == STEP
        journal.enter(State.FROZEN)
        assert on_disk(journal) is State.FROZEN
    with pytest.raises(MigrationFailed, match="No space left"):
        Journal.create(tmp_path, "2e" * 8, Role.SOURCE)
    assert not journal_path(tmp_path, "2e" * 8, Role.SOURCE).exists()


# -- a disk that takes a part, or nothing ------------------------------------------------------


@contextmanager
def disk(monkeypatch: pytest.MonkeyPatch, room: int, at_once: int = 1 << 20) -> Iterator[None]:
    """One that takes `room` more bytes, and no more than `at_once` in one call."""
    real, left = os.pwrite, [room]

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        if not any(data):
            return real(fd, data, offset)  # blocks that are there already
        if not left[0]:
            raise OSError(28, "No space left on device")
        done = real(fd, data[: min(left[0], at_once)], offset)
        left[0] -= done
        return done

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", pwrite)
        yield


def test_a_write_that_comes_up_short_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with disk(monkeypatch, 1 << 20, at_once=1), Journal.create(tmp_path, ID, Role.SOURCE) as one:
        for state in FORWARD:
            one.enter(state)
            assert on_disk(one) is state
    assert state_of(one.path) is State.DONE


@pytest.mark.parametrize("wiped", [True, False])
def test_a_record_that_has_no_room_was_never_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wiped: bool
) -> None:
    with Journal.create(tmp_path, ID, Role.SOURCE) as journal:
        for state in FORWARD[:3]:
            journal.enter(state)
        before = journal._end, dict(journal.facts), list(journal.records)
        if not wiped:
            monkeypatch.setattr(journal_file.JournalFile, "_wipe", lambda _: None)
        room = 0
        while True:
            with disk(monkeypatch, room):
                try:
                    journal.enter(State.COMMITTING, hold={"pids": [1, 2, 3]})
                    break
                except MigrationFailed as error:
                    assert "No space left on device" in error.message  # noqa: PT017
            assert journal.state is State.PREPARED
            assert (journal._end, journal.facts, journal.records) == before
            assert on_disk(journal) is State.PREPARED
            assert wiped is not any(journal.path.read_bytes()[journal._end :]) or not room
            room += 1
        assert room > 60
        assert on_disk(journal) is State.COMMITTING
        # A shorter one after a part of a longer one, and that is all.
        with disk(monkeypatch, 80), pytest.raises(MigrationFailed):
            journal.note(long="y" * 200)
        journal.note(s=1)
        assert read_records(tmp_path, ID, Role.SOURCE)[-1] == journal.records[-1]
        assert not any(journal.path.read_bytes()[journal._end :])
        with disk(monkeypatch, 80), pytest.raises(MigrationFailed):
            journal.note(long="y" * 200)
    with Journal.open(tmp_path, ID, Role.SOURCE) as journal:
        assert (journal.state, journal.facts["s"]) == (State.COMMITTING, 1)


def test_nothing_is_written_where_zero_bytes_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Journal.create(tmp_path, ID, Role.SOURCE) as journal:
        monkeypatch.setattr(os, "pwrite", lambda *_: 0)
        with pytest.raises(MigrationFailed, match="No space left"):
            journal.enter(State.ITERATING)
        assert journal.state is None
    monkeypatch.undo()
    assert on_disk(journal) is None


def test_one_that_cannot_be_synced_was_not_entered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: int) -> None:
        raise OSError(5, "Input/output error")

    with Journal.create(tmp_path, ID, Role.SOURCE) as journal:
        journal.enter(State.ITERATING, target="7")
        with monkeypatch.context() as patched:
            patched.setattr(os, "fdatasync", broken)
            with pytest.raises(MigrationFailed, match="Input/output error"):
                journal.enter(State.FROZEN, target="8")
        assert (journal.state, journal.facts["target"]) == (State.ITERATING, "7")
        assert on_disk(journal) is State.ITERATING
        journal.enter(State.ABORTING)
    assert on_disk(journal) is State.ABORTING


def test_a_file_may_not_grow(tmp_path: Path) -> None:
    with Journal.create(tmp_path, ID, Role.SOURCE) as journal:
        for state in FORWARD[:3]:
            journal.enter(state)
    size = journal.path.stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for room in range(0, 120, 7):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, before[1]))
            with Journal.open(tmp_path, ID, Role.SOURCE) as journal:
                with pytest.raises(MigrationFailed, match="File too large"):
                    journal.enter(State.COMMITTING)
                assert journal.state is State.PREPARED
            assert on_disk(journal) is State.PREPARED
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    with Journal.open(tmp_path, ID, Role.SOURCE) as journal:
        journal.enter(State.COMMITTING)
    assert on_disk(journal) is State.COMMITTING


# -- what the version before wrote -------------------------------------------------------------


@pytest.fixture(name="old")
def _old(tmp_path: Path) -> Path:
    shutil.copytree(V1, tmp_path / "state")
    return tmp_path / "state"


def test_journals_of_version_1_are_read(old: Path) -> None:
    state, facts = replay(read_records(old, V1_ID, Role.SOURCE))
    assert state is State.DONE
    assert (facts["pid"], facts["downtime_ms"]) == (991, 412.625)
    assert facts["staged"] == ["layer", "volume-data", "image"]
    assert facts["throttle"] is None
    assert len(facts["identity"]["members"]) == 3
    state, facts = replay(read_records(old, V1_ID, Role.DESTINATION))
    assert state is State.PREPARED
    assert facts["manifest"]["image"] == "registry.example/größe:1.2"
    assert facts["manifest"]["facts"]["Config"]["Env"][1] == "GREETING=hello world"
    assert facts["replaced"] == [["/srv/d0/ünï", True], ["/srv/d1/b", False]]
    assert facts["made"] == ["/srv/d0", "/srv/d1", "/srv/d2"]
    assert unsettled(old) == [(V1_ID, Role.DESTINATION, State.PREPARED)]


@pytest.mark.parametrize("reserve", [0, STEP])
def test_one_of_version_1_is_gone_on_with_in_version_1(old: Path, reserve: int) -> None:
    path = journal_path(old, V1_ID, Role.DESTINATION)
    before = path.read_bytes()
    path.write_bytes(before.ljust(reserve, b"\0"))
    with Journal.open(old, V1_ID, Role.DESTINATION) as journal:
        assert path.stat().st_size == STEP
        journal.enter(State.COMMITTING)
        assert on_disk(journal) is State.COMMITTING
        journal.enter(State.DONE)
    after = path.read_bytes()
    assert after.startswith(before)
    lines = after[len(before) :].splitlines()
    assert [line.split(b",")[1] for line in lines] == [b'"state":"committing"}', b'"state":"done"}']
    assert state_of(path) is State.DONE
    assert unsettled(old) == []


def test_one_of_version_1_that_was_cut_short(old: Path) -> None:
    path = journal_path(old, V1_ID, Role.DESTINATION)
    whole = path.read_bytes()
    begin = whole.rfind(b"\n", 0, -1) + 1
    for end in range(begin, len(whole)):
        path.write_bytes(whole[:end])
        # Only the end of line may be missing from a whole record.
        assert state_of(path) is (State.PREPARED if end == len(whole) - 1 else State.FROZEN)
        with Journal.open(old, V1_ID, Role.DESTINATION) as journal:
            journal.enter(State.ABORTING)
        assert state_of(path) is State.ABORTING


@pytest.mark.parametrize(
    ("old_text", "new_text"),
    [
        (b'"state":"frozen"', b'"state":"frozeo"'),
        (b'"state":"frozen"', b'"state":["frozen"]'),
        (b'"add":{"made"', b'"add":["made"'),
        (b'"add":{"made":["/srv/d1"]}', b'"add":{"made":"/srv/d1"}'),
        (b'"add":{"made":["/srv/d1"]}', b'"made":"/srv/d1"'),
        (b'{"time":1790000003', b'{"tine":1790000003'),
        (b'{"time":1790000003', b'{"time":true'),
        (b'{"time":1790000003', b'{"time":1e300,"x":1790000003'),
        (b'"state":"prepared"', b'"state":prepared"'),
        (b"991}\n", b"991}\v"),
        (b'{"time":1790000002', b'z"time":1790000002'),
        (b'"log_level":4', b'"log_level":\xff'),
        (b'"log_level":4', b'"log_level":\0'),
        (b'"log_level":4', b'"log_level":' + b"[" * 100_000),
    ],
)
def test_damage_to_one_of_version_1(old: Path, old_text: bytes, new_text: bytes) -> None:
    path = journal_path(old, V1_ID, Role.DESTINATION)
    data = path.read_bytes()
    assert old_text in data
    path.write_bytes(data.replace(old_text, new_text))
    with pytest.raises(JournalDamaged, match=f"{path} is damaged at byte "):
        read_records(old, V1_ID, Role.DESTINATION)
    with pytest.raises(JournalDamaged):
        Journal.open(old, V1_ID, Role.DESTINATION)
    assert unsettled(old) == []


def test_a_sector_lost_from_one_of_version_1(old: Path) -> None:
    path = journal_path(old, V1_ID, Role.DESTINATION)
    data = path.read_bytes()
    for begin in (0, 512):
        path.write_bytes(data[:begin] + bytes(512) + data[begin + 512 :])
        with pytest.raises(JournalDamaged, match=r"at byte 0: .*, and others follow it"):
            read_records(old, V1_ID, Role.DESTINATION)
    # In the last record it may be one that the host did not live to write.
    last = data + b'{"time":1790000006,"text":"' + b"x" * 1500 + b'"}\n'
    path.write_bytes(last[:2048] + bytes(512) + last[2560:])
    assert replay(read_records(old, V1_ID, Role.DESTINATION))[0] is State.PREPARED
