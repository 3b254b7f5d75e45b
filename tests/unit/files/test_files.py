"""Files of a target: facts, comparison, carrying."""

from __future__ import annotations

import io
import itertools
import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phaul_runtime.cutover.journal import Journal
from phaul_runtime.cutover.states import Role, State
from phaul_runtime.engine.targets import FileFact
from phaul_runtime.errors import DestinationError
from phaul_runtime.files.compare import Look, Use, build_id, compare, gather
from phaul_runtime.files.in_use import changed_since
from phaul_runtime.files.placing import Place
from phaul_runtime.files.staged_files import BLOCK, FilePart, FileSender, FileStage

NewJournal = Callable[[], Journal]


def fact_of(path: Path, *, written: bool = False, shared_map: bool = False) -> FileFact:
    fact = gather(str(path), use=Use(written=written, shared_map=shared_map))
    assert fact is not None
    return fact


def verdict(fact: FileFact) -> tuple[str, bool]:
    found = compare([fact])
    return (found[0].reason, found[0].copyable) if found else ("", True)


def program(path: Path, build: str) -> None:
    subprocess.run(
        ["gcc", "-xc", "-", f"-Wl,--build-id=0x{build}", "-o", str(path)],
        input=b"int main(void) { return 0; }", check=True, timeout=60,
    )  # fmt: skip


def test_build_ids_are_read_and_another_build_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "program"
    program(path, "deadbeef")
    with path.open("rb") as file:
        assert build_id(file) == "deadbeef"
    fact = fact_of(path, written=True)
    assert verdict(fact) == ("", True)
    program(path, "cafe")
    reason, copyable = verdict(fact)
    assert "build-id cafe, here deadbeef" in reason
    assert not copyable
    path.unlink()
    assert verdict(fact) == ("file is missing there", True)


def test_data_files_are_compared_by_contents_and_mode(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_text("one")
    fact = fact_of(path, written=True)
    assert not compare([fact])
    path.write_text("two")
    assert verdict(fact) == ("has other contents there", True)
    path.write_text("three")
    assert verdict(fact) == ("has 5 bytes there, 3 here", True)
    path.write_text("one")
    path.chmod(0o600)
    assert "mode 600 there" in verdict(fact)[0]
    path.unlink()
    path.mkdir()
    assert verdict(fact) == ("is no file there", False)


@pytest.mark.parametrize("how", [Use(), Use(path_only=True)])
def test_what_a_target_only_reads_is_carried_where_it_is_missing_and_never_replaced(
    tmp_path: Path, new_journal: NewJournal, how: Use
) -> None:
    path = tmp_path / "data"
    path.write_text("theirs")
    fact = gather(str(path), use=how)
    assert fact is not None
    parts = list(FileSender([fact], [str(path)]).first())
    path.write_text("precious")
    reason, copyable = verdict(fact)
    assert "bytes there" in reason
    assert not copyable
    with pytest.raises(DestinationError, match="only reads it"):
        feed(FileStage(new_journal()), parts)
    assert path.read_text() == "precious"
    path.unlink()
    assert verdict(fact)[1] is not how.path_only


@pytest.mark.parametrize(
    "name", ["n" * 255, "\N{GREEK SMALL LETTER PHI}" * 127, "line\nfeed", "esc\x1b[31m", "a\\b"]
)
def test_any_name_is_carried_and_put_back(
    tmp_path: Path, new_journal: NewJournal, name: str
) -> None:
    path = tmp_path / name
    path.write_text("carried")
    parts = list(FileSender([fact_of(path, written=True)], [str(path)]).first())
    path.write_text("precious")
    stage = FileStage(new_journal())
    feed(stage, parts)
    stage.install()
    assert path.read_text() == "carried"
    stage.undo()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(name, "precious")]


def test_two_long_names_that_begin_alike_are_staged_apart(tmp_path: Path) -> None:
    names = {Place(str(tmp_path / ("n" * 254 + end))).beside(".phaul-1.new") for end in "ab"}
    assert len(names) == 2
    assert all(len(os.fsencode(name)) <= 255 for name in names)


