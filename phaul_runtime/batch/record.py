"""What the store has of a batch, read from outside: by `status`, `report` and `resume`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from phaul_runtime.batch.extra import require
from phaul_runtime.batch.model import Batch
from phaul_runtime.batch.outcome import Attempt
from phaul_runtime.batch.plan import MoveState, Planner
from phaul_runtime.batch.store import SCHEMA, Store
from phaul_runtime.errors import NoSuchMigration, Refused

if TYPE_CHECKING:
    from dbos import DBOSClient

# Of the order of the steps in `flow`.
VERSION = "phaul-batch-1"
_ACTIVE = ("PENDING", "ENQUEUED", "DELAYED")
_PAGE = 200


@dataclass
class BatchRecord:
    """A batch as it stands.

    Attributes:
        id: of the batch.
        batch: its moves.
        generation: how often it was begun or resumed.
        active: a workflow of it decides what starts next, in some process or until one takes it up.
        states: of every move.
        attempts: of every move that has ended at least once, the oldest first.
        version: of the program that began or resumed it last.
        began, ended: seconds since the epoch; `ended` is 0 while it is active.
    """

    id: str
    batch: Batch
    generation: int
    active: bool
    states: dict[str, MoveState]
    version: str = ""
    attempts: dict[str, list[Attempt]] = field(default_factory=dict)
    began: float = 0.0
    ended: float = 0.0

    def counts(self) -> dict[str, int]:
        """How many moves are in each state."""
        return dict(Counter(state.value for state in self.states.values()))

    def again(self, *, retry_failed: bool = False) -> set[str]:
        """Moves that a resumed batch would do; empty if there is nothing to be done.

        Those whose outcome is unknown are asked for again, which is safe. One that was skipped is
        done if what it waits for is.
        """
        done = {MoveState.MOVED} if retry_failed else {
            MoveState.MOVED, MoveState.REFUSED, MoveState.FAILED, MoveState.ERROR,
        }  # fmt: skip
        left = {name for name, state in self.states.items() if state not in done}
        if all(self.states[name] is MoveState.SKIPPED for name in left):
            return set()
        return left

    def next_numbers(self) -> dict[str, int]:
        """The number of each move's next attempt, where it is not 1.

        Of one whose outcome is unknown the last attempt is asked for again.
        """
        numbers = {}
        for name, attempts in self.attempts.items():
            last = attempts[-1]
            unknown = last.state == MoveState.UNKNOWN.value
            numbers[name] = last.number if unknown else last.number + 1
        return numbers


@contextmanager
def client(store: Store, batch_id: str) -> Iterator[DBOSClient]:
    """DBOS's client of a batch's database.

    Raises:
        Refused: it cannot be reached.
        NoSuchMigration: it has nothing yet.
    """
    require("dbos")
    from dbos import DBOSClient, DBOSPortableJSONSerializer  # noqa: PLC0415 - of the extra
    from sqlalchemy.exc import OperationalError, SQLAlchemyError  # noqa: PLC0415 - of the extra

    from phaul_runtime.batch.quiet import quiet  # noqa: PLC0415

    quiet()
    try:
        found = DBOSClient(
            system_database_url=store.url(batch_id),
            dbos_system_schema=SCHEMA,
            serializer=DBOSPortableJSONSerializer(),
            application_name=application_name(batch_id),
            retry_connection_errors=False,
        )
    except Exception as error:
        raise Refused(f"cannot read {store}: {error}") from error
    try:
        yield found
    except OperationalError as error:
        if "no such table" in str(error):
            raise NoSuchMigration(f"batch {batch_id} in {store} was never begun") from error
        raise Refused(f"cannot read {store}: {str(error).splitlines()[0]}") from error
    except SQLAlchemyError as error:
        raise Refused(f"cannot read {store}: {str(error).splitlines()[0]}") from error
    finally:
        found.destroy()


def application_name(batch_id: str) -> str:
    """DBOS's name of what works on a batch: others do not take its workflows."""
    return f"phaul-batch-{batch_id}"


def application_version(batch_id: str) -> str:
    """DBOS's name of the version of `flow`; no two batches of a database may have the same."""
    return f"{VERSION}-{batch_id}"


def read(store: Store, batch_id: str) -> BatchRecord:
    """A batch as it stands.

    Raises:
        NoSuchMigration: there is none with that id.
        Refused: the store cannot be read.
    """
    store.require(batch_id)
    with client(store, batch_id) as found:
        schedulers = [
            status
            for status in found.list_workflows(
                workflow_id_prefix=f"{batch_id}:", name="phaul_batch"
            )
            if status.workflow_id.rpartition(":")[0] == batch_id
        ]
        if not schedulers:
            raise NoSuchMigration(f"batch {batch_id} in {store} was never begun")
        schedulers.sort(key=lambda status: int(status.workflow_id.rpartition(":")[2]))
        moves = _moves(found, batch_id)
    last = schedulers[-1]
    arguments: Any = last.input or {}
    _, spec, ended, _ = arguments["args"]
    batch = Batch.from_json(spec)
    active = last.status in _ACTIVE
    states = _states(batch, ended, last.workflow_id, last.output, moves)
    attempts: dict[str, list[Attempt]] = {}
    for status in moves:
        for told in (status.output or {}).get("attempts", []):
            attempts.setdefault(status.output["name"], []).append(Attempt.from_json(told))
    return BatchRecord(
        batch_id,
        batch,
        int(last.workflow_id.rpartition(":")[2]),
        active,
        states,
        last.app_version or "",
        attempts,
        began=(schedulers[0].created_at or 0) / 1000,
        ended=0.0 if active else (last.completed_at or last.updated_at or 0) / 1000,
    )


def never_begun(store: Store, batch_id: str) -> bool:
    """Whether there is a place for a batch, and nothing in it: its runner was killed early."""
    if batch_id not in store.batches():
        return False
    try:
        read(store, batch_id)
    except NoSuchMigration:
        return True
    return False


def read_all(store: Store) -> Iterator[BatchRecord]:
    """All batches that were begun, the oldest first."""
    for batch_id in store.batches():
        with suppress(NoSuchMigration):
            yield read(store, batch_id)


def _moves(found: DBOSClient, batch_id: str) -> list[Any]:
    """The workflows of all its moves, of all generations, the oldest first."""
    moves: list[Any] = []
    while True:
        page = found.list_workflows(
            workflow_id_prefix=f"{batch_id}:",
            name="phaul_move",
            load_input=False,
            limit=_PAGE,
            offset=len(moves),
        )
        moves += page
        if len(page) < _PAGE:
            return moves


def _states(
    batch: Batch, ended: dict[str, str], scheduler: str, output: Any, moves: list[Any]
) -> dict[str, MoveState]:
    if isinstance(output, dict):
        return {name: MoveState(state) for name, state in output.items()}
    states = {name: MoveState(state) for name, state in ended.items()}
    running = []
    for status in moves:
        whose, _, name = status.workflow_id.rpartition(":")
        if whose != scheduler:
            continue
        if status.status in _ACTIVE:
            running.append(name)
        else:
            states[name] = MoveState((status.output or {}).get("state", MoveState.ERROR.value))
    # What is skipped follows from the others.
    states = Planner(batch, states).states
    states.update(dict.fromkeys(running, MoveState.RUNNING))
    return states
