"""What became of pages, in numbers and in words."""

from __future__ import annotations

from phaul_runtime.pager.account import Account, Fate


def test_every_page_is_one_thing() -> None:
    account = Account()
    account.owe(100)
    for fate in Fate:
        account.settle(fate, fate, 42, 0x1000 * fate)
    found = account.numbers(100 - sum(Fate), taken_over=True)
    notes = found.pop("notes")
    assert found == {
        "pages": 100,
        "missing": 72,
        "filled": 1,
        "present": 2,
        "dropped": 3,
        "ended": 4,
        "unshared": 5,
        "lost": 13,
    }
    assert isinstance(notes, list)
    gone, unsure = notes
    assert gone.startswith("process 42: 6 pages from 0x6000 on have no place any more")
    assert unsure.startswith("process 42: 7 pages from 0x7000 on were touched before")


def test_what_is_in_no_number_is_told() -> None:
    account = Account()
    account.owe(5)
    account.settle(Fate.FILLED, 2, 1, 0)
    assert account.numbers(3, taken_over=False)["notes"] == []
    assert account.numbers(1, taken_over=False)["notes"] == [
        "of 2 pages it is not known what became of them"
    ]


def test_a_page_that_was_there_is_odd_unless_one_of_the_two_died() -> None:
    account = Account()
    account.owe(1)
    account.settle(Fate.PRESENT, 1, 1, 0)
    (note,) = account.notes(0, taken_over=False)
    assert note.startswith("1 pages were there before they were filled")
    assert account.notes(0, taken_over=True) == []


def test_notes_are_one_for_each_process_and_not_too_many() -> None:
    account = Account()
    for pid in range(1, 12):
        account.late(pid, 0x5000, 3)
        account.late(pid, 0x9000, 2)
    notes = account.notes(0, taken_over=False)
    assert len(notes) == 9
    assert notes[0].startswith("process 1: 5 pages from 0x5000 on were in areas")
    assert notes[-1] == "and 3 more of that kind"
