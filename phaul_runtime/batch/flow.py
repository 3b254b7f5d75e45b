"""The durable workflows, by DBOS: one that decides what starts, and one a move.

Every step's outcome is in the database before the next is taken; a killed process's workflows are
run again from their beginning, and take what is recorded instead of doing it again. What was
under way when it died is asked for again, by the id of its attempt (see `outcome`).

`record.VERSION` has to change with the order of the steps in here: workflows are only taken up by
a program of the version that began them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dbos import DBOS, SetWorkflowID

from phaul_runtime.batch.events import MoveEnded, MoveRetried, MoveStarted, Pausing
from phaul_runtime.batch.model import Batch, Move, attempt_id
from phaul_runtime.batch.outcome import Answer, Attempt, MoveResult, Next, follow
from phaul_runtime.batch.plan import MoveState, Planner
from phaul_runtime.errors import PhaulError
from phaul_runtime.events import Listener

SCHEDULER, MOVE = "phaul_batch", "phaul_move"
STOP, LEAVE = "stop", "leave"
_TOPIC = "moves"
# A lost message would otherwise be waited for for ever.
_LOOK_S = 300.0
_ASK_PAUSE_S = 2.0
_ASK_PAUSE_MAX_S = 60.0
_DEAD = ("ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED")


@dataclass(frozen=True)
class Here:
    """What this process brings: workflows are functions of a module, which find it here.

    Attributes:
        controller: this one's name.
        ask: see `MoveRunner.ask`, cancellation and all.
        listener: told of what this process does.
        shared: other processes may take moves from the queue; without them there is none, and a
            move begins at once.
        wait: for so many seconds; True, at once, if this process is about to leave.
    """

    controller: str
    ask: Callable[[Move, str, float], Answer]
    listener: Listener
    shared: bool
    wait: Callable[[float], bool]


class Left(BaseException):
    """This process leaves before the end of a workflow.

    No Exception, which DBOS would take for the workflow's outcome: it stays as it is, until another
    controller takes it up.
    """


_here: list[Here] = []


def be(here: Here) -> None:
    """Tell the workflows of this process what they work with."""
    _here[:] = [here]


def queue_of(batch_id: str) -> str:
    """The queue of a batch's moves."""
    return f"moves-{batch_id}"


def scheduler_id(batch_id: str, generation: int) -> str:
    """The workflow that decides; a batch that was stopped and resumed has one more."""
    return f"{batch_id}:{generation}"


