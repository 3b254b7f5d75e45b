"""A directory that is removed may have something mounted in it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from phaul_runtime.memory.image_dirs import remove_tree


@pytest.mark.skipif(os.geteuid() != 0, reason="requires root: a mount")
def test_what_is_mounted_in_a_removed_tree_is_not_reached_into(tmp_path: Path) -> None:
    precious = tmp_path / "host"
    (precious / "empty").mkdir(parents=True)
    place = tmp_path / "images" / "with space"
    place.mkdir(parents=True)
    subprocess.run(["mount", "--bind", precious, place], check=True)
    remove_tree(tmp_path / "images")
    assert not (tmp_path / "images").exists()
    assert (precious / "empty").is_dir()
