"""The destination's half of the docker engine: what it knows of processes that are docker's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from phaul_engines.docker import start
from phaul_engines.docker.arrival import DockerDestination
from phaul_engines.oci.runtime import Runtime

from phaul_runtime.errors import DestinationError
from tests.unit.docker import document

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
    monkeypatch.setattr(start, "PROC", tmp_path)
    assert start.shims("mine") == [10]


class _ImageStore:
    """A daemon whose containers lie in containerd's image store."""

    def info(self) -> dict[str, Any]:
        status = [["driver-type", "io.containerd.snapshotter.v1"]]
        return {"Driver": "overlayfs", "DriverStatus": status}


@pytest.mark.parametrize("graph_driver", [None, {"Name": "overlayfs", "Data": None}])
def test_a_layer_that_docker_does_not_name_is_an_error_that_does(
    monkeypatch: pytest.MonkeyPatch, graph_driver: object
) -> None:
    """Where the finding was overridden (`--ignore docker-storage`)."""
    half = DockerDestination(Runtime("runc", ""), hold_s=1.0)
    monkeypatch.setattr(half, "_daemon", _ImageStore(), raising=False)
    facts = {**document("bridge"), "GraphDriver": graph_driver}
    with pytest.raises(DestinationError, match="containerd's image store"):
        half._layer(facts)