@DBOS.step(name="ask")
def _ask(move: dict[str, Any], attempt: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    here = _here[0]
    wanted = Move.model_validate(move)
    here.listener(
        MoveStarted(
            wanted.name, attempt["id"], attempt["number"], attempt["asks"], wanted.from_, wanted.to
        )
    )
    try:
        answer = here.ask(wanted, attempt["id"], timeout_s)
    except PhaulError as error:
        answer = Answer(int(error.exit_code), said=str(error))
    return {
        "code": answer.code,
        "report": answer.report,
        "said": answer.said,
        "at": time.time(),
        "controller": here.controller,
    }


@DBOS.workflow(name=MOVE, max_recovery_attempts=None)
def move_workflow(
    batch_id: str, scheduler: str, told: dict[str, Any], rules: dict[str, Any], first: int
) -> dict[str, Any]:
    """One move with its retries.

    Args:
        batch_id: of the batch.
        scheduler: the workflow that is told of the end.
        told: the move, as in the file.
        rules: retries, retry_pause_s, reconnect_s, move_timeout_s, nonce.
        first: number of the first attempt; more than 1 if it was tried in an earlier generation.
    """
    name = told["name"]
    attempts: list[Attempt] = []
    number = first
    while True:
        began = DBOS.run_step({"name": "began"}, time.time)
        migration_id = attempt_id(batch_id + rules.get("nonce", ""), name, number)
        attempt = Attempt(migration_id, number, began)
        attempts.append(attempt)
        following = _attempt(attempt, told, rules, may_retry=number - first < rules["retries"])
        if following is not Next.RETRY:
            break
        _here[0].listener(MoveRetried(name, attempt.id, "another attempt", attempt.error))
        _wait(rules["retry_pause_s"])
        number += 1
    last = attempts[-1]
    result = MoveResult(name, last.state, [each.to_json() for each in attempts])
    DBOS.send(scheduler, {"move": name, "state": last.state}, _TOPIC)
    _here[0].listener(
        MoveEnded(
            name, last.state, last.id, len(attempts), last.report.get("downtime_ms"), last.error
        )
    )
    return result.to_json()


def _wait(seconds: float) -> None:
    # Not DBOS's sleep, which nothing ends early; a controller that takes it up waits once more.
    if _here[0].wait(seconds):
        raise Left


def _attempt(
    attempt: Attempt, told: dict[str, Any], rules: dict[str, Any], *, may_retry: bool
) -> Next:
    """Ask until it is known what became of an attempt, or that is given up."""
    answered_at = attempt.began
    pause_s = _ASK_PAUSE_S
    while True:
        _wait(0)
        said = _ask(told, {"id": attempt.id, "number": attempt.number, "asks": attempt.asks},
                    rules["move_timeout_s"])  # fmt: skip
        attempt.asks += 1
        attempt.ended, attempt.controller = said["at"], said["controller"]
        answer = Answer(said["code"], said["report"], said["said"])
        if answer.code is not None or attempt.asks == 1:
            answered_at = said["at"]
        following = follow(
            answer,
            attempt,
            may_retry=may_retry,
            lost_for_s=said["at"] - answered_at,
            reconnect_s=rules["reconnect_s"],
        )
        if following is not Next.ASK_AGAIN:
            return following
        _here[0].listener(
            MoveRetried(told["name"], attempt.id, "asked again", attempt.error or "no answer")
        )
        _wait(pause_s)
        pause_s = min(pause_s * 2, _ASK_PAUSE_MAX_S)


@DBOS.workflow(name=SCHEDULER, max_recovery_attempts=None)
def batch_workflow(
    batch_id: str, spec: dict[str, Any], ended: dict[str, str], numbers: dict[str, int]
) -> dict[str, str]:
    """Start what may start, until all is done or it is stopped; the states of all moves.

    Args:
        batch_id: of the batch.
        spec: the batch, as in the file.
        ended: moves that were at their end before.
        numbers: of the first attempt of each move, where it is not 1.
    """
    batch = Batch.from_json(spec)
    told = {move["name"]: move for move in spec["moves"]}
    rules = batch.model_dump(
        include={"retries", "retry_pause_s", "reconnect_s", "move_timeout_s", "nonce"}
    )
    me = DBOS.workflow_id or ""
    planner = Planner(batch, {name: MoveState(state) for name, state in ended.items()})
    while True:
        for move in planner.start():
            arguments = (batch_id, me, told[move.name], rules, numbers.get(move.name, 1))
            with SetWorkflowID(f"{me}:{move.name}"):
                if _here[0].shared:
                    DBOS.enqueue_workflow(queue_of(batch_id), move_workflow, *arguments)
                else:
                    DBOS.start_workflow(move_workflow, *arguments)
        if planner.over:
            return {name: state.value for name, state in planner.states.items()}
        message = DBOS.recv(_TOPIC, timeout_seconds=_LOOK_S)
        for news in [message] if message is not None else _look(me, planner):
            if STOP in news:
                planner.stopping = True
                DBOS.set_event(STOP, True)
            elif LEAVE in news:
                _wait(0)  # it was meant for the process that decided then
            elif planner.states[news["move"]] is MoveState.RUNNING:
                planner.ended(news["move"], MoveState(news["state"]))
                if planner.stopping and planner.failures == batch.stop_after_failures:
                    _here[0].listener(Pausing(f"{planner.failures} moves failed"))


def _look(scheduler: str, planner: Planner) -> list[dict[str, Any]]:
    """No message has come for long: moves whose workflow ended without one."""
    running = [name for name, state in planner.states.items() if state is MoveState.RUNNING]

    def find() -> list[str]:
        return [
            status.workflow_id
            for status in DBOS.list_workflows(
                workflow_ids=[f"{scheduler}:{name}" for name in running],
                status=list(_DEAD),
                load_input=False,
                load_output=False,
            )
        ]

    dead = DBOS.run_step({"name": "look"}, find)
    return [{"move": each.rpartition(":")[2], "state": MoveState.ERROR.value} for each in dead]


def leave(scheduler: str) -> None:
    """Have a scheduler that runs in this process, which is about to leave, wait no longer."""
    DBOS.send(scheduler, {LEAVE: True}, _TOPIC)


def was_stopped(scheduler: str) -> bool:
    """Whether somebody had it start nothing else."""
    return bool(DBOS.get_event(scheduler, STOP, timeout_seconds=0))


def stop(scheduler: str) -> None:
    """Have a scheduler start nothing else; idempotent."""
    DBOS.send(scheduler, {STOP: True}, _TOPIC, idempotency_key=f"{scheduler}:{STOP}")
