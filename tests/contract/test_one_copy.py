"""The holes around the state table: disks that refuse, deaths between two steps, hooks, locks."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phaul_runtime.agent.calls import AgentService
from phaul_runtime.cutover.cutover import CutOver, Running
from phaul_runtime.cutover.journal import RUNS, Journal, read_records, replay
from phaul_runtime.cutover.states import Role, State, Verdict
from phaul_runtime.destination.incoming import Incoming
from phaul_runtime.errors import MigrationFailed, OutcomeUnknown, PhaulError
from phaul_runtime.events import Warned
from phaul_runtime.files.staged_files import FileStage
from phaul_runtime.hooks.lifecycle import Hooks, announce
from phaul_runtime.memory.image_dirs import RESUMED
from phaul_runtime.postcopy.transfer import Transfer
from phaul_runtime.recovery.recover import Recovery
from phaul_runtime.recovery.resolve import Settler
from phaul_runtime.rpc import phaul_pb2 as pb
from phaul_runtime.rpc.client import RemoteAgent
from phaul_runtime.rpc.protocol import PROTOCOL
from phaul_runtime.source.migration import Migration
from phaul_runtime.source.outcome import Begun
from phaul_runtime.testing import Place
from phaul_runtime.testing.bench import NoCriu
from phaul_runtime.testing.fake import FakeDestination, FakeLocal, FakeSource
from tests.contract import wholemove
from tests.contract.wholemove import WholeMove

SOON = {"lost_s": 3, "heartbeat_s": 1, "commit_s": 10, "call_s": 5, "prepare_s": 20}
# How often one agent tries to write done.
TRIES = 2
COMMITTED = {"committed": [["sh", "-c", 'echo "$PHAUL_ROLE" >> "$OUT"']]}


class Killed(BaseException):
    """The end of the process, here."""


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    return tmp_path / "out"


@pytest.fixture
def reachable(whole: WholeMove) -> WholeMove:
    """A recovery reaches the other host."""
    return whole


def refuse(monkeypatch: pytest.MonkeyPatch, role: Role, state: State, times: int = 1) -> None:
    """The disk of a host refuses a state."""
    enter, left = Journal.enter, [times]

    def refused(self: Journal, entered: State, **facts: Any) -> None:
        if self.role is role and entered is state and left[0]:
            left[0] -= 1
            raise MigrationFailed("cannot write: Input/output error")
        enter(self, entered, **facts)

    monkeypatch.setattr(Journal, "enter", refused)


def state_of(whole: WholeMove, role: Role) -> State | None:
    assert whole.migration is not None
    where = "here" if role is Role.SOURCE else "there"
    records = read_records(whole.tmp_path / f"state-{where}", whole.migration.id, role)
    return replay(records)[0]


def one_lives_there(whole: WholeMove) -> None:
    assert whole.lives(Place.DESTINATION)
    assert not whole.lives(Place.SOURCE)


def successor(whole: WholeMove) -> Settler:
    """An agent that knows of the migration by its journal alone."""
    hooks = whole.config(hooks={"directory": "/none", **whole.there}).hooks.hooks()
    return Settler(
        whole.tmp_path / "state-there",
        whole.tmp_path / "there",
        NoCriu(),
        hooks,
        whole.wiring.engine,
    )


@pytest.mark.parametrize("agents", [1, 3])
def test_a_destination_that_cannot_write_done_keeps_what_runs(
    reachable: WholeMove, monkeypatch: pytest.MonkeyPatch, agents: int
) -> None:
    refuse(monkeypatch, Role.DESTINATION, State.DONE, TRIES * agents)
    report = reachable.run(timeouts=SOON)
    assert report.result == "moved"
    one_lives_there(reachable)
    assert state_of(reachable, Role.DESTINATION) is State.COMMITTING
    # Each recovery finds out that it runs, as the images say, and the last one can say so.
    for _ in range(agents):
        settled = successor(reachable).settle(report.id, Role.DESTINATION, Verdict.RUN)
        assert settled.pid == report.restored_pid
        one_lives_there(reachable)
    assert state_of(reachable, Role.DESTINATION) is State.DONE
    assert not (reachable.tmp_path / "there" / report.id).exists()


@pytest.mark.parametrize("role", Role)
def test_a_disk_that_refuses_all_from_committing_on(
    reachable: WholeMove, monkeypatch: pytest.MonkeyPatch, role: Role
) -> None:
    """The copy runs all the same, and whoever moves it is told so at once."""
    full = True

    def refusing(real: Any) -> Any:
        def write(self: Journal, *args: Any, **facts: Any) -> None:
            if full and self.role is role and self.state is State.COMMITTING:
                raise MigrationFailed("cannot write: Input/output error")
            real(self, *args, **facts)

        return write

    for name in ("enter", "note"):
        monkeypatch.setattr(Journal, name, refusing(getattr(Journal, name)))
    report = reachable.run(timeouts=SOON)
    assert report.result == "moved"
    # Not by a recovery, after it was not known for a while.
    assert "recovering" not in reachable.names()
    one_lives_there(reachable)
    assert state_of(reachable, role) is State.COMMITTING
    said = [event.text for event in reachable.events if isinstance(event, Warned)]
    assert (f"phaul-runtime recover {report.id} completes the record" in "\n".join(said)) is (
        role is Role.SOURCE
    )
    full = False
    if role is Role.SOURCE:
        assert (
            Recovery(reachable.config(), wiring=reachable.wiring).recover(report.id).verdict
            is Verdict.RUN
        )
    else:
        settled = successor(reachable).settle(report.id, role, Verdict.RUN)
        assert settled.pid == report.restored_pid
    assert state_of(reachable, role) is State.DONE
    one_lives_there(reachable)


@pytest.mark.parametrize("noted", [True, False])
def test_what_runs_is_not_discarded_by_any_command(
    reachable: WholeMove, monkeypatch: pytest.MonkeyPatch, noted: bool
) -> None:
    refuse(monkeypatch, Role.DESTINATION, State.DONE, TRIES)
    if not noted:
        monkeypatch.setattr(Journal, "note", refused_there(Journal.note))
    nothing_is_put_away(monkeypatch)
    report = reachable.run(timeouts=SOON)
    # Nor is anything made for it again: a runtime would refuse, its name is taken.
    monkeypatch.setattr(wholemove._There, "prepare", lambda *_: pytest.fail("it is prepared for"))
    state = reachable.tmp_path / "state-there"
    with Journal.open(state, report.id, Role.DESTINATION) as journal:
        incoming = Incoming.revive(journal, NoCriu(), Hooks(), reachable.wiring.engine)
        incoming.abort(client_lost=True)
        one_lives_there(reachable)
    with pytest.raises(MigrationFailed, match="was told to run"):
        successor(reachable).settle(report.id, Role.DESTINATION, Verdict.DISCARD)
    one_lives_there(reachable)
    # Without its images only its journal can tell: else nothing is discarded either.
    for path in (reachable.tmp_path / "there" / report.id).rglob("*"):
        if path.is_file():
            path.unlink()
    for path in sorted((reachable.tmp_path / "there" / report.id).rglob("*"), reverse=True):
        path.rmdir()
    if noted:
        settled = successor(reachable).settle(report.id, Role.DESTINATION, Verdict.RUN)
        assert settled.pid == report.restored_pid
    else:
        with pytest.raises(PhaulError, match="not known whether it runs"):
            successor(reachable).settle(report.id, Role.DESTINATION, Verdict.RUN)
    one_lives_there(reachable)


def nothing_is_put_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even by an object whose `discard` would find nothing."""
    for name in ("discard", "undo"):
        monkeypatch.setattr(FakeDestination, name, lambda _: pytest.fail("it is put away"))


def unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was let run has no statistics."""
    resume = FakeDestination.resume

    def silently(self: FakeDestination) -> float:
        resumed_at = resume(self)
        (self._images_dir / RESUMED).unlink()
        return resumed_at

    monkeypatch.setattr(FakeDestination, "resume", silently)


def test_an_agent_that_alone_knows_keeps_what_runs(
    whole: WholeMove, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither CRIU nor the disk could say it; then the client is gone, before hooks were told."""
    unsaid(monkeypatch)
    monkeypatch.setattr("phaul_runtime.destination.copy.note_resumed", lambda _: None)
    monkeypatch.setattr(Incoming, "_settle_soon", lambda self: None)
    monkeypatch.setattr(Journal, "note", refused_there(Journal.note))
    nothing_is_put_away(monkeypatch)
    assert whole.run().result == "moved"
    one_lives_there(whole)
    assert state_of(whole, Role.DESTINATION) is State.COMMITTING


def refused_there(real: Any) -> Any:
    """What the destination's disk does not take."""

    def note(self: Journal, **facts: Any) -> None:
        if self.role is Role.DESTINATION:
            raise MigrationFailed("cannot write: Input/output error")
        real(self, **facts)

    return note


@pytest.mark.parametrize("noted", [True, False])
def test_a_criu_that_did_not_live_to_say_that_it_runs(
    reachable: WholeMove, monkeypatch: pytest.MonkeyPatch, noted: bool
) -> None:
    """It was killed between its word that all runs and its statistics, then the agent was."""
    unsaid(monkeypatch)
    monkeypatch.setattr(Incoming, "_settle_soon", lambda self: None)
    with monkeypatch.context() as patch:
        if not noted:
            patch.setattr(Journal, "note", refused_there(Journal.note))
        report = reachable.run(timeouts=SOON)
        assert report.result == "moved"
    monkeypatch.undo()
    settled = successor(reachable).settle(report.id, Role.DESTINATION, Verdict.RUN)
    # The same: none was ended, and none made anew.
    assert settled.pid == report.restored_pid
    assert state_of(reachable, Role.DESTINATION) is State.DONE
    one_lives_there(reachable)


