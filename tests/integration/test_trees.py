"""Trees, by the real rsync between a source and an agent on this machine."""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import shutil
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from phaul_runtime.agent.server import Agent
from phaul_runtime.config.model import Config, CriuConfig, FilesystemConfig
from phaul_runtime.criu.session import Criu
from phaul_runtime.engine import DestinationHalf, Engine, Finding, Inspection, SourceHalf
from phaul_runtime.engine.targets import Tree
from phaul_runtime.errors import Cancelled, DestinationError, MigrationFailed, PhaulError
from phaul_runtime.events import Event, TreeSynced
from phaul_runtime.files import tree_sender as trees_module
from phaul_runtime.preflight.wiring import Wiring
from phaul_runtime.rpc import phaul_pb2 as pb
from phaul_runtime.rpc.client import RemoteAgent
from phaul_runtime.source.carry import Carriage
from phaul_runtime.source.migration import Migration
from phaul_runtime.source.preflight import Checked, Hosts
from phaul_runtime.system import proc
from phaul_runtime.system.cancel import Cancellation
from phaul_runtime.transport import Channel
from phaul_runtime.transport.handshake import cut, pour
from phaul_runtime.transport.preamble import CONTROL, ID_BYTES, MEMORY
from tests.processes import processes_with

ID = "2e" * 8
FLAGS = "-lHogDtpAXrxSe.iLsfxCIvu"


class Options(BaseModel):
    pass


class FakeDestination(DestinationHalf):
    """Keeps the trees where the test says."""

    def __init__(self, places: Mapping[str, Path]) -> None:
        self._places = places
        self.calls: list[str] = []
        self.manifest: Mapping[str, Any] = {}

    def check(self, manifest: Mapping[str, Any]) -> Sequence[Finding]:
        return []

    def prepare(self, manifest: Mapping[str, Any], migration_id: str) -> None:
        self.manifest = manifest
        self.calls.append("prepare")

    def restore(self, criu: Criu, images_dir: Path, *, lazy: bool = False) -> int:
        raise DestinationError("nothing is restored here")

    def resume(self) -> float:
        raise DestinationError("nothing was restored here")

    def wait_let_go(self) -> None:
        pass

    def discard(self) -> None:
        self.calls.append("discard")

    def trees(self) -> Mapping[str, Path]:
        return self._places

    def undo(self) -> None:
        self.calls.append("undo")
        raise DestinationError("this must not matter")


class FakeEngine(Engine):
    name = "fake"
    options_model = Options

    def __init__(self, half: FakeDestination) -> None:
        self.half = half

    def source(self, target: str, options: Any, *, criu_log_level: int) -> SourceHalf:
        raise NotImplementedError

    def destination(self, options: Any, *, criu_log_level: int, hold_s: float) -> DestinationHalf:
        return self.half


class SocketChannel(Channel):
    name = "b"

    def __init__(self, sockets: Path) -> None:
        self.sockets = sockets

    def control_target(self) -> str:
        return f"unix:{self.sockets / CONTROL}"

    # So many bytes of a stream arrive, and no more ever.
    room: int | None = None

    def connect(self) -> socket.socket:
        channel = socket.socket(socket.AF_UNIX)
        channel.connect(str(self.sockets / MEMORY))
        if self.room is None:
            return channel
        ours, theirs = socket.socketpair()
        for target, args in ((dam, (theirs, channel, self.room)), (pour, (channel, theirs))):
            threading.Thread(target=target, args=args, daemon=True).start()
        return ours

    def trouble(self) -> str:
        return ""

    def close(self) -> None:
        pass


def dam(source: socket.socket, sink: socket.socket, room: int) -> None:
    """Carry so many bytes, then wait for the source's end."""
    while room and (data := source.recv(min(room, 1 << 16))):
        sink.sendall(data)
        room -= len(data)
    ended = select.poll()
    ended.register(source, select.POLLRDHUP)
    ended.poll()
    cut(sink)


