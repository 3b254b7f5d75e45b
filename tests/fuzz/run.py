"""Runs the targets, counts, and says how a finding is repeated."""

from __future__ import annotations

import contextlib
import math
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from tests.fuzz.calls import CALLS
from tests.fuzz.files import FILES
from tests.fuzz.streams import STREAMS
from tests.fuzz.target import Target

# The slow ones first: what they do not reach in their time is left to the others.
TARGETS: tuple[type[Target], ...] = (*CALLS, *FILES, *reversed(STREAMS))
# One case; what takes longer hangs.
_CASE_S = 120
_SHOWN = 3
# In memory, if that may be: a case makes files.
_PLACE = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
# Buffers that Python and the allocator keep; a leak of a page a case would be more.
_GROWTH_MIB = 48


@dataclass
class Outcome:
    """What became of one target."""

    name: str
    messages: int = 0
    cases: int = 0
    taken: int = 0
    seconds: float = 0.0
    growth_mib: float = 0.0
    findings: list[str] = field(default_factory=list)

    @property
    def bad(self) -> bool:
        """It is to be mended."""
        return bool(self.findings) or self.growth_mib > _GROWTH_MIB

    def __str__(self) -> str:
        return (
            f"{self.name:<10} {self.messages:>8} messages, {self.cases:>7} cases, {self.taken:>7} "
            f"taken, {len(self.findings)} uncaught, memory {self.growth_mib:+.0f} MiB, "
            f"{self.seconds:.0f} s"
        )


def rss_mib() -> float:
    """What this process has in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def held() -> tuple[int, int]:
    """Open descriptors and threads."""
    return len(os.listdir("/proc/self/fd")), threading.active_count()


@contextlib.contextmanager
def _bounded(seconds: int) -> Iterator[None]:
    """A case that hangs is a finding."""

    def late(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"it did not end within {seconds} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(
    kind: type[Target], seed: int, messages: int, seconds: float, only: int | None = None
) -> Outcome:
    """Try cases of one kind until so many messages were sent, or the time is over.

    Args:
        kind: of which.
        seed: with the number of a case, says all of it.
        messages: at least.
        seconds: at most.
        only: the number of the one case that is tried.
    """
    outcome = Outcome(kind.name)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="phaul-fuzz-", dir=_PLACE) as root:
        target = kind(Path(root))
        warm = 0.0
        try:
            number = only or 0
            while outcome.messages < messages and time.monotonic() - began < seconds:
                _one(target, outcome, seed, number)
                number += 1
                if not warm and outcome.messages >= messages // 5:
                    warm = rss_mib()
                if only is not None:
                    break
        finally:
            target.close()
        outcome.growth_mib = rss_mib() - warm if warm else 0.0
    outcome.seconds = time.monotonic() - began
    return outcome


def _one(target: Target, outcome: Outcome, seed: int, number: int) -> None:
    outcome.cases += 1
    try:
        with _bounded(_CASE_S):
            count, taken = target.case(random.Random(f"{seed} {target.name} {number}"))
    except Exception:  # noqa: BLE001 - that is what is looked for
        outcome.messages += 1
        again = f"make fuzz ONLY={target.name} SEED={seed} CASE={number}"
        outcome.findings.append(f"{again}\n{traceback.format_exc(limit=-6)}")
        return
    outcome.messages += count
    outcome.taken += taken


def main(names: Sequence[str], seed: int, messages: int, seconds: float, only: int | None) -> int:
    """Fuzz all targets, or those named; the exit code."""
    kinds = [kind for kind in TARGETS if not names or kind.name in names]
    if unknown := set(names) - {kind.name for kind in kinds}:
        print(f"no such target: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    shares = sum(kind.share for kind in kinds)
    before, first = held(), rss_mib()
    outcomes: list[Outcome] = []
    print(f"seed {seed}", flush=True)
    for kind in kinds:
        wanted = math.ceil(max(0, messages) * kind.share / shares)
        outcome = fuzz(kind, seed, wanted, seconds * max(kind.share / shares, 0.1), only)
        outcomes.append(outcome)
        messages, shares = messages - outcome.messages, shares - kind.share
        print(outcome, flush=True)
        for finding in outcome.findings[:_SHOWN]:
            print(finding, flush=True)
    total = sum(each.messages for each in outcomes)
    uncaught = sum(len(each.findings) for each in outcomes)
    print(
        f"seed {seed}: {total} messages, {uncaught} uncaught, memory {first:.0f} > {rss_mib():.0f} "
        f"MiB, descriptors and threads {before} > {held()}"
    )
    return int(any(each.bad for each in outcomes))