@pytest.mark.parametrize("reached", [True, False])
def test_a_source_killed_before_it_is_cleaned_is_cleaned_by_a_recovery(
    reachable: WholeMove, out: Path, monkeypatch: pytest.MonkeyPatch, reached: bool
) -> None:
    reachable.here = COMMITTED
    finish, calls = FakeSource.finish, []

    def killed(self: FakeSource) -> Any:
        calls.append(self)
        if len(calls) == 1:
            out.unlink()
            raise Killed
        return finish(self)

    monkeypatch.setattr(FakeSource, "finish", killed)
    with pytest.raises(Killed):
        reachable.run()
    one_lives_there(reachable)
    assert state_of(reachable, Role.SOURCE) is State.COMMITTING
    wiring = reachable.wiring if reached else replace(reachable.wiring, transport=_unreachable)
    assert reachable.migration is not None
    recovery = Recovery(reachable.config(), wiring=wiring)
    assert recovery.waiting() == [reachable.migration.id]
    assert recovery.recover(reachable.migration.id).verdict is Verdict.RUN
    assert len(calls) == 2
    assert state_of(reachable, Role.SOURCE) is State.DONE
    # Those of `committed` were run before; what the journal says is not done twice.
    assert not out.exists()
    one_lives_there(reachable)


def _unreachable(_: object) -> Any:
    from phaul_runtime.errors import DestinationUnreachable

    raise DestinationUnreachable("no route to host")


