"""What follows from an answer."""

from __future__ import annotations

from typing import Any

import pytest

from phaul_runtime.batch.outcome import UNKNOWN_ASKS, Answer, Attempt, Next, follow

MOVED = {"result": "moved", "downtime_ms": 12.5, "warnings": ["w" * 900], "iterations": [1] * 99}


def ask(answer: Answer, attempt: Attempt | None = None, **keys: Any) -> tuple[Next, str]:
    attempt = attempt or Attempt("id", 1, 0.0)
    given = {"may_retry": True, "lost_for_s": 0.0, "reconnect_s": 60.0, **keys}
    return follow(answer, attempt, **given), attempt.state


def refused(kind: str) -> Answer:
    return Answer(3, {"result": "refused", "error": "no", "error_kind": kind})


@pytest.mark.parametrize(
    ("answer", "following", "state"),
    [
        (Answer(0, MOVED), Next.END, "moved"),
        (Answer(0, None), Next.ASK_AGAIN, "running"),  # its report was lost
        (Answer(0, {"result": "checked"}), Next.ASK_AGAIN, "running"),
        (Answer(1, None, "Traceback"), Next.END, "error"),
        (Answer(2, None, "no such option"), Next.END, "error"),
        (refused("CheckFailed"), Next.END, "refused"),
        (refused("NoSuchTarget"), Next.END, "refused"),
        (refused("DestinationUnreachable"), Next.RETRY, "refused"),
        (refused("StillUnderWay"), Next.ASK_AGAIN, "unknown"),
        (Answer(4, {"result": "failed", "error_kind": "CriuError"}), Next.RETRY, "failed"),
        (Answer(5, {"result": "unknown"}), Next.ASK_AGAIN, "unknown"),
        (Answer(6, {"result": "cancelled"}), Next.END, "cancelled"),
        (Answer(7), Next.END, "error"),
        (Answer(127, None, "not found"), Next.END, "refused"),
        (Answer(137), Next.ASK_AGAIN, "running"),
        (Answer(None), Next.ASK_AGAIN, "running"),
    ],
)
def test_each_answer(answer: Answer, following: Next, state: str) -> None:
    assert ask(answer) == (following, state)


def test_without_retries_left_it_ends() -> None:
    failed = Answer(4, {"result": "failed"})
    assert ask(failed, may_retry=False) == (Next.END, "failed")
    assert ask(refused("DestinationUnreachable"), may_retry=False) == (Next.END, "refused")


def test_an_unknown_outcome_is_settled_some_times_and_then_left_to_the_operator() -> None:
    attempt = Attempt("id", 1, 0.0)
    # Answers that never came do not count.
    for _ in range(10):
        assert ask(Answer(None), attempt)[0] is Next.ASK_AGAIN
    for _ in range(UNKNOWN_ASKS - 1):
        assert ask(Answer(5), attempt)[0] is Next.ASK_AGAIN
    assert ask(Answer(5), attempt) == (Next.END, "unknown")


def test_a_source_that_does_not_answer_is_given_up_and_unknown_never_failed() -> None:
    attempt = Attempt("id", 1, 0.0)
    lost = Answer(None, said="No route to host")
    assert ask(lost, attempt, lost_for_s=59.0) == (Next.ASK_AGAIN, "running")
    assert ask(lost, attempt, lost_for_s=61.0) == (Next.END, "unknown")
    assert attempt.error == "the source did not answer for 61 s: No route to host"


def test_of_a_report_only_what_is_needed_is_kept() -> None:
    attempt = Attempt("id", 1, 0.0)
    ask(Answer(0, MOVED), attempt)
    assert attempt.report == {"downtime_ms": 12.5}
    assert len(attempt.warnings[0]) == 500
    assert Attempt.from_json(attempt.to_json()) == attempt