def test_of_many_large_files_only_so_much_is_read(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(bytes(10))
    look = Look(left=15)
    facts = [gather(str(tmp_path / name), look=look) for name in ("one", "two")]
    assert [bool(fact and fact.digest) for fact in facts] == [True, False]
    assert facts[1] is not None
    assert not compare([facts[1]])  # by size and time then
    (tmp_path / "two").write_bytes(bytes(10))
    os.utime(tmp_path / "two", ns=(1, 1))
    assert "too large" in verdict(facts[1])[0]


def test_a_program_that_lies_about_its_notes_is_read_within_bounds(tmp_path: Path) -> None:
    path = tmp_path / "program"
    program(path, "deadbeef")
    data = bytearray(path.read_bytes())
    # 65,535 headers, each a note of 64 KiB without a build id.
    header = struct.pack("<IIQQQQQQ", 4, 4, 0, 0, 0, 1 << 16, 1 << 16, 4)
    data[32:40], data[56:58] = struct.pack("<Q", len(data)), b"\xff\xff"
    path.write_bytes(bytes(data) + header * 0xFFFF)
    read = 0

    class Counting(io.FileIO):
        def read(self, size: int | None = -1, /) -> bytes:
            nonlocal read
            read += size or 0
            return super().read(size) or b""

    with Counting(path) as file:
        assert build_id(cast("BinaryIO", file)) == ""
    assert read < 2 << 20


def test_what_is_no_file_has_no_facts(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert gather(str(tmp_path / "fifo")) is None
    assert gather("/dev/null") is None
    assert gather(str(tmp_path / "none")) is None
    assert fact_of(tmp_path).directory


def test_changed_since(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("one")
    fact = fact_of(path, written=True)
    assert not changed_since(fact)
    # A shared mapping changes contents without a new modification time.
    assert changed_since(fact_of(path, written=True, shared_map=True))
    path.write_text("more")
    assert changed_since(fact)


@pytest.fixture(scope="session")
def new_journal(tmp_path_factory: pytest.TempPathFactory) -> NewJournal:
    """A journal at iterating, of a new migration each time."""
    state_dir = tmp_path_factory.mktemp("state")
    ids = itertools.count(0x10000000)

    def new() -> Journal:
        journal = Journal.create(state_dir, f"{next(ids):x}", Role.DESTINATION)
        journal.enter(State.ITERATING)
        return journal

    return new


def feed(stage: FileStage, parts: list[FilePart]) -> None:
    for part in parts:
        stage.take(part)
    stage.end_stream()


def test_carried_whole_then_only_what_changed(tmp_path: Path, new_journal: NewJournal) -> None:
    path = tmp_path / "deep" / "log"
    path.parent.mkdir()
    path.write_bytes(b"a" * (2 * BLOCK) + b"end")
    path.chmod(0o640)
    sender = FileSender([fact_of(path, written=True)], [str(path)])
    stage = FileStage(new_journal())
    feed(stage, list(sender.first()))
    assert sender.bytes == 2 * BLOCK + 3
    with path.open("r+b") as file:  # one byte changes, and it grows
        file.seek(BLOCK + 5)
        file.write(b"b")
        file.seek(0, os.SEEK_END)
        file.write(b"more")
    changed = sender.changed()
    assert [fact.path for fact in changed] == [str(path)]
    feed(stage, list(sender.again(changed)))
    assert sender.bytes == 2 * BLOCK + 3 + BLOCK + 7
    expected = path.read_bytes()
    path.write_text("what the destination had")
    stage.install()
    assert path.read_bytes() == expected
    assert path.stat().st_mode & 0o777 == 0o640
    stage.keep()
    assert sorted(p.name for p in path.parent.iterdir()) == ["log"]


@pytest.mark.parametrize("crashed", [False, True])
def test_undo_restores_what_was_there_and_removes_what_was_made(
    tmp_path: Path, new_journal: NewJournal, crashed: bool
) -> None:
    old, new = tmp_path / "old", tmp_path / "dir" / "sub" / "new"
    old.write_text("carried")
    new.parent.mkdir(parents=True)
    new.write_text("carried too")
    facts = [fact_of(old, written=True), fact_of(new), fact_of(new.parent)]
    sender = FileSender(facts, [fact.path for fact in facts])
    parts = list(sender.first())
    old.write_text("precious")
    new.unlink()
    new.parent.rmdir()
    new.parent.parent.rmdir()
    for installed in (False, True):
        journal = new_journal()
        stage = FileStage(journal)
        feed(stage, parts)
        if installed:
            stage.install()
            assert (old.read_text(), new.read_text()) == ("carried", "carried too")
        if crashed:
            stage = FileStage(journal)
            stage.recall()
        stage.undo()
        stage.undo()
        assert [p.name for p in tmp_path.iterdir()] == ["old"]
        assert old.read_text() == "precious"


def test_a_crash_between_the_two_names_of_a_file_is_undone(
    tmp_path: Path, new_journal: NewJournal
) -> None:
    path = tmp_path / "conf"
    path.write_text("carried")
    parts = list(FileSender([fact_of(path, written=True)], [str(path)]).first())
    path.write_text("precious")
    journal = new_journal()
    feed(FileStage(journal), parts)
    journal.add("replaced", [str(path), True])
    os.link(path, path.with_name(f".conf.phaul-{journal.id}.old"))
    stage = FileStage(journal)
    stage.recall()
    stage.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["conf"]
    assert path.read_text() == "precious"


@pytest.mark.parametrize("path", ["relative", "/tmp/../etc/passwd", "/", ""])
def test_unusable_paths_are_refused(path: str, new_journal: NewJournal) -> None:
    with pytest.raises(DestinationError):
        FileStage(new_journal()).take(FilePart(head=FileFact(path=path)))


def test_contents_without_a_name_are_refused(new_journal: NewJournal) -> None:
    with pytest.raises(DestinationError):
        FileStage(new_journal()).take(FilePart(data=b"x"))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.binary(max_size=40), min_size=1, max_size=4))
def test_any_history_of_a_file_arrives(tmp_path_factory: pytest.TempPathFactory,
                                       new_journal: NewJournal,
                                       versions: list[bytes]) -> None:  # fmt: skip
    path = tmp_path_factory.mktemp("history") / "file"
    path.write_bytes(versions[0])
    sender = FileSender([fact_of(path, shared_map=True, written=True)], [str(path)])
    stage = FileStage(new_journal())
    feed(stage, list(sender.first()))
    for version in versions[1:]:
        path.write_bytes(version)
        feed(stage, list(sender.again(sender.changed())))
    path.unlink()
    stage.install()
    assert path.read_bytes() == versions[-1]
