"""Trees without an rsync: names, places, arguments, numbers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from phaul_runtime.cutover.journal import Journal
from phaul_runtime.cutover.states import Role
from phaul_runtime.engine import OK, REFUSED, WARNING
from phaul_runtime.engine.targets import Tree
from phaul_runtime.errors import DestinationError, MigrationFailed
from phaul_runtime.files.tree_sender import rsync_environment, stats, trees_to_carry
from phaul_runtime.files.tree_server import TreeServer, checked_arguments
from phaul_runtime.memory.image_dirs import mounts_below
from phaul_runtime.preflight.checks import check_rsync
from phaul_runtime.rpc import phaul_pb2 as pb

# As rsync 3.5.0 gives them to its remote shell.
FLAGS = "-lHogDtpAXrxSe.iLsfxCIvu"


@pytest.mark.parametrize("name", ["", "-a", "A", "a b", "a/b", "a" * 21, "a\n", "ä"])
def test_malformed_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="malformed name"):
        Tree(name, "/x")


@pytest.mark.parametrize("path", ["", "x", "./x", "/x\0"])
def test_malformed_paths_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match="not absolute"):
        Tree("x", path)


@pytest.mark.parametrize("path", ["", "/x", "../x", "a/../../x", "a\0", "."])
def test_what_does_not_lie_in_the_tree_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="not a path within"):
        Tree("x", "/x", (path,))


def test_on_one_host_a_tree_at_its_place_is_not_carried(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    (tmp_path / "link").symlink_to("here")
    tree = Tree("rootfs", str(here))
    for same in (here, tmp_path / "link"):
        assert trees_to_carry([tree], {"rootfs": str(same)}, "b", same_host=True) == []
        assert trees_to_carry([tree], {"rootfs": str(same)}, "b", same_host=False) == [tree]
    assert trees_to_carry([tree], {"rootfs": str(there)}, "b", same_host=True) == [tree]
    for nested in (tmp_path, here / "in" / "it", tmp_path / "link" / "in"):
        with pytest.raises(MigrationFailed, match="contain each other"):
            trees_to_carry([tree], {"rootfs": str(nested)}, "b", same_host=True)
    with pytest.raises(DestinationError, match="no place for the tree rootfs") as caught:
        trees_to_carry([tree], {"data": str(there)}, "b", same_host=False)
    assert caught.value.host == "b"


@pytest.mark.parametrize(
    "options",
    [
        f"{FLAGS} --timeout=300 --delete-during --stats -@-1 --numeric-ids",
        "-lHogDtpAXIRxSe.LsfxCIvu --timeout=300 --stats -@-1 --numeric-ids --inplace",
        f"{FLAGS} --modify-window=-1",
    ],
)
def test_what_rsync_asks_for_is_taken_without_its_path(options: str) -> None:
    taken = checked_arguments(f"--server {options} . rootfs", "rootfs")
    assert taken == ["--server", *options.split()]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--server",
        f"--server {FLAGS} . ",
        f"--server {FLAGS} . rootfs/",
        f"--server {FLAGS} . /rootfs",
        f"--server {FLAGS}  . rootfs",
        f"--server {FLAGS} --stats . . rootfs",
        f"--server {FLAGS} --timeout=1;x . rootfs",
        f"--server {FLAGS} --timeout= . rootfs",
        f"--server {FLAGS} --delete-during=x . rootfs",
        f"--server {FLAGS} --sender . rootfs",
        f"--server --sender {FLAGS} . rootfs",
        f"--server {FLAGS} {FLAGS} . rootfs",
        f"--server {FLAGS}\n . rootfs",
        "--server -K . rootfs",
        "--server -e.x/../y . rootfs",
        "--server -vvvM--log-file=/x . rootfs",
        "--server -lKe.iLs . rootfs",
    ],
)
def test_anything_else_is_not(line: str) -> None:
    with pytest.raises(DestinationError, match="not expected"):
        checked_arguments(line, "rootfs")


@pytest.mark.parametrize("path", ["x", "/", "/a/../etc", "."])
def test_an_engine_that_puts_trees_to_no_place_is_refused(path: str, tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, "1f" * 8, Role.DESTINATION)
    with journal, pytest.raises(DestinationError, match="the engine puts"):
        TreeServer(journal).place({"rootfs": Path(path)})


def test_numbers_are_read_from_what_rsync_says() -> None:
    said = (
        b"\nNumber of files: 12 (reg: 9, dir: 3)\nNumber of regular files transferred: 1,234\n"
        b"Total file size: 99 bytes\nTotal bytes sent: 5678\nTotal bytes received: 38\n"
    )
    assert stats(said) == (1234, 5678)
    assert stats(b"") == (0, 0)
    assert stats(b"Total bytes sent: many\n") == (0, 0)


def test_the_environment_does_not_change_what_rsync_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RSYNC_PROTECT_ARGS", "1")
    monkeypatch.setenv("LC_ALL", "xx_XX")
    environment = rsync_environment()
    assert "RSYNC_PROTECT_ARGS" not in environment
    assert environment["LC_ALL"] == "C"
    assert environment["PATH"] == os.environ["PATH"]


def test_a_missing_rsync_refuses_where_it_is_needed() -> None:
    assert check_rsync(pb.HostFacts(rsync=True), needed=True).level == OK
    assert check_rsync(pb.HostFacts(), needed=False).level == WARNING
    finding = check_rsync(pb.HostFacts(), needed=True)
    assert (finding.check, finding.level) == ("rsync", REFUSED)
    assert "install rsync" in finding.hint


def test_mounts_are_found() -> None:
    assert Path("/proc") in mounts_below(Path("/proc"))
    assert mounts_below(Path("/pro")) == []
