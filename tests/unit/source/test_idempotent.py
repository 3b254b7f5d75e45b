"""A migration with an id of the caller's: done once, whatever becomes of its commands."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from phaul_runtime.config.model import Config, load_config
from phaul_runtime.cutover.journal import Journal, journal_path
from phaul_runtime.cutover.states import Role, State, Verdict
from phaul_runtime.errors import Cancelled, MigrationFailed, StillUnderWay, UsageError
from phaul_runtime.events import Event as Told
from phaul_runtime.events import OutcomeRecorded, Recovering
from phaul_runtime.recovery.recover import Recovered
from phaul_runtime.report import MigrationReport
from phaul_runtime.source import idempotent
from phaul_runtime.source.migration import Migration
from phaul_runtime.system.cancel import Cancellation

ID = "0123456789abcdef"
ASKED = {"engine": "fake", "target": "web", "to": "ssh://b"}
PATH = (State.FROZEN, State.PREPARED, State.COMMITTING, State.DONE)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    overrides = {"state_dir": str(tmp_path / "state"), "workdir": str(tmp_path / "work")}
    return load_config(None, {**overrides, "engine": "fake", "transport.to": "ssh://b"})


def begun(config: Config, *states: State) -> Journal:
    journal = Journal.create(Path(config.state_dir), ID, Role.SOURCE)
    journal.enter(State.ITERATING, **ASKED)
    for state in states:
        journal.enter(state, **({"pid": 7, "downtime_ms": 1.5} if state is State.DONE else {}))
    return journal


def asked_again(config: Config, told: list[Told] | None = None) -> MigrationReport | None:
    told = [] if told is None else told
    with idempotent.claimed(Path(config.state_dir), ID, wait_s=0):
        return idempotent.settled_before(config, ID, ASKED, told.append)


def test_nothing_begun_is_moved_and_leaves_nothing(config: Config) -> None:
    assert asked_again(config) is None
    assert list(Path(config.state_dir).iterdir()) == []


def test_a_done_one_is_reported_from_its_journal(config: Config) -> None:
    begun(config, *PATH).close()
    told: list[Told] = []
    report = asked_again(config, told)
    assert report is not None
    assert (report.result, report.restored_pid, report.downtime_ms) == ("moved", 7, 1.5)
    assert (report.id, report.exit_code) == (ID, 0)
    assert told == [OutcomeRecorded(ID, "moved")]


def test_the_kept_report_is_used_only_where_the_journal_agrees(config: Config) -> None:
    with begun(config, *PATH) as journal:
        journal.keep_report(MigrationReport("unknown", exit_code=5, error="lost").to_json())
        assert asked_again(config).result == "moved"  # type: ignore[union-attr]
        journal.keep_report(MigrationReport("moved", total_ms=12.5).to_json())
    report = asked_again(config)
    assert report is not None
    assert report.total_ms == 12.5


def test_a_failed_one_is_reported_and_not_tried_again(config: Config) -> None:
    begun(config, State.ABORTING, State.ABORTED).close()
    report = asked_again(config)
    assert report is not None
    assert (report.result, report.exit_code, report.error_kind) == ("failed", 4, "MigrationFailed")


def test_an_unsettled_one_is_settled_first(config: Config) -> None:
    begun(config, State.FROZEN).close()

    def recover(migration_id: str) -> Recovered:
        with Journal.open(Path(config.state_dir), migration_id, Role.SOURCE) as journal:
            journal.enter(State.ABORTING)
            journal.enter(State.ABORTED)
        return Recovered(migration_id, Verdict.DISCARD, "it never froze", warnings=("careful",))

    told: list[Told] = []
    with idempotent.claimed(Path(config.state_dir), ID, wait_s=0):
        report = idempotent.settled_before(config, ID, ASKED, told.append, recover)
    assert report is not None
    assert (report.result, report.exit_code) == ("failed", 4)
    assert report.warnings == ["settled by a recovery: it never froze", "careful"]
    assert [type(event) for event in told] == [Recovering, OutcomeRecorded]


def test_one_that_died_before_its_first_step_is_begun_anew(config: Config) -> None:
    Journal.create(Path(config.state_dir), ID, Role.SOURCE).close()
    left = [
        Path(config.workdir) / name for name in (f"out-{ID}", f"ssh-01234567{ID}", "out-ff" * 5)
    ]
    for path in left:
        path.mkdir(parents=True)
    assert asked_again(config) is None
    assert [path.exists() for path in left] == [False, False, True]
    assert not journal_path(Path(config.state_dir), ID, Role.SOURCE).exists()


def test_one_that_begins_without_a_claim_is_left_alone(config: Config) -> None:
    with (
        Journal.create(Path(config.state_dir), ID, Role.SOURCE),
        pytest.raises(StillUnderWay),
    ):
        asked_again(config)


@pytest.mark.parametrize("name", ["engine", "target", "to"])
def test_the_id_of_another_migration_is_refused(config: Config, name: str) -> None:
    begun(config, *PATH).close()
    with (
        idempotent.claimed(Path(config.state_dir), ID, wait_s=0),
        pytest.raises(UsageError, match=f"its {name} is not other"),
    ):
        idempotent.settled_before(config, ID, {**ASKED, name: "other"})


def test_a_second_command_reports_what_the_first_did(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves = []

    def run(self: Migration) -> MigrationReport:
        moves.append(self.channel)
        begun(config, *PATH).close()
        return MigrationReport("moved")

    monkeypatch.setattr(Migration, "run", run)
    for _ in range(2):
        assert idempotent.migrate_once(Migration(config, "web", id=ID)).result == "moved"
    assert len(moves) == 1
    # An earlier command's directories cannot stand in the way of its channel.
    assert moves[0].endswith(ID)
    assert len(moves[0]) > len(ID)


HOLD = """
import sys
from pathlib import Path
from phaul_runtime.source.idempotent import claimed
with claimed(Path(sys.argv[1]), sys.argv[2], wait_s=0):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def an_owner(state_dir: Path) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-c", HOLD, str(state_dir), ID]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_claim_is_waited_for_and_ends_with_its_owner(config: Config) -> None:
    state_dir = Path(config.state_dir)
    with an_owner(state_dir) as owner:
        with pytest.raises(StillUnderWay), idempotent.claimed(state_dir, ID, wait_s=0.3):
            pass
        stop = Cancellation()
        stop.request()
        with (
            pytest.raises(Cancelled),
            idempotent.claimed(state_dir, ID, wait_s=60, cancellation=stop),
        ):
            pass
        owner.kill()
        with idempotent.claimed(state_dir, ID, wait_s=60):
            pass


def test_a_claim_whose_directory_its_last_owner_removed_is_made_anew(tmp_path: Path) -> None:
    # Two wait for the same owner; the first of them removes what the second has open.
    done: list[None] = []

    def take() -> None:
        with idempotent.claimed(tmp_path, ID, wait_s=60):
            assert (tmp_path / ID).is_dir()
            done.append(None)

    with an_owner(tmp_path) as owner:
        waiting = [threading.Thread(target=take) for _ in range(5)]
        for thread in waiting:
            thread.start()
        assert owner.stdin is not None
        owner.stdin.close()
        for thread in waiting:
            thread.join(60)
    assert len(done) == 5
    assert not (tmp_path / ID).exists()


def test_a_state_directory_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(MigrationFailed, match="cannot write to"),
        idempotent.claimed(tmp_path / "file", ID, wait_s=0),
    ):
        pass
