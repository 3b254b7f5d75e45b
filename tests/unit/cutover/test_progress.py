"""How far an end is: a file beside the journal that confuses nobody and is forgotten with it."""

from __future__ import annotations

from pathlib import Path

from phaul_runtime.cutover import orphans
from phaul_runtime.cutover.journal import (
    Journal,
    forget_old,
    migration_ids,
    read_records,
    read_report,
    unsettled,
)
from phaul_runtime.cutover.progress import (
    forget_progress,
    progress_path,
    read_progress,
    write_progress,
)
from phaul_runtime.cutover.states import Role, State

ID = "1f" * 8


def test_what_was_said_last_is_read(tmp_path: Path) -> None:
    assert read_progress(tmp_path, ID, Role.SOURCE) == {}
    Journal.create(tmp_path, ID, Role.SOURCE).close()
    for missing in (5, 3):
        write_progress(tmp_path, ID, Role.SOURCE, pages=10, missing=missing)
    write_progress(tmp_path, ID, Role.DESTINATION, pages=10, missing=4)
    assert read_progress(tmp_path, ID, Role.SOURCE) == {"pages": 10, "missing": 3}
    assert read_progress(tmp_path, ID, Role.DESTINATION) == {"pages": 10, "missing": 4}
    # Nothing else is left of the writing.
    assert sorted(path.name for path in (tmp_path / ID).iterdir()) == [
        "destination.progress", "source.journal", "source.progress",
    ]  # fmt: skip
    for _ in range(2):
        forget_progress(tmp_path, ID, Role.SOURCE)
    assert read_progress(tmp_path, ID, Role.SOURCE) == {}
    assert read_progress(tmp_path, ID, Role.DESTINATION)


def test_it_is_a_convenience(tmp_path: Path) -> None:
    # Nothing was begun: nothing is made, nothing is raised.
    write_progress(tmp_path, ID, Role.SOURCE, pages=1)
    assert list(tmp_path.iterdir()) == []
    Journal.create(tmp_path, ID, Role.SOURCE).close()
    path = progress_path(tmp_path, ID, Role.SOURCE)
    for torn in (b"", b'{"pages": 1', b"[1]", b"\xff"):
        path.write_bytes(torn)
        assert read_progress(tmp_path, ID, Role.SOURCE) == {}
    path.unlink()
    path.mkdir()
    write_progress(tmp_path, ID, Role.SOURCE, pages=1)
    assert read_progress(tmp_path, ID, Role.SOURCE) == {}
    forget_progress(tmp_path, ID, Role.SOURCE)
    assert sorted(each.name for each in (tmp_path / ID).iterdir()) == [
        "source.journal", "source.progress",
    ]  # fmt: skip


def test_a_reader_never_sees_half_of_it(tmp_path: Path) -> None:
    Journal.create(tmp_path, ID, Role.SOURCE).close()
    write_progress(tmp_path, ID, Role.SOURCE, pages=1)
    with progress_path(tmp_path, ID, Role.SOURCE).open() as reader:
        write_progress(tmp_path, ID, Role.SOURCE, pages=2)
        assert reader.read() == '{"pages": 1}'


def test_journals_are_read_as_without_it(tmp_path: Path) -> None:
    for number in range(4):
        migration_id = f"{number:08x}"
        with Journal.create(tmp_path, migration_id, Role.SOURCE) as journal:
            journal.enter(State.ITERATING)
            if number:
                journal.enter(State.ABORTING)
                journal.enter(State.ABORTED)
        for role in Role:
            write_progress(tmp_path, migration_id, role, pages=9, missing=number)
    assert len(read_records(tmp_path, "00000000", Role.SOURCE)) == 1
    assert read_records(tmp_path, "00000000", Role.DESTINATION) == []
    assert read_report(tmp_path, "00000000") is None
    assert unsettled(tmp_path) == [("00000000", Role.SOURCE, State.ITERATING)]
    assert len(orphans.find(tmp_path / "work", tmp_path)) == 1
    forget_old(tmp_path, 1)
    assert migration_ids(tmp_path) == ["00000000", "00000003"]
    assert not (tmp_path / "00000001").exists()
