"""A move between hosts on which journals of other moves are damaged, and one whose own is."""

from __future__ import annotations

import pytest

from phaul_runtime.cutover.journal import Journal, journal_path, migration_ids
from phaul_runtime.cutover.states import Role, State
from phaul_runtime.errors import JournalDamaged
from phaul_runtime.source.idempotent import migrate_once
from phaul_runtime.source.migration import Migration
from phaul_runtime.testing import Place
from tests.contract.wholemove import WholeMove

OTHER, ID = "1f" * 8, "2e" * 8


def test_a_move_goes_by_journals_that_are_damaged(whole: WholeMove) -> None:
    hosts = {"here": Role.SOURCE, "there": Role.DESTINATION}
    for host, role in hosts.items():
        with Journal.create(whole.tmp_path / f"state-{host}", OTHER, role) as journal:
            journal.enter(State.ITERATING)
        journal.path.write_bytes(journal.path.read_bytes().replace(b"iterating", b"hterating"))
    assert whole.run(history=1).result == "moved"
    assert whole.lives(Place.DESTINATION)
    for host in hosts:
        assert OTHER in migration_ids(whole.tmp_path / f"state-{host}")


def test_a_move_whose_journal_is_damaged_is_not_made_again(whole: WholeMove) -> None:
    config = whole.config()
    assert (
        migrate_once(Migration(config, whole.target, id=ID, wiring=whole.wiring)).result == "moved"
    )
    path = journal_path(whole.tmp_path / "state-here", ID, Role.SOURCE)
    good = path.read_bytes()
    for wrong in (good.replace(b"done", b"dooe"), good[:-1], good[:200], b"", b"\xff" * 300):
        path.write_bytes(wrong)
        with pytest.raises(JournalDamaged, match=str(path)):
            migrate_once(Migration(config, whole.target, id=ID, wiring=whole.wiring))
        assert path.read_bytes() == wrong
    path.write_bytes(good)
    assert (
        migrate_once(Migration(config, whole.target, id=ID, wiring=whole.wiring)).result == "moved"
    )
