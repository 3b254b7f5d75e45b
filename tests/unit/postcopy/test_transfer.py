"""The transfer of pages: success is what the destination has said, and nothing else."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phaul_runtime.config.model import Config
from phaul_runtime.criu.page_format import PageFormat
from phaul_runtime.cutover.journal import Journal
from phaul_runtime.cutover.states import Role, State
from phaul_runtime.errors import MigrationFailed, OutcomeUnknown
from phaul_runtime.events import Event, Listener, nobody
from phaul_runtime.memory.pagemap import LAZY, Pagemap, write_pagemap
from phaul_runtime.postcopy import protocol
from phaul_runtime.postcopy.sender import PageSender
from phaul_runtime.postcopy.transfer import Transfer
from phaul_runtime.system.cancel import Cancellation

PAGES = 64
PAGE = 4096


class Stand:
    """A frozen tree, which is this process, and a destination that takes its pages."""

    def __init__(self, tmp_path: Path) -> None:
        self._memory = mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory[:] = b"x" * len(self._memory)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.images = tmp_path / "final"
        self.images.mkdir()
        pages = Pagemap(1, [(address, PAGES, LAZY)], PageFormat.NARROW)
        write_pagemap(self.images / "pagemap-10.img", pages)
        self.journal = Journal.create(tmp_path / "state", "1f" * 8, Role.SOURCE)
        for state in (State.ITERATING, State.FROZEN, State.PREPARED, State.COMMITTING):
            self.journal.enter(state, to="ssh://x")
        self.journal.enter(State.POST_COPY)
        ours, self.theirs = socket.socketpair()
        self._takers: list[threading.Thread] = []
        self.agent: Any = SimpleNamespace(open_pages=lambda: ours, answers=lambda: True)
        self.hold: Any = SimpleNamespace(
            by_image={10: os.getpid()}, exists=lambda: False, remove=lambda: None, group="g",
            thaw_dying=lambda: None,
        )  # fmt: skip

    def transfer(self, listener: Listener = nobody) -> Transfer:
        made = Transfer(
            Config(), self.journal, self.hold, self.images,
            listener=listener, cancellation=Cancellation(),
        )  # fmt: skip
        made._runs.set()
        return made

    def take(self, until: Callable[[int], bool], *, done: bool) -> threading.Thread:
        """Be a destination that takes what comes until so many bytes; then says that it has all."""

        def take() -> None:
            self.theirs.sendall(
                protocol.HEAD.pack(protocol.MAGIC, PAGES) + bytes(protocol.bitmap_size(PAGES))
            )
            got = 0
            while not until(got) and (data := self.theirs.recv(1 << 16)):
                got += len(data)
            if done:
                self.theirs.sendall(protocol.message(protocol.Kind.DONE, 0))

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        self._takers.append(thread)
        return thread

    def close(self) -> None:
        """Nothing reads from a descriptor that is closed: another file may have its number."""
        with contextlib.suppress(OSError):
            self.theirs.shutdown(socket.SHUT_RDWR)
        for thread in self._takers:
            thread.join(20)
        self.theirs.close()
        self.journal.close()


@pytest.fixture
def stand(tmp_path: Path) -> Iterator[Stand]:
    made = Stand(tmp_path)
    yield made
    made.close()


def test_it_is_over_once_the_destination_says_so(stand: Stand) -> None:
    thread = stand.take(lambda got: got > PAGES * PAGE, done=True)
    with stand.transfer() as transfer:
        transfer.begin(stand.agent)
        assert transfer.run() is stand.agent
    thread.join(20)
    assert transfer.total == PAGES


def test_a_listener_that_fails_ends_nothing(stand: Stand) -> None:
    def full(_event: Event) -> None:
        raise OSError(28, "No space left on device")

    stand.take(lambda got: got > PAGES * PAGE, done=True)
    with stand.transfer(full) as transfer:
        transfer.begin(stand.agent)
        assert transfer.run() is stand.agent
    assert transfer.bytes_sent > PAGES * PAGE


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), RuntimeError("a fault")])
def test_what_ends_its_thread_is_no_success(
    stand: Stand, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The frozen tree was killed with 0 of 8,192,000 bytes over, and the journal said done."""

    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(PageSender, "serve", fails)
    with stand.transfer() as transfer:
        transfer.begin(stand.agent)
        with pytest.raises(OutcomeUnknown, match=str(error.args[-1])):
            transfer.run()


def test_one_that_is_stopped_is_no_success(stand: Stand) -> None:
    stand.take(lambda _got: False, done=False)
    transfer = stand.transfer()
    transfer._runs.clear()
    transfer.begin(stand.agent)
    transfer.stop()
    with pytest.raises(OutcomeUnknown, match="was stopped"):
        transfer.run()


def test_what_keeps_it_from_serving_is_known_before_the_source_is_given_up(stand: Stand) -> None:
    stand.hold.by_image = {}
    with stand.transfer() as transfer:
        transfer.check()
        transfer.begin(stand.agent)
        assert transfer._thread is not None
        transfer._thread.join(20)
        with pytest.raises(MigrationFailed, match="process 10 of the images is not known"):
            transfer.check()


def test_done_is_the_last_of_the_source(stand: Stand) -> None:
    """What is not done yet when this process is killed, a recovery does."""
    order: list[str] = []
    exists = iter([True, True, False, False])

    def note(what: str) -> Callable[..., Any]:
        def do(*_: object) -> Any:
            assert stand.journal.state is State.POST_COPY
            order.append(what)
            return []

        return do

    def still() -> bool:
        order.append("looks")
        return next(exists)

    stand.hold.exists = still
    stand.hold.remove = note("puts the cgroup away")
    half: Any = SimpleNamespace(end_rest=note("ends the tree"), finish=note("cleans"))
    assert stand.transfer(note("tells")).conclude(half) == []
    # What the kernel still keeps is waited for.
    assert order[:5] == ["ends the tree", "looks", "looks", "looks", "tells"]
    assert order[5:] == ["puts the cgroup away", "cleans", "looks"]
    assert stand.journal.state is State.DONE


def test_a_source_that_cannot_be_cleaned_is_not_done(stand: Stand) -> None:
    def killed() -> list[str]:
        raise KeyboardInterrupt

    half: Any = SimpleNamespace(end_rest=lambda: None, finish=killed)
    with pytest.raises(KeyboardInterrupt):
        stand.transfer().conclude(half)
    assert stand.journal.state is State.POST_COPY
