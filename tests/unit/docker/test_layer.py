"""What a killed runtime does to a container's layer is put right before another start."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from phaul_engines.common.proctree import ancestors
from phaul_engines.docker.layer import Layer

from phaul_runtime.errors import DestinationError, NoSuchTarget
from phaul_runtime.system.process import Member


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    path = tmp_path / "diff"
    (path / "data/empty").mkdir(parents=True)
    (path / "data/empty").chmod(0o1777)
    (path / "data/status").write_text("1")
    (path / "data/link").symlink_to("../nowhere")
    os.link(path / "data/status", path / "data/other-name")
    os.mkfifo(path / "fifo", 0o640)
    return path


def seen(path: Path) -> dict[str, tuple[int, str]]:
    """Mode, and contents of files, by name."""
    found = {}
    for entry in sorted(path.rglob("*")):
        text = entry.read_text() if entry.is_file() else ""
        found[str(entry.relative_to(path))] = (entry.lstat().st_mode, text)
    return found


def test_an_emptied_layer_is_put_back_as_often_as_needed(layer: Path) -> None:
    before = seen(layer)
    found = Layer(layer)
    found.secure()
    assert seen(layer) == before
    for _ in range(2):
        shutil.rmtree(layer / "data")
        (layer / "data").write_text("in its place")
        (layer / "bin").mkdir()
        Layer(layer).secure()
        assert seen(layer) == before
        assert (layer / "data/status").stat().st_ino == (layer / "data/other-name").stat().st_ino
    found.forget()
    found.forget()
    assert [path.name for path in layer.parent.iterdir()] == ["diff"]
    assert seen(layer) == before


def test_half_a_copy_is_none(layer: Path) -> None:
    (layer.parent / "phaul-kept.part").mkdir()
    Layer(layer).secure()
    shutil.rmtree(layer / "data")
    Layer(layer).secure()
    assert (layer / "data/status").read_text() == "1"


def test_a_layer_that_is_gone_cannot_be_kept(tmp_path: Path) -> None:
    with pytest.raises(DestinationError, match="cannot keep"):
        Layer(tmp_path / "none").secure()


def test_ancestors_end_before_the_init() -> None:
    found = ancestors(os.getpid())
    assert all(isinstance(one, Member) and one.alive() and one.pid > 1 for one in found)
    if os.getppid() > 1:
        assert found[0].pid == os.getppid()
    with pytest.raises(NoSuchTarget):
        ancestors(1 << 30)