class Move:
    """A migration that is open at an agent."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.here, self.there = tmp_path / "here", tmp_path / "made" / "there"
        self.here.mkdir()
        self.half = self.destination(tmp_path)
        self.workdir = tmp_path / "work"
        self.agent = Agent(
            tmp_path / "sockets", self.workdir, tmp_path / "state", Criu("no-such-criu"),
            wiring=Wiring(engine=lambda _: FakeEngine(self.half)),
        )  # fmt: skip
        self.agent.start()
        self.channel = SocketChannel(tmp_path / "sockets")
        self.cancellation = Cancellation()
        self.remote = RemoteAgent(
            self.channel, call_s=30, prepare_s=60, commit_s=5, cancellation=self.cancellation
        )
        self.carriage = Carriage(self.remote, self.cancellation, 60)
        self.told: list[Event] = []
        self.mapped: dict[str, list[str]] = {}
        self.places = self.remote.open(
            ID, engine="fake", target="web", manifest={"rootfs": "rsync"}, options={},
            lost_s=600, log_level=4, restore="full", page_format=1,
        )  # fmt: skip

    def destination(self, tmp_path: Path) -> FakeDestination:
        return FakeDestination({"rootfs": self.there, "data": tmp_path / "data there"})

    def carry(self, *trees: Tree) -> None:
        trees = trees or (Tree("rootfs", str(self.here)),)
        self.carriage.carry_trees(trees, self.told.append, lambda: self.mapped)

    def stream(self, arguments: bytes, name: str = "rootfs") -> bytes:
        """A hand-made stream; returns what the agent says to it before it closes."""
        with self.channel.open_stream(ID, name) as stream:
            stream.settimeout(30)
            stream.sendall(arguments)
            said = b""
            with contextlib.suppress(ConnectionResetError):  # it did not read all of it
                while data := stream.recv(4096):
                    said += data
            return said


@pytest.fixture
def move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Move]:
    mark(tmp_path, monkeypatch)
    found = Move(tmp_path, monkeypatch)
    yield found
    found.remote.close()
    found.agent.stop()
    wait(lambda: not rsyncs())


_STARTED_BY = "PHAUL_STARTED_BY"


def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is started from now on is this test's."""
    monkeypatch.setenv(_STARTED_BY, str(tmp_path))


def rsyncs() -> set[str]:
    """Every rsync and every part of its remote shell that this test has started, and that lives."""
    variable = f"{_STARTED_BY}={os.environ[_STARTED_BY]}"
    return {f"{pid} {line!r}" for pid, line in processes_with(variable)}


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def picture(root: Path) -> dict[bytes, tuple[Any, ...]]:
    """All that matters of a tree: types, modes, owners, times, links, attributes, contents."""
    seen: dict[int, bytes] = {}
    found: dict[bytes, tuple[Any, ...]] = {}
    top = os.fsencode(root)
    paths = [top]
    for base, directories, files in os.walk(top):
        paths += [base + b"/" + name for name in directories + files]
    for path in sorted(paths):
        info = os.lstat(path)
        name = os.path.relpath(path, top)
        contents: bytes = b""
        if stat.S_ISLNK(info.st_mode):
            contents = os.readlink(path)
        elif stat.S_ISREG(info.st_mode):
            contents = Path(os.fsdecode(path)).read_bytes()
        attributes = {
            key: os.getxattr(path, key, follow_symlinks=False)
            for key in os.listxattr(path, follow_symlinks=False)
        }
        found[name] = (
            info.st_mode, info.st_uid, info.st_gid, info.st_mtime_ns, info.st_nlink,
            seen.setdefault(info.st_ino, name), sorted(attributes.items()), contents,
        )  # fmt: skip
    return found


