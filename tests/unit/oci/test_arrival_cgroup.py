"""What a source names of this host is not touched: cgroups, containers, bundles of others."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from phaul_engines.oci import runtime
from phaul_engines.oci.arrival_cgroup import member, require_free, require_own
from phaul_engines.oci.options import RuncOptions
from phaul_engines.runc.arrival import MARK, RuncDestination

from phaul_runtime.criu.session import Criu
from phaul_runtime.errors import DestinationError
from phaul_runtime.system import cgroup

ID, OTHER = "aa" * 8, "bb" * 8


class Group:
    """A cgroup of this machine with processes of this test."""

    def __init__(self, root: Path) -> None:
        self.path = f"/phaul-test-{secrets.token_hex(4)}"
        self.directory = root / self.path.lstrip("/")
        self.directory.mkdir()
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, *argv: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(argv or ("sleep", "600"))
        self.started.append(process)
        (self.directory / "cgroup.procs").write_text(str(process.pid))
        return process

    def stranger(self) -> int:
        """The pid of a process in it that descends from nothing of this test's."""
        argv = ["sh", "-c", "sleep 600 >/dev/null & echo $!"]
        pid = int(subprocess.run(argv, stdout=subprocess.PIPE, check=True).stdout)
        (self.directory / "cgroup.procs").write_text(str(pid))
        return pid

    def close(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()
        for pid in runtime.cgroup_pids(self.path):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        deadline = time.monotonic() + 20
        while self.directory.exists() and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                self.directory.rmdir()


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[Group]:
    root = cgroup._root()
    if os.geteuid() != 0 or root is None or not (root / "cgroup.controllers").exists():
        pytest.skip("needs root and cgroup v2")
    monkeypatch.setattr(runtime, "CGROUP_ROOT", root)
    found = Group(root)
    try:
        yield found
    finally:
        found.close()


@pytest.fixture
def runc(tmp_path: Path) -> Path:
    """Says what it was asked, and knows the containers that lie in `known`."""
    path = tmp_path / "runc"
    path.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n'
        f'case "$1 $2" in "state web") cat {tmp_path}/known;; "state "*) exit 1;; esac\n'
    )
    path.chmod(0o755)
    (tmp_path / "asked").touch()
    return path


def asked(tmp_path: Path) -> list[str]:
    return (tmp_path / "asked").read_text().splitlines()


def manifest(tmp_path: Path, group: str, **more: Any) -> dict[str, Any]:
    return {
        "name": "web",
        "bundle": str(tmp_path / "bundle"),
        "cgroup": group,
        "config": {},
        **more,
    }


def half(runc: Path) -> RuncDestination:
    return RuncDestination(RuncOptions(binary=str(runc)), 1.0)


def test_what_lives_in_the_cgroup_that_a_source_names_lives_on(
    tmp_path: Path, group: Group, runc: Path
) -> None:
    other = group.start()
    there = half(runc)
    there.prepare(manifest(tmp_path, group.path), ID)
    with pytest.raises(DestinationError, match=rf"{group.path} is in use here, by pid {other.pid}"):
        there.restore(Criu("none"), tmp_path)
    there.discard()
    there.undo()
    # So after a crash of the agent, too.
    again = half(runc)
    again.prepare(manifest(tmp_path, group.path), ID)
    again.discard()
    again.undo()
    assert other.poll() is None
    assert runtime.cgroup_pids(group.path) == [other.pid]
    assert not (tmp_path / "bundle").exists()


def test_what_this_migration_has_restored_is_ended(
    tmp_path: Path, group: Group, runc: Path
) -> None:
    """By an agent that knows no more than what an earlier one has left."""
    there = half(runc)
    there.prepare(manifest(tmp_path, group.path), ID)
    there._claim("web")
    left = group.start()
    again = half(runc)
    again.prepare(manifest(tmp_path, group.path), ID)
    again.discard()
    assert left.wait(20) == -9
    assert not group.directory.exists()


def test_what_was_restored_to_another_cgroup_is_ended_by_its_root(
    tmp_path: Path, group: Group, runc: Path
) -> None:
    """The images name a cgroup as well, and CRIU believes them."""
    stranger = group.stranger()
    there = half(runc)
    there.prepare(manifest(tmp_path, ""), ID)
    there._claim("web")
    root = group.start()
    there._root = member(root.pid)
    with pytest.raises(DestinationError, match=f"in which pid {stranger} lives"):
        there._own_cgroup(root.pid)
    there.discard()
    assert root.wait(20) == -9
    assert runtime.cgroup_pids(group.path) == [stranger]


def test_the_tree_itself_is_no_stranger(tmp_path: Path, group: Group) -> None:
    root = group.start("sh", "-c", "sleep 600 & wait")
    deadline = time.monotonic() + 20
    while len(runtime.cgroup_pids(group.path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    require_own(group.path, root.pid)
    require_own("", root.pid)
    group.start()  # CRIU, for instance
    require_own(group.path, root.pid)
    group.stranger()
    with pytest.raises(DestinationError, match="give the container a cgroupsPath of its own"):
        require_own(group.path, root.pid)


@pytest.mark.parametrize("path", ["/../etc", "web", "/a/../../b", "../x"])
def test_paths_that_are_none(path: str) -> None:
    with pytest.raises(DestinationError, match="malformed manifest"):
        require_free(path)
    for free in ("", "/", f"/no-such-group-{secrets.token_hex(4)}"):
        require_free(free)


def test_the_bundle_of_another_migration_is_left_alone(
    tmp_path: Path, group: Group, runc: Path
) -> None:
    other = group.start()
    bundle = tmp_path / "bundle"
    (bundle / "rootfs").mkdir(parents=True)
    mark = {"id": OTHER, "restoring": True, "cgroup": group.path, "made": [str(bundle)]}
    (bundle / MARK).write_text(json.dumps(mark))
    there = half(runc)
    there._manifest, there._id = manifest(tmp_path, group.path), ID
    there.discard()
    there.undo()
    assert not [line for line in asked(tmp_path) if "delete" in line]
    assert other.poll() is None
    assert json.loads((bundle / MARK).read_text()) == mark


@pytest.mark.parametrize("ours", [True, False])
def test_only_a_container_of_this_bundle_is_deleted(
    tmp_path: Path, group: Group, runc: Path, ours: bool
) -> None:
    there = half(runc)
    there.prepare(manifest(tmp_path, group.path), ID)
    there._claim("web")
    bundle = tmp_path / "bundle" if ours else tmp_path / "another"
    (tmp_path / "known").write_text(json.dumps({"bundle": str(bundle)}))
    there.discard()
    deleted = [line for line in asked(tmp_path) if line.startswith("delete")]
    assert bool(deleted) is ours
