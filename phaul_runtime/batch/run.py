"""Drives a batch: begins it, or takes it up wherever it was left, and waits for its end."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from phaul_runtime.batch.events import BatchEnded, BatchStarted, Pausing, Standing, TakenOver
from phaul_runtime.batch.extra import require
from phaul_runtime.batch.model import Batch, Move
from phaul_runtime.batch.outcome import Answer
from phaul_runtime.batch.plan import MoveState
from phaul_runtime.batch.record import (
    BatchRecord,
    application_name,
    application_version,
    never_begun,
    read,
)
from phaul_runtime.batch.store import SCHEMA, Store
from phaul_runtime.errors import ExitCode, OutcomeUnknown, PhaulError, Refused
from phaul_runtime.events import Listener, guarded, nobody
from phaul_runtime.system.cancel import Cancellation

_POLL_S = 0.2
# How often other controllers are looked after, seconds.
_WATCH_S = 5.0
_LEAVE_S = 130.0
_ENDS_S = 2.0

Ask = Callable[[Move, str, Cancellation, float], Answer]


@dataclass(frozen=True)
class Pace:
    """How often the database is looked at, seconds.

    Attributes:
        queue: for moves that may start, by each of several controllers.
        messages: for moves that have ended; PostgreSQL tells by itself.
    """

    queue: float = 0.1
    messages: float = 0.03


@dataclass
class Controller:
    """One process that works on one batch.

    Args:
        store: where the batch is.
        batch_id: of the batch.
        ask: runs an attempt, or learns its outcome.
        listener: told of all that happens here.
        name: of this controller, the same after a restart.
        pace: how often the database is looked at.
    """

    store: Store
    batch_id: str
    ask: Ask
    listener: Listener = nobody
    name: str = field(default_factory=socket.gethostname)
    pace: Pace = field(default_factory=Pace)

    def __post_init__(self) -> None:
        self.listener = guarded(self.listener)
        self._cancel = Cancellation()
        self._stop, self._leaving = threading.Event(), threading.Event()
        self._stopped = False
        self._asking = 0
        self._lock = threading.Lock()

    # -- what the command line calls -------------------------------------------------------

    def run(self, batch: Batch) -> BatchEnded:
        """Begin a batch, and work on it to its end.

        Raises:
            UsageError: there is one with that id.
            Refused: the store cannot be used.
            OutcomeUnknown: this process was told to leave at once; the batch can be resumed.
        """
        require("dbos")
        if not never_begun(self.store, self.batch_id):
            self.store.prepare(self.batch_id)
        with self._present() as flow:
            self.listener(BatchStarted(self.batch_id, len(batch.moves)))
            # An id may be used again with another store: what its moves left on the hosts, under
            # the ids of their attempts, is not this batch's.
            batch = batch.model_copy(update={"nonce": secrets.token_hex(8)})
            scheduler = self._begin(flow, batch, 1, {}, {})
            return self._work(scheduler)

    def resume(self, *, retry_failed: bool = False) -> BatchEnded:
        """Take part in a batch that was begun, or take it up, and work on it to its end.

        Args:
            retry_failed: moves that were refused or failed are tried once more, after those under
                way have ended.

        Raises:
            NoSuchMigration: there is no such batch.
            StillUnderWay: another process is this controller.
            Refused, OutcomeUnknown: as `run`.
        """
        require("dbos")
        self.store.require(self.batch_id)
        with self._present() as flow:
            record = read(self.store, self.batch_id)
            states = {n: s.value for n, s in record.states.items() if s.ended}
            self.listener(BatchStarted(self.batch_id, len(record.states), states))
            if record.active:
                if record.version != application_version(self.batch_id):
                    raise Refused(
                        f"batch {self.batch_id} was begun by a program of another version "
                        f"({record.version})",
                        hint="resume it with that version of phaul-runtime",
                    )
                scheduler = flow.scheduler_id(self.batch_id, record.generation)
                stopped = flow.was_stopped(scheduler)
                ended = self._work(scheduler)
                if self._stop.is_set() or not (stopped or retry_failed):
                    return ended
                record = read(self.store, self.batch_id)
            again = record.again(retry_failed=retry_failed)
            if not again:
                return self._told_end(record.states, record.ended - record.began)
            done = {n: s.value for n, s in record.states.items() if n not in again}
            generation = record.generation + 1
            scheduler = self._begin(flow, record.batch, generation, done, _numbers(record, again))
            return self._work(scheduler)

    def stop(self) -> bool:
        """Start nothing else, and let end what is under way; asked again: cancel that too.

        Safe to be called from a signal's handler. False if it was asked for twice already.
        """
        if not self._stop.is_set():
            self._stop.set()
            return True
        self._leaving.set()
        return self._cancel.request() if not self._cancel.requested else False

    # -- with DBOS -------------------------------------------------------------------------

    @contextmanager
    def _present(self) -> Iterator[Any]:
        """DBOS runs, as this controller of this batch; workflows that it left are taken up."""
        import dbos  # noqa: PLC0415 - of the extra
        from sqlalchemy.exc import SQLAlchemyError  # noqa: PLC0415

        from phaul_runtime.batch import flow  # noqa: PLC0415 - imports dbos
        from phaul_runtime.batch.quiet import quiet  # noqa: PLC0415

        quiet(self.listener)
        with self.store.presence(self.batch_id, self.name):
            flow.be(self._here(flow))
            dbos.DBOS(
                config={
                    "name": application_name(self.batch_id),
                    "system_database_url": self.store.url(self.batch_id),
                    "dbos_system_schema": SCHEMA,
                    "executor_id": self._executor,
                    "application_version": application_version(self.batch_id),
                    "serializer": dbos.DBOSPortableJSONSerializer(),
                    "log_level": "WARNING",
                    "notification_listener_polling_interval_sec": self.pace.messages,
                }
            )
            try:
                dbos.DBOS.launch()
                if self.store.shared:
                    dbos.DBOS.register_queue(
                        flow.queue_of(self.batch_id), polling_interval_sec=self.pace.queue
                    )
                yield flow
            except (dbos.error.DBOSException, SQLAlchemyError) as error:
                raise Refused(f"{self.store}: {str(error).splitlines()[0]}") from error
            finally:
                dbos.DBOS.destroy()

    def _here(self, flow: Any) -> Any:
        return flow.Here(self.name, self._ask, self.listener, self.store.shared, self._leaving.wait)

    @property
    def _executor(self) -> str:
        # On SQLite there is one at a time: the controller that resumes is the one that was killed.
        return self.name if self.store.shared else "controller"

    def _begin(
        self,
        flow: Any,
        batch: Batch,
        generation: int,
        ended: dict[str, str],
        numbers: dict[str, int],
    ) -> str:
        from dbos import DBOS, SetWorkflowID  # noqa: PLC0415 - of the extra

        scheduler: str = flow.scheduler_id(self.batch_id, generation)
        # Of several controllers that begin the same generation one does, the others take part.
        with SetWorkflowID(scheduler):
            DBOS.start_workflow(flow.batch_workflow, self.batch_id, batch.to_json(), ended, numbers)
        return scheduler

    def _work(self, scheduler: str) -> BatchEnded:
        """Until the scheduler's workflow has ended, wherever it runs."""
        from dbos import DBOS  # noqa: PLC0415 - of the extra

        from phaul_runtime.batch import flow  # noqa: PLC0415 - imports dbos

        began = time.monotonic()
        watched = began
        while True:
            standing = self._standing(scheduler)
            if standing == "SUCCESS":
                states: Any = DBOS.retrieve_workflow(scheduler).get_result()
                ended = {name: MoveState(state) for name, state in states.items()}
                return self._told_end(ended, time.monotonic() - began)
            if standing not in ("PENDING", "ENQUEUED"):
                raise PhaulError(
                    f"what decides in batch {self.batch_id} ended as {standing}",
                    hint=f"phaul-runtime batch resume {self.batch_id}",
                )
            if self._stop.is_set() and not self._stopped:
                self._stopped = True
                self.listener(Pausing("asked to stop; what is under way may end"))
                flow.stop(scheduler)
            if self._cancel.requested:
                self._leave(flow, scheduler)
            if self.store.shared and time.monotonic() - watched > _WATCH_S:
                self._take_over()
                self._tell_others(scheduler)
                watched = time.monotonic()
            self._wait(_POLL_S if self.pace.queue < _POLL_S else self.pace.queue)

    @staticmethod
    def _standing(scheduler: str) -> str:
        """DBOS's word for how a workflow stands; its input has all moves, and is not read."""
        from dbos import DBOS  # noqa: PLC0415 - of the extra

        found = DBOS.list_workflows(workflow_ids=[scheduler], load_input=False, load_output=False)
        return found[0].status if found else "gone"

    def _tell_others(self, scheduler: str) -> None:
        """What has ended at all controllers."""
        from dbos import DBOS  # noqa: PLC0415 - of the extra

        moves = DBOS.list_workflows(
            workflow_id_prefix=f"{scheduler}:", status="SUCCESS", load_input=False
        )
        states = Counter(str(status.output["state"]) for status in moves if status.output)
        self.listener(Standing(self.batch_id, dict(states)))

    def _wait(self, seconds: float) -> None:
        if self._stopped:
            time.sleep(seconds)
        else:
            self._stop.wait(seconds)

    def _ends(self, scheduler: str) -> bool:
        until = time.monotonic() + _ENDS_S
        while time.monotonic() < until:
            if self._standing(scheduler) == "SUCCESS":
                return True
            time.sleep(_POLL_S)
        return False

    def _leave(self, flow: Any, scheduler: str) -> None:
        """What is asked for now is being cancelled: wait for that, and leave the rest."""
        deadline = time.monotonic() + _LEAVE_S
        while self._asking and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        # The scheduler may end now that all moves have; else it is left, as they are.
        if self._ends(scheduler):
            return
        flow.leave(scheduler)
        self._ends(scheduler)
        raise OutcomeUnknown(
            f"left batch {self.batch_id} before its end",
            hint=f"phaul-runtime batch resume {self.batch_id}",
        )

    def _take_over(self) -> None:
        """Workflows of controllers that are dead go back to the queue."""
        from dbos import DBOS  # noqa: PLC0415 - of the extra

        pending = DBOS.list_workflows(
            status="PENDING",
            workflow_id_prefix=f"{self.batch_id}:",
            load_input=False,
            load_output=False,
        )
        others = {s.executor_id for s in pending if s.executor_id != self._executor}
        for other in sorted(str(each) for each in others):
            # Its name is held meanwhile, so that of two survivors one does this.
            with contextlib.suppress(Refused), self.store.presence(self.batch_id, other):
                left = DBOS.list_workflows(
                    status="PENDING",
                    workflow_id_prefix=f"{self.batch_id}:",
                    executor_id=other,
                    load_input=False,
                    load_output=False,
                )
                if left:
                    DBOS.resume_workflows([s.workflow_id for s in left])
                    self.listener(TakenOver(other, len(left)))

    # -- small parts -----------------------------------------------------------------------

    def _ask(self, move: Move, migration_id: str, timeout_s: float) -> Answer:
        with self._lock:
            self._asking += 1
        try:
            return self.ask(move, migration_id, self._cancel, timeout_s)
        finally:
            with self._lock:
                self._asking -= 1

    def _told_end(self, states: dict[str, MoveState], duration_s: float) -> BatchEnded:
        ended = summary(self.batch_id, states, duration_s)
        self.listener(ended)
        return ended


def _numbers(record: BatchRecord, names: set[str]) -> dict[str, int]:
    return {name: number for name, number in record.next_numbers().items() if name in names}


def summary(batch_id: str, states: dict[str, MoveState], duration_s: float) -> BatchEnded:
    """The end of a batch, with its exit code: 0 if all were moved, 7 otherwise."""
    counts = Counter(state.value for state in states.values())
    whole = all(state is MoveState.MOVED for state in states.values())
    code = ExitCode.MOVED if whole else ExitCode.PARTLY
    return BatchEnded(batch_id, dict(counts), int(code), round(duration_s, 3))
