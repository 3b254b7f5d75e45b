"""A configuration at which CRIU waits: read once as a FIFO, then as a file; nobody hangs at it."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from phaul_hooks.heldconfig import HeldConfig


class Reader:
    """Reads a file twice, as CRIU does."""

    def __init__(self, path: Path) -> None:
        self.got: list[str] = []

        def read() -> None:
            for _ in range(2):
                self.got.append(path.read_text())

        self._thread = threading.Thread(target=read, daemon=True)
        self._thread.start()

    def ended(self) -> bool:
        self._thread.join(20)
        return not self._thread.is_alive()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "criu.conf"


def test_the_first_reader_waits_and_the_second_gets_another_text(path: Path) -> None:
    config = HeldConfig(path)
    config.hold()
    reader = Reader(path)
    time.sleep(0.2)
    assert reader.got == []
    assert config.give("script\nrest\n", "rest\n", over=lambda: False, within_s=20)
    assert reader.ended()
    assert reader.got == ["script\nrest\n", "rest\n"]


def test_it_waits_for_a_reader_until_there_will_be_none(path: Path) -> None:
    config = HeldConfig(path)
    config.hold()
    assert not config.give("a", "b", over=lambda: True, within_s=20)
    assert not config.give("a", "b", over=lambda: False, within_s=0.1)
    reader = Reader(path)
    assert config.give("a", "b", over=lambda: False, within_s=20)
    assert reader.ended()


def test_a_reader_is_released_by_another_process_too(path: Path) -> None:
    HeldConfig(path).hold()
    reader = Reader(path)
    time.sleep(0.2)
    HeldConfig(path).release()
    assert reader.ended()
    assert reader.got == ["", ""]
    HeldConfig(path).release()
    assert path.read_text() == ""


def test_it_can_be_held_again(path: Path) -> None:
    config = HeldConfig(path)
    config.release()  # there is none yet
    config.hold()
    first = Reader(path)
    time.sleep(0.2)
    config.hold()
    config.release()
    assert first.ended()
    assert first.got == ["", ""]


def test_a_reader_finds_a_file_at_any_moment(path: Path) -> None:
    config = HeldConfig(path)
    config.hold()
    over = threading.Event()
    missed: list[OSError] = []

    def look() -> None:
        while not over.is_set():
            try:
                path.lstat()
            except OSError as error:
                missed.append(error)

    looker = threading.Thread(target=look)
    looker.start()
    for _ in range(2000):
        config.hold()
        config.release()
    over.set()
    looker.join()
    assert missed == []
