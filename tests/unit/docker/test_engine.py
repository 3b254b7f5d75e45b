"""The source's half of the docker engine, before it looks at processes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from phaul_engines.docker import engine
from phaul_engines.docker.daemon import Daemon
from phaul_engines.docker.engine import DockerSource
from phaul_engines.docker.options import DockerOptions

from phaul_runtime.errors import NoSuchTarget, Refused
from tests.unit.docker import document


class SaidDaemon:
    """A daemon that says what it was given."""

    def __init__(self, inspect: dict[str, Any], info: Mapping[str, Any]) -> None:
        self._inspect = inspect
        self._info = info

    def container(self, _name: str) -> dict[str, Any]:
        return self._inspect

    def kept(self, _container: str) -> Mapping[str, Any]:
        networks = {"bridge": {"DesiredMacAddress": "9e:11:22:33:44:55"}}
        return {"NetworkSettings": {"Networks": networks}}

    def info(self) -> Mapping[str, Any]:
        return self._info


def source_of(
    monkeypatch: pytest.MonkeyPatch, inspect: dict[str, Any], info: Mapping[str, Any]
) -> DockerSource:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    source = DockerSource("web", DockerOptions())
    monkeypatch.setattr(engine, "read_container", _knows_none)
    monkeypatch.setattr(source, "daemon", SaidDaemon(inspect, info))
    return source


def _knows_none(*_: object) -> None:
    raise NoSuchTarget("knows no container")


IMAGE_STORE = {
    "Driver": "overlayfs",
    "DriverStatus": [["driver-type", "io.containerd.snapshotter.v1"]],
}


@pytest.mark.parametrize(
    "changed",
    [
        {"GraphDriver": {"Name": "overlayfs", "Data": None}},  # docker 28
        {"GraphDriver": None},
        {"Storage": {"RootFS": {"Snapshot": {"Name": "overlayfs"}}}},  # docker 29
    ],
)
def test_a_container_in_containerd_s_image_store_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    inspect = document("bridge")
    del inspect["GraphDriver"]
    inspect.update(changed)
    with pytest.raises(Refused, match="containerd's image store") as caught:
        source_of(monkeypatch, inspect, IMAGE_STORE).inspect()
    assert "\n" not in caught.value.message
    assert "containerd-snapshotter" in caught.value.hint


def test_a_storage_driver_without_a_layer_s_directory_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inspect = document("bridge")
    inspect["GraphDriver"] = {"Name": "vfs", "Data": None}
    with pytest.raises(Refused, match="storage driver is vfs, not overlay2"):
        source_of(monkeypatch, inspect, {"Driver": "vfs", "DriverStatus": []}).inspect()


def test_docker_s_own_file_is_read_where_there_is_one(tmp_path: Path) -> None:
    daemon = Daemon("unix:///none", 1.0)
    daemon.root = tmp_path
    (tmp_path / "containers/id").mkdir(parents=True)
    assert daemon.kept("id") == {}
    file = tmp_path / "containers/id/config.v2.json"
    for text, said in (("[]", {}), ("{", {}), ('{"Name": "/web"}', {"Name": "/web"})):
        file.write_text(text)
        assert daemon.kept("id") == said


def test_the_macs_that_were_set_are_in_what_is_told_of_a_container(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are read before anything is looked for in its runtime."""
    source = source_of(monkeypatch, document("bridge"), {"Driver": "overlay2"})
    with pytest.raises(Refused, match="its runc has no state"):
        source.inspect()
    endpoint = source._facts["NetworkSettings"]["Networks"]["bridge"]
    assert endpoint["DesiredMacAddress"] == "9e:11:22:33:44:55"