def furnish(root: Path) -> None:
    """One of everything that a tree may have."""
    (root / "etc").mkdir(mode=0o700)
    (root / "etc/conf").write_text("one\n")
    os.link(root / "etc/conf", root / "linked")
    (root / "absolute").symlink_to("/outside")
    (root / "relative").symlink_to("etc/conf")
    os.mkfifo(root / "fifo", 0o640)
    with (root / "sparse").open("wb") as file:
        file.seek(64 << 20)
        file.write(b"end")
    for name in (b"a space", b"new\nline", b"latin-\xe9\xff", b"-rf", b"$(x) 'q' \"", b"..."):
        Path(root, os.fsdecode(name)).write_bytes(name)
    os.setxattr(root / "etc/conf", "user.colour", b"red\0blue")
    (root / "etc").chmod(0o1770)
    (root / "linked").chmod(0o4755)
    if os.geteuid() == 0:
        os.chown(root / "a space", 12345, 54321, follow_symlinks=False)
        os.mknod(root / "null", 0o666 | 0o020000, os.makedev(1, 3))
        subprocess.run(["setfacl", "-m", "u:1234:r", str(root / "sparse")], check=False)
    for path in ("etc", "sparse"):
        os.utime(root / path, ns=(5, 1_000_000_000_123_456_789))
    root.chmod(0o751)


def test_everything_arrives_and_then_what_changed(move: Move) -> None:
    furnish(move.here)
    move.carry()
    assert picture(move.there) == picture(move.here)
    assert (move.there / "sparse").stat().st_blocks < 1000
    assert move.half.manifest["rootfs"] == "rsync"
    assert move.places["rootfs"] == str(move.there)

    (move.here / "a space").unlink()
    shutil.rmtree(move.here / "etc")
    (move.here / "etc").write_text("a file now")
    (move.here / "-rf").unlink()
    (move.here / "-rf").mkdir()
    (move.here / "new").write_text("new")
    with (move.here / "sparse").open("r+b") as file:
        file.write(b"start")
    sent = move.carriage.sync_files()
    assert picture(move.there) == picture(move.here)
    first, last = (event for event in move.told if isinstance(event, TreeSynced))
    assert (first.tree, first.final, last.final) == ("rootfs", False, True)
    assert first.files > 5
    assert last.files == 3
    assert sent == (0, first.bytes + last.bytes)
    # Only blocks that changed are sent again.
    assert last.bytes < 1 << 20


class FakeSource:
    """The little of an engine's source half that comes before CRIU."""

    def identity(self) -> dict[str, Any]:
        return {}

    def local(self, handover: Any, cancellation: Cancellation) -> Any:
        return None

    def mapped(self) -> dict[str, list[str]]:
        return {}


@pytest.mark.parametrize("rootfs", ["rsync", "shared"])
def test_a_migration_carries_trees_before_memory(
    move: Move, tmp_path: Path, rootfs: Literal["rsync", "shared"]
) -> None:
    config = Config(
        state_dir=str(tmp_path / "state here"), criu=CriuConfig(binary="no-such-criu"),
        filesystem=FilesystemConfig(rootfs=rootfs),
    )  # fmt: skip
    migration: Any = Migration(config, "web", move.told.append, id="3f" * 8)
    facts = pb.HostFacts(rsync=True, page_format=1)
    hosts = Hosts(facts, facts, "b")
    source: Any = FakeSource()
    (move.here / "x").write_text("x")
    inspection = Inspection(1, 0, trees=[Tree("rootfs", str(move.here))])
    session: Any = SimpleNamespace(
        certificate="",
        agent=move.remote, make_workdir=lambda: tmp_path,
        open_memory=lambda: move.channel.open_memory(migration.id), cut_memory=lambda _: None,
    )  # fmt: skip
    found, _ = migration._of_target(session, hosts, source, inspection)
    checked = [f.host for f in found if f.finding.check == "rsync"]
    engine = FakeEngine(move.half)
    with pytest.raises(PhaulError, match="cannot start no-such-criu"):
        migration._move(session, engine, Checked(hosts, source, Options(), inspection))
    migration._begun.journal.close()
    assert move.half.manifest == {"rootfs": rootfs}
    assert checked == (["here", "b"] if rootfs == "rsync" else [])
    assert (move.there / "x").exists() == (rootfs == "rsync")


