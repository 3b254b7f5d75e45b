"""The destination's half of the docker engine: what it knows of processes that are docker's."""

from __future__ import annotations

from pathlib import Path

import pytest
from phaul_engines import docker_arrival

SHIM = "/usr/bin/containerd-shim-runc-v2"
ADDRESS = "/run/containerd/containerd.sock"


def test_of_a_container_s_shims_only_those_that_hold_it_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containerd cleans up by the same program, as seen with containerd 1.7.24."""
    commands = {
        "10": [SHIM, "-namespace", "moby", "-id", "mine", "-address", ADDRESS],
        "11": [SHIM, "-namespace", "moby", "-id", "other", "-address", ADDRESS],
        "12": [SHIM, "-namespace", "moby", "-address", ADDRESS, "-id", "mine", "delete"],
        "13": ["runc", "restore", "mine"],
        "14": [],
    }
    for pid, words in commands.items():
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "cmdline").write_text("".join(f"{word}\0" for word in words))
    (tmp_path / "15").mkdir()  # it has just ended
    (tmp_path / "self").mkdir()
    monkeypatch.setattr(docker_arrival, "PROC", tmp_path)
    assert docker_arrival._shims("mine") == [10]
