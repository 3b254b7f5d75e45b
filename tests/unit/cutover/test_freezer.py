"""What holds the source's copy in a post-copy move, against files that stand for the kernel's."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from phaul_runtime.criu.page_format import PageFormat
from phaul_runtime.cutover import freezer
from phaul_runtime.cutover.cutover import CutOver, Held, Running
from phaul_runtime.cutover.freezer import FACT, Freezer
from phaul_runtime.cutover.journal import Journal, read_records, replay
from phaul_runtime.cutover.states import Role, State
from phaul_runtime.errors import ChannelError, MigrationFailed, OutcomeUnknown
from phaul_runtime.events import Event
from phaul_runtime.library.api import Outcome
from phaul_runtime.memory.pagemap import LAZY, Pagemap, write_pagemap
from phaul_runtime.system import cgroup
from phaul_runtime.system.cancel import Cancellation

CRIU = 900


@dataclass
class Kernel:
    """Processes and cgroups in files; what was written to them takes effect with the next look."""

    root: Path
    proc: Path
    killed: list[int] = field(default_factory=list)
    stubborn: bool = False

    def process(self, pid: int, group: str, inner: Sequence[int] = (), start: int = 5) -> None:
        home = self.proc / str(pid)
        home.mkdir(parents=True)
        spaces = "\t".join(map(str, [pid, *inner]))
        (home / "status").write_text(f"Name:\tx\nTracerPid:\t{CRIU}\nNSpid:\t{spaces}\n")
        (home / "stat").write_text(f"{pid} (a ) b) S " + "0 " * 18 + f"{start} 0\n")
        (home / "cgroup").write_text(f"0::/{group}\n")
        self.group(group)

    def group(self, name: str) -> Path:
        path = self.root / name
        path.mkdir(parents=True, exist_ok=True)
        for file in ("cgroup.procs", "cgroup.freeze"):
            (path / file).touch()
        (path / "cgroup.events").write_text("populated 1\nfrozen 0\n")
        return path

    def look(self, _seconds: float = 0) -> None:
        """Let time pass."""
        for file in self.root.rglob("cgroup.procs"):
            for pid in file.read_text().split():
                where = file.parent.relative_to(self.root)
                (self.proc / pid / "cgroup").write_text(f"0::/{where}\n")
        if not self.stubborn:
            for file in self.root.rglob("cgroup.freeze"):
                frozen = file.read_text().strip() or "0"
                (file.parent / "cgroup.events").write_text(f"populated 1\nfrozen {frozen}\n")

    def kill(self, pid: int, number: int) -> None:
        assert number == signal.SIGKILL
        self.killed.append(pid)
        for status in self.proc.glob("*/status"):
            status.write_text(status.read_text().replace(f"TracerPid:\t{pid}", "TracerPid:\t0"))


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel(tmp_path / "cgroup", tmp_path / "proc")
    made.root.mkdir()
    now = iter(range(1 << 20))
    monkeypatch.setattr(freezer, "_ROOT", made.root)
    monkeypatch.setattr(freezer, "_PROC", made.proc)
    monkeypatch.setattr("phaul_runtime.cutover.freezer.time.sleep", made.look)
    monkeypatch.setattr("phaul_runtime.cutover.freezer.time.monotonic", lambda: float(next(now)))
    monkeypatch.setattr("phaul_runtime.cutover.freezer.os.kill", made.kill)
    new, write = Path.mkdir, Path.write_text

    def write_text(path: Path, text: str, *args: object, **named: object) -> int:
        written = write(path, text, *args, **named)  # type: ignore[arg-type]
        if path.name == "cgroup.procs" and text.isdigit():
            # Each is moved at once, and the file is none.
            made.look()
        return written

    def mkdir(path: Path, *args: object, **named: object) -> None:
        fresh = not path.exists()
        new(path, *args, **named)  # type: ignore[arg-type]
        if fresh and path.is_relative_to(made.root / cgroup.GROUP):
            made.group(str(path.relative_to(made.root)))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(Path, "write_text", write_text)
    return made


def test_a_tree_among_others_gets_a_group_of_its_own_and_goes_back(kernel: Kernel) -> None:
    for pid in (10, 11):
        kernel.process(pid, "system")
    (kernel.root / "system/cgroup.procs").write_text("10\n11\n12\n")
    (kernel.proc / "12").mkdir()
    taken = Freezer.plan("1f-held", [10, 11])
    assert taken.group == kernel.root / "phaul-runtime/1f-held"
    (kernel.root / "system/cgroup.procs").write_text("")
    taken.take()
    assert kernel.killed == [CRIU]
    assert taken.frozen()
    assert taken.lives()
    # Found again by another process, from the journal.
    again = Freezer.recall(taken.facts())
    assert again == taken
    assert again is not None
    again.release()
    assert (taken.group / "cgroup.freeze").read_text() == "0"
    # Both were written to where they came from; a file keeps the last.
    assert (kernel.root / "system/cgroup.procs").read_text() == "11"
    kernel.look()
    assert not again.frozen()


def test_a_group_that_is_the_trees_own_is_frozen_in_place(kernel: Kernel) -> None:
    kernel.process(20, "box/web", inner=(1,))
    kernel.process(21, "box/web", inner=(7,))
    (kernel.root / "box/web/cgroup.procs").write_text("20\n21\n")
    taken = Freezer.plan("2e-held", [20, 21])
    assert (taken.group, taken.back) == (kernel.root / "box/web", {})
    assert taken.by_image == {1: 20, 7: 21}
    taken.take()
    assert taken.frozen()
    # Gone, it must not look paused.
    for pid in ("20", "21"):
        for file in (kernel.proc / pid).iterdir():
            file.unlink()
    assert not taken.lives()
    taken.remove()
    assert (taken.group / "cgroup.freeze").read_text() == "0"


def test_a_group_is_thawed_as_its_tree_dies_and_is_its_runtimes_from_then_on(
    kernel: Kernel,
) -> None:
    kernel.process(20, "box/web", inner=(1,))
    (kernel.root / "box/web/cgroup.procs").write_text("20\n")
    taken = Freezer.plan("2f-held", [20])
    taken.take()
    freeze = taken.group / "cgroup.freeze"
    taken.thaw_dying()
    assert freeze.read_text() == "1"  # it has not been killed
    for file in (kernel.proc / "20").iterdir():
        file.unlink()
    taken.thaw_dying()
    assert freeze.read_text() == "0"
    # Its runtime freezes what it puts away.
    freeze.write_text("1")
    taken.thaw_dying()
    taken.remove()
    assert freeze.read_text() == "1"


def test_a_pid_that_is_used_again_is_not_the_tree(kernel: Kernel) -> None:
    kernel.process(30, "box/one")
    (kernel.root / "box/one/cgroup.procs").write_text("30\n")
    taken = Freezer.plan("3d-held", [30])
    stat = kernel.proc / "30/stat"
    stat.write_text(stat.read_text().replace(" 5 0", " 6 0"))
    assert not taken.lives()
    elsewhere = Freezer.recall({**taken.facts(), "boot_id": "another"})
    assert elsewhere is not None
    assert not elsewhere.lives()
    assert Freezer.recall(None) is None


def test_one_that_runs_outside_of_the_group_is_not_held(kernel: Kernel) -> None:
    kernel.process(40, "box/two")
    (kernel.root / "box/two/cgroup.procs").write_text("40\n")
    taken = Freezer.plan("4c-held", [40])
    taken.take()
    (kernel.root / "box/two/cgroup.procs").write_text("")
    (kernel.proc / "40/cgroup").write_text("0::/elsewhere\n")
    assert not taken.frozen()


def test_what_does_not_freeze_is_left_to_criu(kernel: Kernel) -> None:
    kernel.process(50, "box/three")
    (kernel.root / "box/three/cgroup.procs").write_text("50\n")
    kernel.stubborn = True
    with pytest.raises(MigrationFailed, match="does not freeze"):
        Freezer.plan("5b-held", [50]).take()
    assert kernel.killed == []


def test_a_host_without_the_freezer_is_refused(kernel: Kernel) -> None:
    assert freezer.check_hold().level == "refused"
    (kernel.root / "cgroup.controllers").touch()
    assert freezer.check_hold().level == "ok"


# -- in the cut-over ------------------------------------------------------------------------------


class There:
    """A destination that looks at the source's journal whenever it is asked for something."""

    def __init__(self, journal: Journal, failing: str = "") -> None:
        self.journal = journal
        self.failing = failing
        self.seen: list[tuple[str, State | None]] = []

    def _called(self, name: str) -> None:
        state_dir = self.journal.path.parents[1]
        assert read_records(state_dir, self.journal.id, Role.SOURCE)
        self.seen.append((name, self.journal.state))
        if name == self.failing:
            raise ChannelError("the cable was cut", host="b")

    def sync_files(self) -> tuple[int, int]:
        return 0, 0

    def stop_files(self) -> None:
        pass

    def prepare(self, _images_dir: Path) -> tuple[Held, int]:
        self._called("prepare")
        return Held(7, 1.0, 1.0), 20

    def commit(self) -> Running:
        self._called("commit")
        return Running(7, 0.0, 0.0)