def test_what_is_written_twice_within_a_second_is_seen(move: Move) -> None:
    file = move.here / "log"
    file.write_text("one")
    os.utime(file, ns=(0, 1_700_000_000_100_000_000))
    move.carry()
    file.write_text("two")
    os.utime(file, ns=(0, 1_700_000_000_200_000_000))
    move.carriage.sync_files()
    assert (move.there / "log").read_text() == "two"


@pytest.mark.parametrize(("linked", "late"), [(False, False), (True, False), (False, True)])
def test_a_mapped_file_is_compared_by_contents(move: Move, linked: bool, late: bool) -> None:
    (move.here / "d").mkdir()
    odd = os.fsdecode(b"d/new\nline \xff")
    plain = move.here / "d/plain"
    mapped = move.here / odd
    for path in (plain, mapped):
        path.write_bytes(b"a" * 8192)
        os.utime(path, ns=(0, 1_700_000_000_000_000_000))
    if linked:
        os.link(mapped, move.here / "other-name")
    always = (odd, "d/vanished")
    move.carry(Tree("rootfs", str(move.here), always=() if late else always))
    move.mapped = {"rootfs": list(always) if late else [], "unknown": ["x"]}
    for path in (plain, mapped):
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            memory[4096] = ord("b")
        os.utime(path, ns=(0, 1_700_000_000_000_000_000))
    os.utime(move.here / "d", ns=(0, 1_600_000_000_000_000_000))
    move.carriage.sync_files()
    assert picture(move.there)[os.fsencode(odd)] == picture(move.here)[os.fsencode(odd)]
    assert (move.there / "d").stat().st_mtime_ns == 1_600_000_000_000_000_000
    if linked:
        assert (move.there / "other-name").samefile(move.there / odd)
    # The other one shows that the times alone do not tell.
    assert (move.there / "d/plain").read_bytes() == b"a" * 8192


def test_several_trees_go_side_by_side(move: Move, tmp_path: Path) -> None:
    data = tmp_path / "data here"
    data.mkdir()
    (data / "x").write_text("x")
    (move.here / "y").write_text("y")
    move.carry(Tree("data", str(data)), Tree("rootfs", str(move.here)))
    (data / "x").write_text("changed")
    move.carriage.sync_files()
    assert (tmp_path / "data there" / "x").read_text() == "changed"
    assert (move.there / "y").read_text() == "y"
    assert len(move.told) == 4


def test_other_file_systems_are_left_alone(move: Move) -> None:
    if os.geteuid() != 0:
        pytest.skip("requires root: a mount")
    (move.here / "mnt").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(move.here / "mnt")], check=True)
    try:
        (move.here / "mnt" / "x").write_text("x")
        move.carry()
        assert list((move.there / "mnt").iterdir()) == []
    finally:
        subprocess.run(["umount", str(move.here / "mnt")], check=True)


def test_a_given_up_move_leaves_nothing(move: Move, tmp_path: Path) -> None:
    furnish(move.here)
    move.carry()
    before = picture(move.here)
    assert move.remote.abort()
    assert not (tmp_path / "made").exists()
    assert move.half.calls == ["prepare", "discard", "undo"]
    assert picture(move.here) == before


def test_a_tree_that_was_there_before_stays(move: Move) -> None:
    move.there.mkdir(parents=True)
    move.carry()
    assert move.remote.abort()
    assert move.there.exists()


def test_what_is_mounted_in_a_tree_is_not_removed(move: Move, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("requires root: a mount")
    (move.here / "mnt").mkdir()
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "x").write_text("x")
    move.carry()
    subprocess.run(["mount", "--bind", str(precious), str(move.there / "mnt")], check=True)
    try:
        assert move.remote.abort()
        assert (precious / "x").exists()
    finally:
        subprocess.run(["umount", str(move.there / "mnt")], check=True)


