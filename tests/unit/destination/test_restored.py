"""Processes of a restored tree, against files that stand for /proc."""

from __future__ import annotations

from pathlib import Path

import pytest

from phaul_runtime.destination import restored
from phaul_runtime.destination.restored import by_image
from phaul_runtime.errors import DestinationError


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(restored, "_PROC", tmp_path)
    return tmp_path


def process(proc: Path, pids: list[int], children: dict[int, list[int]]) -> None:
    """`children` by the thread that made them."""
    home = proc / str(pids[0])
    home.mkdir()
    for thread, pids_of in children.items():
        (home / "task" / str(thread)).mkdir(parents=True)
        text = "".join(f"{pid} " for pid in pids_of)
        (home / "task" / str(thread) / "children").write_text(text)
    spaces = "\t".join(map(str, pids))
    (home / "status").write_text(f"Name:\tNSpid: 7\nPid:\t1\nNSpid:\t{spaces}\n")


def test_a_tree_of_this_hosts_namespace(proc: Path) -> None:
    process(proc, [10], {10: [11], 15: [12]})
    process(proc, [11], {11: []})
    process(proc, [12], {12: [13, 14]})
    process(proc, [13], {})  # has ended but for its status: a zombie
    # 14 is gone already.
    assert by_image(10) == {10: 10, 11: 11, 12: 12, 13: 13}


def test_the_images_name_a_process_as_the_roots_namespace_does(proc: Path) -> None:
    process(proc, [500, 1], {500: [501]})
    process(proc, [501, 7, 1], {501: []})
    assert by_image(500) == {1: 500, 7: 501}


def test_a_root_that_has_ended(proc: Path) -> None:
    with pytest.raises(DestinationError, match="the restored process 10 has ended"):
        by_image(10)
