"""The cgroups of this machine, laid out for CRIU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from phaul_engines.oci.cgroupyard import YARD, yard_options


def test_every_hierarchy_of_this_process_is_there(tmp_path: Path) -> None:
    if not (options := yard_options(tmp_path)):
        pytest.skip("a hierarchy is mounted nowhere on this machine")
    yard = tmp_path / YARD
    assert options == [f"cgroup-yard {yard}"]
    lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    assert len(list(yard.iterdir())) == len(lines)
    for line in lines:
        _, controllers, path = line.split(":", 2)
        place = yard / (controllers.removeprefix("name=") or "unified")
        # Whoever is in another root finds it, too.
        assert not place.readlink().is_absolute()
        members = (place / path.lstrip("/") / "cgroup.procs").read_text(encoding="ascii")
        assert str(os.getpid()) in members.split()


def test_what_an_earlier_try_left_is_replaced(tmp_path: Path) -> None:
    if not yard_options(tmp_path):
        pytest.skip("a hierarchy is mounted nowhere on this machine")
    (tmp_path / YARD / "stale").symlink_to("/nowhere")
    assert yard_options(tmp_path)
    assert not (tmp_path / YARD / "stale").is_symlink()
