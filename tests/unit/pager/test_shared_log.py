"""What a twin finds in the journal."""

from __future__ import annotations

import os

from phaul_runtime.pager.account import Fate
from phaul_runtime.pager.shared_log import Kind, SharedLog
from phaul_runtime.pager.uffd import EVENT_PAGEFAULT, EVENT_UNMAP


def read(journal: SharedLog, task: int, event: int) -> None:
    """As the kernel writes a message: into the record itself."""
    ours, theirs = os.pipe()
    os.write(theirs, bytes([event]) + bytes(31))
    journal.expect(Kind.EVENT, task)
    os.readv(ours, [journal.message])
    os.close(ours)
    os.close(theirs)


def test_what_was_read_is_there_before_it_is_counted() -> None:
    journal = SharedLog()
    journal.expect(Kind.EVENT, 3)
    assert list(journal) == []
    read(journal, 3, EVENT_UNMAP)
    assert [(kind, task, body[0]) for kind, task, body in journal] == [(Kind.EVENT, 3, EVENT_UNMAP)]


def test_the_last_fault_stays_and_an_earlier_one_does_not() -> None:
    journal = SharedLog()
    read(journal, 1, EVENT_PAGEFAULT)
    read(journal, 2, EVENT_PAGEFAULT)
    assert [(kind, task) for kind, task, _ in journal] == [(Kind.EVENT, 2)]
    journal.keep()
    journal.expect(Kind.EVENT, 1)
    assert [(kind, task) for kind, task, _ in journal] == [(Kind.EVENT, 2)]


def test_filled_ranges_grow_and_others_stand_alone() -> None:
    journal = SharedLog()
    journal.settled(0, 0, 4096, Fate.FILLED)
    journal.settled(0, 4096, 8192, Fate.FILLED)
    journal.settled(1, 8192, 12288, Fate.FILLED)
    read(journal, 1, EVENT_UNMAP)
    journal.keep()
    journal.settled(1, 12288, 16384, Fate.FILLED)
    journal.note(Kind.ENDED, 1)
    found = [(record.kind, record.task) for record in journal]
    assert found == [
        (Kind.SETTLED, 0),
        (Kind.SETTLED, 1),
        (Kind.EVENT, 1),
        (Kind.SETTLED, 1),
        (Kind.ENDED, 1),
    ]
    assert next(iter(journal)).range == (0, 8192)
