"""A restore that is held: what becomes of CRIU once all runs changes nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from phaul_runtime.criu.held_restore import HeldRestore
from phaul_runtime.criu.session import CriuNotify
from phaul_runtime.errors import CriuError, DestinationError, PhaulError


class Criu:
    """Restores a tree that does not exist, and then ends as it is told to."""

    def __init__(self, *then: Callable[[CriuNotify], object]) -> None:
        self.then = then

    def restore(self, _opts: object, notify: CriuNotify) -> int:
        try:
            notify.post_restore(7)
        except Exception as error:
            raise CriuError("CRIU was told no", request="RESTORE") from error
        for step in self.then:
            step(notify)
        return 7

    def cleanup(self) -> None:
        pass


def killed(_: CriuNotify) -> None:
    raise CriuError("CRIU was killed", request="RESTORE")


def runs(notify: CriuNotify) -> None:
    notify.post_resume()


def held(*then: Callable[[CriuNotify], object]) -> HeldRestore:
    criu: Any = Criu(*then)
    restore = HeldRestore(criu, None, hold_s=20)
    assert restore.start(20) == 7
    return restore


def test_it_runs_when_criu_says_so() -> None:
    before = time.monotonic()
    assert before <= held(runs).resume(20) <= time.monotonic()


def test_one_that_was_killed_before_has_let_nothing_run() -> None:
    with pytest.raises(PhaulError, match="CRIU was killed"):
        held(killed).resume(20)


def test_one_that_was_killed_after_it_said_so_has() -> None:
    """Else the copy that runs would be discarded, and made anew from old memory."""
    assert held(runs, killed).resume(20) > 0


def test_one_that_hangs_after_it_said_so_has() -> None:
    over, said = threading.Event(), threading.Event()

    def hangs(_: CriuNotify) -> None:
        said.set()
        over.wait(20)

    restore = held(runs, hangs)
    restore._verdict.put(True)
    assert said.wait(20)
    try:
        assert restore.resume(0.0) > 0
    finally:
        over.set()


def test_one_that_hangs_before_is_an_error() -> None:
    over = threading.Event()
    restore = held(lambda _: over.wait(20))
    try:
        with pytest.raises(DestinationError, match="did not resume the tree within 0 s"):
            restore.resume(0.0)
    finally:
        over.set()


def test_what_is_discarded_never_runs() -> None:
    restore = held(runs)
    restore.discard()
    restore.discard()
    with pytest.raises(CriuError, match="told no"):
        restore.resume(20)