GOOD = f"--server {FLAGS} --timeout=60 --delete-during --stats -@-1 --numeric-ids . rootfs\n"


@pytest.mark.parametrize(
    "line",
    [
        GOOD.replace("rootfs", "/etc"),
        GOOD.replace("rootfs", "../rootfs"),
        GOOD.replace("rootfs", "data"),
        GOOD.replace("rootfs", "rootfs /etc"),
        GOOD.replace(" . ", " "),
        GOOD.replace("--server", "--server --sender"),
        GOOD.replace("--server", "--daemon"),
        GOOD.replace("--server ", ""),
        GOOD.replace("--stats", "--log-file=/tmp/x"),
        GOOD.replace("--stats", "--temp-dir=/etc"),
        GOOD.replace("--stats", "--backup-dir=/etc"),
        GOOD.replace("--stats", "--stats=x"),
        GOOD.replace(FLAGS, "-T/etc"),
        GOOD.replace(FLAGS, FLAGS.replace("-l", "-lT")),
        GOOD.replace(FLAGS, f"{FLAGS} -K"),
        GOOD.replace("-@-1", "-@9999"),
        "rsync\n",
        "x" * 5000 + "\n",
        "\0\n",
    ],
)
def test_other_arguments_are_refused(move: Move, line: str, tmp_path: Path) -> None:
    before = picture(tmp_path / "here")
    assert move.stream(line.encode()) == b""
    failure = move.remote.tree_failure("rootfs")
    assert failure is not None
    assert "rsync that are not expected" in failure.message or "no arguments" in failure.message
    assert not (tmp_path / "made").exists()
    assert picture(tmp_path / "here") == before
    move.carry()  # it lives, and takes what is right


def test_garbage_after_good_arguments_harms_nothing(move: Move) -> None:
    move.stream(GOOD.encode() + b"\xff" * 4096)
    assert move.remote.tree_failure("rootfs") is not None
    move.carry()


@pytest.mark.parametrize("name", ["none", "../x", "", "rootfs x"])
def test_a_tree_that_nobody_knows_is_refused(move: Move, name: str) -> None:
    if name:
        assert move.stream(GOOD.encode(), name) == b""
    with pytest.raises(ValueError, match="malformed name"):
        Tree(name.replace("none", "NONE"), "/x")
    move.carry()


def test_a_name_that_is_too_long_is_not_sent(move: Move) -> None:
    with pytest.raises(MigrationFailed, match="too long"):
        move.channel.open_stream(ID, "x" * ID_BYTES)


def test_a_missing_rsync_there_is_told(move: Move, monkeypatch: pytest.MonkeyPatch) -> None:
    spawn = proc.spawn

    def without(argv: Sequence[str], **how: Any) -> Any:
        return spawn(["no-such-rsync", *argv[1:]] if argv[0] == "rsync" else argv, **how)

    monkeypatch.setattr("phaul_runtime.files.tree_server.proc.spawn", without)
    with pytest.raises(MigrationFailed) as caught:
        move.carry()
    assert caught.value.host == "b"
    assert caught.value.message == "cannot start no-such-rsync: No such file or directory"
    assert "install rsync" in caught.value.hint


def test_a_missing_rsync_here_is_told(move: Move, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"PATH": "/nowhere"}
    monkeypatch.setattr(trees_module, "rsync_environment", lambda: environment)
    spawn = proc.spawn

    def by_path(argv: Sequence[str], **how: Any) -> Any:
        return spawn(["/bin/sh", *argv[1:]] if argv[0] == "sh" else argv, **how)

    monkeypatch.setattr(proc, "spawn", by_path)
    with pytest.raises(MigrationFailed, match="rsync is missing") as caught:
        move.carry()
    assert not caught.value.host
    assert "install rsync" in caught.value.hint


