"""Waiting for what may never come: a file system whose server is dead answers no question."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from phaul_runtime.errors import Refused

_T = TypeVar("_T")
_POLL_S = 0.5


def while_it_moves(
    work: Callable[[], _T], moved_at: Callable[[], float], silent_s: float, what: Callable[[], str]
) -> _T:
    """Do something on a thread of its own, as long as it gets on.

    Nothing ends a thread that the kernel keeps waiting: it stays behind, and what it does is in
    vain.

    Args:
        work: what to do.
        moved_at: the `time.monotonic()` at which it last got on.
        silent_s: how long it may not.
        what: to say of it then.

    Raises:
        Refused: it does not get on.
    """
    results: list[_T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - raised by who waits
            failures.append(error)

    thread = threading.Thread(target=run, name="look", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_S)
        if thread.is_alive() and time.monotonic() - moved_at() > silent_s:
            raise Refused(f"{what()}: no answer within {silent_s:g} s",
                          hint="does its file system answer? try stat(1) of it")  # fmt: skip
    if failures:
        raise failures[0]
    return results[0]
