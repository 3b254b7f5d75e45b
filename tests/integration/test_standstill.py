"""That a tree stands still is told once every thread of it is in its tracer's stop."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from phaul_engines.common import standstill
from phaul_engines.common.proctree import is_stopped_by_tracer
from phaul_engines.common.standstill import Standstill

from tests.integration.serving import wait

_WALL = 0x40000000
PTRACE_DETACH, PTRACE_SEIZE, PTRACE_INTERRUPT = 17, 0x4206, 0x4207
TREE = """
import os, threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
os.fork()
os.write(1, f"{os.getpid()}\\n".encode())
time.sleep(60)
"""


class Tracer:
    """Stops threads as CRIU does; all calls come from one thread, as the kernel wants it."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.ptrace.argtypes = [ctypes.c_long] * 4

    def _ask(self, request: int, task: int) -> None:
        assert self._libc.ptrace(request, task, 0, 0) == 0, os.strerror(ctypes.get_errno())

    def stop(self, task: int) -> None:
        """Seize a thread and wait until it stands."""
        self._ask(PTRACE_SEIZE, task)
        self._ask(PTRACE_INTERRUPT, task)
        os.waitpid(task, _WALL)

    def let_go(self, task: int) -> None:
        """Let it run."""
        self._ask(PTRACE_DETACH, task)


@pytest.fixture
def tree() -> Iterator[tuple[int, list[int]]]:
    """A parent of two threads with a child; its pid, and all threads."""
    process = subprocess.Popen([sys.executable, "-c", TREE], stdout=subprocess.PIPE)
    assert process.stdout is not None
    lines = (process.stdout.readline(), process.stdout.readline())
    pids = sorted(map(int, lines), key=lambda pid: pid != process.pid)
    tasks = [int(t) for pid in pids for t in os.listdir(f"/proc/{pid}/task")]
    yield process.pid, tasks
    for pid in pids:
        os.kill(pid, 9)
    # Threads that are still traced are their tracer's to reap; a leader goes last.
    for task in (t for t in tasks if t not in pids):
        with contextlib.suppress(ChildProcessError):
            os.waitpid(task, _WALL)
    for pid in reversed(pids):
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, _WALL)
    process.wait(10)
    process.stdout.close()


def test_it_is_told_when_the_last_thread_stands(tree: tuple[int, list[int]]) -> None:
    root, tasks = tree
    assert len(tasks) == 3
    tracer, told = Tracer(), threading.Event()
    watch = Standstill(root, told.set)
    for task in tasks[:-1]:
        tracer.stop(task)
    assert not told.wait(0.3)
    tracer.stop(tasks[-1])
    assert told.wait(20)
    watch.end()
    for task in tasks:
        tracer.let_go(task)


def test_what_stood_once_may_execute_its_tracers_code(
    tree: tuple[int, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, tasks = tree
    tracer, told = Tracer(), threading.Event()
    seen: set[int] = set()

    def look(process: int, task: int) -> bool:
        stands = is_stopped_by_tracer(process, task)
        if stands:
            seen.add(task)
        return stands

    monkeypatch.setattr(standstill, "is_stopped_by_tracer", look)
    watch = Standstill(root, told.set)
    for task in tasks[:-1]:
        tracer.stop(task)
    wait(lambda: seen == set(tasks[:-1]))
    tracer.let_go(tasks[0])  # as a parasite that runs in it
    tracer.stop(tasks[-1])
    assert told.wait(20)
    watch.end()


def test_after_the_end_nothing_is_told(tree: tuple[int, list[int]]) -> None:
    root, tasks = tree
    tracer, told = Tracer(), threading.Event()
    Standstill(root, told.set).end()
    for task in tasks:
        tracer.stop(task)
    assert not told.wait(0.3)