def test_a_source_killed_before_its_hooks_has_them_run_by_a_recovery(
    reachable: WholeMove, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reachable.here = COMMITTED
    try_to, calls = Hooks.try_to, []

    def killed(self: Hooks, event: str, *args: Any, **named: Any) -> list[str]:
        if event == "committed" and args[0].role is Role.SOURCE:
            calls.append(event)
            if len(calls) == 1:
                raise Killed
        return try_to(self, event, *args, **named)

    monkeypatch.setattr(Hooks, "try_to", killed)
    with pytest.raises(Killed):
        reachable.run()
    assert reachable.migration is not None
    assert (
        Recovery(reachable.config(), wiring=reachable.wiring)
        .recover(reachable.migration.id)
        .verdict
        is Verdict.RUN
    )
    assert out.read_text().split() == ["source"]
    assert state_of(reachable, Role.SOURCE) is State.DONE
    one_lives_there(reachable)


def test_a_destination_killed_before_its_hooks_has_them_run_by_a_recovery(
    reachable: WholeMove, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reachable.there = COMMITTED
    monkeypatch.setattr(Incoming, "_settle_soon", lambda self: None)
    report = reachable.run()
    assert not out.exists()
    assert state_of(reachable, Role.DESTINATION) is State.COMMITTING
    monkeypatch.undo()
    monkeypatch.setenv("OUT", str(out))
    settled = successor(reachable).settle(report.id, Role.DESTINATION, Verdict.RUN)
    assert settled.pid == report.restored_pid
    assert out.read_text().split() == ["destination"]
    assert state_of(reachable, Role.DESTINATION) is State.DONE
    one_lives_there(reachable)


def test_a_commit_whose_answer_was_lost_is_answered_again(
    whole: WholeMove, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However late: all may be done by then."""
    commit = RemoteAgent.commit

    def again(self: RemoteAgent) -> Running:
        first = commit(self)
        deadline = time.monotonic() + 20
        while state_of(whole, Role.DESTINATION) is not State.DONE:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        second = commit(self)
        assert second.pid == first.pid
        return second

    monkeypatch.setattr(RemoteAgent, "commit", again)
    assert whole.run(timeouts=SOON).result == "moved"
    assert "recovering" not in whole.names()
    one_lives_there(whole)


def test_what_carried_files_replaced_is_put_away_before_done(
    whole: WholeMove, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would do it later: no recovery looks at what is done."""
    keep, seen = FileStage.keep, []

    def kept(self: FileStage) -> None:
        seen.append(state_of(whole, Role.DESTINATION))
        keep(self)

    monkeypatch.setattr(FileStage, "keep", kept)
    assert whole.run().result == "moved"
    assert seen == [State.COMMITTING]
    assert state_of(whole, Role.DESTINATION) is State.DONE


def test_pages_that_are_all_there_before_the_hooks_were_told_do_not_end_it(
    whole: WholeMove, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The channel of pages and the hooks are two threads: done is, who comes last."""
    monkeypatch.setattr(Incoming, "_settle_soon", lambda self: None)
    report = whole.run()
    with Journal.open(whole.tmp_path / "state-there", report.id, Role.DESTINATION) as journal:
        arrived = Incoming.revive(journal, NoCriu(), Hooks(), whole.wiring.engine)
        assert not arrived._is_done()
        assert journal.state is State.COMMITTING
        announce(Hooks(), journal)
        assert arrived._is_done()
    assert state_of(whole, Role.DESTINATION) is State.DONE


@pytest.mark.parametrize("step", ["prepare", "commit", "finish"])
def test_an_interrupt_of_a_program_that_moves_leaves_one_copy(
    reachable: WholeMove, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """A library's caller may have no handler of signals: KeyboardInterrupt comes anywhere."""
    owner: Any = FakeSource if step == "finish" else CutOver
    taken = getattr(owner, step)
    again: list[str] = []

    def interrupted(*args: Any, **named: Any) -> Any:
        value = taken(*args, **named)
        if not again:
            again.append(step)
            raise KeyboardInterrupt
        return value

    monkeypatch.setattr(owner, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        reachable.run(timeouts=SOON)
    assert reachable.migration is not None
    if state_of(reachable, Role.SOURCE) not in (State.DONE, State.ABORTED):
        Recovery(reachable.config(timeouts=SOON), wiring=reachable.wiring).recover(
            reachable.migration.id
        )
    assert reachable.lives(Place.SOURCE) + reachable.lives(Place.DESTINATION) == 1
    # Nothing is undone of a move that was made, and no journal says so.
    undone = step == "prepare"
    assert ("rolled_back" in reachable.names()) is undone
    assert state_of(reachable, Role.SOURCE) is (State.ABORTED if undone else State.DONE)
    assert reachable.lives(Place.SOURCE) is undone


def test_a_destination_that_cannot_put_away_keeps_no_source_waiting(
    reachable: WholeMove, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its docker does not answer, say: what was made stays for later, and is never run."""
    reachable.refuse_to_hold(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(Incoming, "_abort", lambda *_, **__: None)
        reachable.fail()
    assert reachable.migration is not None
    found = reachable.migration.id
    _let_go_of(reachable, found)

    def fails(*_: object) -> None:
        raise MigrationFailed("docker does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(FakeDestination, "prepare", fails)
        patch.setattr(wholemove._There, "prepare", fails)
        settled = successor(reachable).settle(found, Role.DESTINATION, Verdict.DISCARD)
    assert "docker does not answer" in settled.warnings[0]
    assert state_of(reachable, Role.DESTINATION) is State.ABORTING
    with pytest.raises(PhaulError):
        successor(reachable).settle(found, Role.DESTINATION, Verdict.RUN)
    assert not successor(reachable).settle(found, Role.DESTINATION, Verdict.DISCARD).warnings
    assert state_of(reachable, Role.DESTINATION) is State.ABORTED


def _let_go_of(whole: WholeMove, migration_id: str) -> None:
    """Close what an agent of this process still has open of a journal."""
    path = str(whole.tmp_path / "state-there" / migration_id)
    for fd in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{fd}").startswith(path):
                os.close(int(fd))
        except OSError:
            continue


def test_a_destination_that_is_not_done_yet_is_no_warning(
    whole: WholeMove, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hooks and its clean-up take their time; the copy runs, and nothing is wrong."""
    monkeypatch.setattr(Incoming, "_settle_soon", lambda self: None)
    report = whole.run()
    assert (report.result, report.warnings) == ("moved", [])
    assert state_of(whole, Role.DESTINATION) is State.COMMITTING


def test_pages_that_nobody_can_serve_are_known_of_before_the_source_is_given_up(
    whole: WholeMove, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cut-over asks the transfer that has begun (test_hold.py has what it does then)."""

    def fails(self: Transfer) -> None:
        self._error = MigrationFailed("process 11 of the images is not known here")

    monkeypatch.setattr(Transfer, "_work", fails)
    move = Migration(
        whole.config(mode="post-copy", restore="auto"), whole.target, wiring=whole.wiring
    )
    with Journal.create(tmp_path / "s", move.id, Role.SOURCE) as journal:
        agent: Any = None
        hold: Any = None
        source: Any = None
        begun = Begun("fake web", source, journal)
        is_served = move._begin_pages(agent, begun, hold, tmp_path)
        assert begun.transfer is not None
        begun.transfer.stop()
        with pytest.raises(MigrationFailed, match="process 11"):
            is_served()


def test_a_source_of_which_nobody_knows_is_not_undone(
    reachable: WholeMove, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is dying, say, and does not get to: neither copy may be ended, and none let run."""

    def fails(*_: object) -> Any:
        raise MigrationFailed("CRIU was killed")

    def unknown(_: FakeSource) -> bool:
        raise OutcomeUnknown("process 7 was killed and has not ended within 20 s")

    monkeypatch.setattr(FakeLocal, "give_up", fails)
    with monkeypatch.context() as patch:
        patch.setattr(FakeSource, "gone", unknown)
        patch.setattr(CutOver, "end", lambda _: pytest.fail("it is undone"))
        error = reachable.fail(timeouts={**SOON, "commit_s": 1})
    assert isinstance(error, OutcomeUnknown)
    assert "has not ended within 20 s" in error.message
    assert "rolled_back" not in reachable.names()
    assert state_of(reachable, Role.SOURCE) is State.COMMITTING
    # The fake's victim runs again with the end of its connection: now that can be known.
    assert reachable.migration is not None
    found = Recovery(reachable.config(timeouts=SOON), wiring=reachable.wiring).recover(
        reachable.migration.id
    )
    assert found.verdict is Verdict.DISCARD
    assert reachable.lives(Place.SOURCE)
    assert not reachable.lives(Place.DESTINATION)


def test_one_that_opens_slowly_keeps_no_other_waiting(
    whole: WholeMove, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = wholemove._There.prepare
    opens, may_go_on = threading.Event(), threading.Event()

    def slow(self: Any, manifest: Mapping[str, Any], migration_id: str) -> None:
        opens.set()
        assert may_go_on.wait(20)
        prepare(self, manifest, migration_id)

    monkeypatch.setattr(wholemove._There, "prepare", slow)
    (whole.tmp_path / "there").mkdir()
    service = AgentService(
        whole.tmp_path / "there", whole.tmp_path / "s", NoCriu(), Hooks(), wiring=whole.wiring
    )

    class Context:
        def invocation_metadata(self) -> Any:
            return (("phaul-protocol", str(PROTOCOL)),)

        def peer(self) -> str:
            return "unix:"

        def time_remaining(self) -> float:
            return 20.0

    request = pb.OpenRequest(
        id="a" * 16, engine="fake", target="x", lost_s=30, commit_s=5, restore="full",
        page_format=1, options=b"{}",
        manifest=json.dumps({"path": str(whole.tmp_path / "victim-there")}).encode(),
    )  # fmt: skip
    opened: list[Any] = []
    thread = threading.Thread(target=lambda: opened.append(service.Open(request, Context())))
    thread.start()
    assert opens.wait(20)
    # It answers at once: that it knows of none with this id.
    assert "no migration" in service.Beat(pb.MigrationRef(id="b" * 16), Context()).error.message
    again = service.Open(request, Context())
    assert "open already" in again.error.message
    # An agent that ends in between puts it away.
    assert service.close() == []
    may_go_on.set()
    thread.join(20)
    assert "ends" in opened[0].error.message
    records = read_records(whole.tmp_path / "s", "a" * 16, Role.DESTINATION)
    assert replay(records)[0] is State.ABORTED
    assert RUNS not in replay(records)[1]
