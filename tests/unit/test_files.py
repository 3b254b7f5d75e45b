"""Files of a target: facts, comparison, carrying."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phaul_runtime.errors import DestinationError
from phaul_runtime.filecarry import BLOCK, FileSender, FileStage
from phaul_runtime.filesystem import build_id, changed_since, compare, gather
from phaul_runtime.journal import Journal
from phaul_runtime.rpc import phaul_pb2 as pb
from phaul_runtime.states import Role, State

NewJournal = Callable[[], Journal]


def fact_of(path: Path, **how: bool) -> pb.FileFact:
    fact = gather(str(path), **how)
    assert fact is not None
    return fact


def verdict(fact: pb.FileFact) -> tuple[str, bool]:
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
    assert build_id(str(path)) == "deadbeef"
    fact = fact_of(path)
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
    fact = fact_of(path)
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


def feed(stage: FileStage, parts: list[pb.FilePart]) -> None:
    for part in parts:
        stage.take(part)
    stage.end_stream()


def test_carried_whole_then_only_what_changed(tmp_path: Path, new_journal: NewJournal) -> None:
    path = tmp_path / "deep" / "log"
    path.parent.mkdir()
    path.write_bytes(b"a" * (2 * BLOCK) + b"end")
    path.chmod(0o640)
    sender = FileSender("1f", [fact_of(path, written=True)], [str(path)])
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
    facts = [fact_of(old), fact_of(new), fact_of(new.parent)]
    sender = FileSender("1f", facts, [fact.path for fact in facts])
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
    parts = list(FileSender("1f", [fact_of(path)], [str(path)]).first())
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
        FileStage(new_journal()).take(pb.FilePart(head=pb.FileFact(path=path)))


def test_contents_without_a_name_are_refused(new_journal: NewJournal) -> None:
    with pytest.raises(DestinationError):
        FileStage(new_journal()).take(pb.FilePart(data=b"x"))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.binary(max_size=40), min_size=1, max_size=4))
def test_any_history_of_a_file_arrives(tmp_path_factory: pytest.TempPathFactory,
                                       new_journal: NewJournal,
                                       versions: list[bytes]) -> None:  # fmt: skip
    path = tmp_path_factory.mktemp("history") / "file"
    path.write_bytes(versions[0])
    sender = FileSender("1f", [fact_of(path, shared_map=True, written=True)], [str(path)])
    stage = FileStage(new_journal())
    feed(stage, list(sender.first()))
    for version in versions[1:]:
        path.write_bytes(version)
        feed(stage, list(sender.again(sender.changed())))
    path.unlink()
    stage.install()
    assert path.read_bytes() == versions[-1]