@pytest.fixture
def journal(tmp_path: Path, kernel: Kernel) -> Journal:
    kernel.process(10, "system")
    made = Journal.create(tmp_path / "state", "1f" * 8, Role.SOURCE)
    made.enter(State.ITERATING)
    return made


def run(journal: Journal, there: There) -> tuple[CutOver, Outcome]:
    def serve(planned: Freezer, images_dir: Path) -> None:
        assert images_dir == images
        assert not planned.frozen()
        there.seen.append(("serve", journal.state))

    images = journal.path.parent / "final"
    images.mkdir(exist_ok=True)
    told: list[Event] = []
    cut = CutOver(
        there, told.append, Cancellation(), journal, processes=lambda: [10], serve=serve
    )  # fmt: skip
    assert cut.post_copy
    cut.freezing({})
    cut.prepare(images)
    assert cut.held
    assert os.fspath(journal.facts["final_dir"]) == str(images)
    outcome = cut.commit(lambda: pytest.fail("nothing is killed"))
    # The copy here is not dead, and nobody says so.
    assert [event.name for event in told] == ["frozen", "prepared", "committed"]
    return cut, outcome


def test_it_is_held_and_recorded_before_the_commit(journal: Journal, kernel: Kernel) -> None:
    there = There(journal)
    cut, outcome = run(journal, there)
    assert there.seen == [
        ("serve", State.FROZEN),
        ("prepare", State.FROZEN),
        ("commit", State.COMMITTING),
    ]
    assert kernel.killed == [CRIU]
    assert outcome.restored_pid == 7
    assert journal.state is State.POST_COPY
    assert Freezer.recall(journal.facts[FACT]) == cut.hold