def test_a_failure_there_names_the_host_and_the_reason(move: Move) -> None:
    (move.here / "x").mkdir()
    move.there.parent.mkdir()
    move.there.write_text("a file stands here")
    with pytest.raises(MigrationFailed) as caught:
        move.carry()
    assert caught.value.host == "b"
    assert "Not a directory" in str(caught.value)


def test_a_missing_tree_here_is_told(move: Move) -> None:
    move.here.rmdir()
    with pytest.raises(MigrationFailed, match="No such file or directory") as caught:
        move.carry()
    assert not caught.value.host
    assert not move.there.exists()  # nobody asked for its place


def test_no_stream_after_the_end(move: Move) -> None:
    move.carry()
    assert move.remote.abort()
    with pytest.raises(MigrationFailed, match=r"the migration (is aborted|was given up)"):
        move.carriage.sync_files()


def test_files_that_vanish_are_no_failure_only_while_it_runs(
    move: Move, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # rsync has seen it, and cannot open it: as when it vanishes in between.
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    real = shutil.which("rsync")
    wrapper = bin_dir / "rsync"
    wrapper.write_text(f'#!/bin/sh\n{real} "$@" || exit\n'
                       'case "$1" in --server) ;; *) exit $(cat "$CODES");; esac\n')  # fmt: skip
    wrapper.chmod(0o755)
    codes = tmp_path / "codes"
    environment = {**os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}", "CODES": str(codes)}
    monkeypatch.setattr(trees_module, "rsync_environment", lambda: environment)
    codes.write_text("24")
    move.carry()
    with pytest.raises(MigrationFailed, match="ended with code 24"):
        move.carriage.sync_files()
    codes.write_text("23")
    with pytest.raises(MigrationFailed, match="ended with code 23"):
        move.carry()


def big(move: Move) -> None:
    """A file of which a part arrives, and not the whole, however long it takes."""
    (move.here / "big").write_bytes(os.urandom(8 << 20))
    move.channel.room = 2 << 20


@contextlib.contextmanager
def once_it_writes(move: Move, action: Callable[[], object]) -> Iterator[None]:
    """While in here, do `action` as soon as a part of `big` is there."""

    def watch() -> None:
        wait(lambda: any(move.there.glob(".big.*")))
        action()

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    thread.join()


def test_cancelling_ends_it(move: Move) -> None:
    big(move)
    with once_it_writes(move, move.cancellation.request), pytest.raises(Cancelled):
        move.carry()
    assert not (move.there / "big").exists()
    assert move.remote.abort()
    assert not move.there.exists()


def test_giving_up_there_ends_it(move: Move) -> None:
    big(move)
    end = move.agent.service.find(ID).abort
    with once_it_writes(move, end), pytest.raises(MigrationFailed):
        move.carry()
    assert not move.there.exists()


def test_a_lost_agent_ends_it(move: Move, monkeypatch: pytest.MonkeyPatch) -> None:
    big(move)
    monkeypatch.setattr(move.remote._stub, "Beat", fail)

    def beat() -> None:
        move.remote.beat_every(0.01, 0.0, print)

    with once_it_writes(move, beat), pytest.raises(MigrationFailed, match="no sign of life"):
        move.carry()
    assert not (move.there / "big").exists()


def fail(*_: object, **__: object) -> None:
    raise ValueError("closed")


def test_a_silent_other_side_has_a_deadline(move: Move, monkeypatch: pytest.MonkeyPatch) -> None:
    silent, far = socket.socketpair()
    monkeypatch.setattr(move.remote, "_prepare_s", 1.0)
    move.carry()
    monkeypatch.setattr(move.channel, "open_stream", lambda *_: silent)
    with far, pytest.raises(MigrationFailed, match=r"did not end within|timeout"):
        move.carriage.sync_files()