def test_nothing_is_held_that_no_journal_knows_of(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in between, it would stand still for ever, and a recovery find a copy that runs."""
    take, known = Freezer.take, []

    def taken(self: Freezer) -> None:
        state_dir = journal.path.parents[1]
        state, facts = replay(read_records(state_dir, journal.id, Role.SOURCE))
        known.append((state, Freezer.recall(facts.get(FACT)) == self))
        take(self)

    monkeypatch.setattr(Freezer, "take", taken)
    run(journal, There(journal))
    assert known == [(State.COMMITTING, True)]


def test_no_answer_to_the_commit_leaves_it_held(journal: Journal) -> None:
    with pytest.raises(OutcomeUnknown, match="frozen"):
        run(journal, There(journal, "commit"))
    assert journal.state is State.COMMITTING
    found = Freezer.recall(journal.facts[FACT])
    assert found is not None
    assert found.frozen()


def test_a_restore_that_fails_holds_nothing(journal: Journal, kernel: Kernel) -> None:
    with pytest.raises(ChannelError):
        run(journal, There(journal, "prepare"))
    assert journal.state is State.FROZEN
    assert FACT not in journal.facts
    assert kernel.killed == []


def test_one_that_cannot_be_held_is_not_committed(journal: Journal, kernel: Kernel) -> None:
    kernel.stubborn = True
    there = There(journal)
    with pytest.raises(MigrationFailed, match="does not freeze"):
        run(journal, there)
    assert ("commit", State.COMMITTING) not in there.seen


def test_a_child_that_is_not_held_calls_the_move_off(journal: Journal, kernel: Kernel) -> None:
    """It was forked between CRIU's word that it begins and its freeze: it would run twice."""
    images = journal.path.parent / "final"
    images.mkdir()
    for pid in (10, 11):
        pages = Pagemap(1, [(0x1000, 4, LAZY)], PageFormat.NARROW)
        write_pagemap(images / f"pagemap-{pid}.img", pages)
    kernel.process(11, "system")
    there = There(journal)
    held = [10]
    cut = CutOver(there, lambda _: None, Cancellation(), journal, processes=lambda: held)
    cut.freezing({})
    with pytest.raises(MigrationFailed, match="process 11 of the images"):
        cut.prepare(images)
    assert there.seen == []
    assert journal.state is State.FROZEN
    assert kernel.killed == []
    held.append(11)
    cut.prepare(images, {"members": [[10, 5], [11, 5]]})
    # What finds the tree again is what stood still.
    assert journal.facts["identity"] == {"members": [[10, 5], [11, 5]]}
    assert {pid for pid, _, _ in Freezer.recall(journal.facts[FACT]).pids} == {10, 11}  # type: ignore[union-attr]


def test_pages_that_cannot_be_served_call_the_move_off(journal: Journal, kernel: Kernel) -> None:
    images = journal.path.parent / "final"
    images.mkdir()

    def serve(_hold: Freezer, _images_dir: Path) -> Callable[[], None]:
        def check() -> None:
            raise ChannelError("no channel for pages")

        return check

    cut = CutOver(
        There(journal), lambda _: None, Cancellation(), journal, processes=lambda: [10], serve=serve
    )
    cut.freezing({})
    with pytest.raises(ChannelError, match="no channel for pages"):
        cut.prepare(images)
    assert journal.state is State.PREPARED
    assert cut.hold is None
    assert kernel.killed == []


def test_a_debugger_of_the_operator_is_let_be(kernel: Kernel) -> None:
    kernel.process(60, "box/four")
    (kernel.root / "box/four/cgroup.procs").write_text("60\n")
    taken = Freezer.plan("6a-held", [60])
    assert taken.tracers == [(CRIU, 0)]
    taken.take()
    assert kernel.killed == [CRIU]
    # Another traces it now, and a recovery looks.
    status = kernel.proc / "60/status"
    status.write_text(status.read_text().replace("TracerPid:\t0", "TracerPid:\t4711"))
    again = Freezer.recall(taken.facts())
    assert again is not None
    again.cut_loose()
    assert kernel.killed == [CRIU]
    # Nor is one that has got CRIU's pid.
    status.write_text(status.read_text().replace("TracerPid:\t4711", f"TracerPid:\t{CRIU}"))
    kernel.process(CRIU, "system")
    again.cut_loose()
    assert kernel.killed == [CRIU]
    assert again.frozen()


def test_a_tree_that_criu_has_lost_before_is_not_held(kernel: Kernel) -> None:
    """It has run since its dump: its memory does not belong to the images any more."""
    kernel.process(70, "box/five")
    (kernel.root / "box/five/cgroup.procs").write_text("70\n")
    taken = Freezer.plan("7b-held", [70])
    status = kernel.proc / "70/status"
    status.write_text(status.read_text().replace(f"TracerPid:\t{CRIU}", "TracerPid:\t0"))
    with pytest.raises(MigrationFailed, match="process 70 has run since its dump"):
        taken.take()
    assert kernel.killed == []
