"""An engine without CRIU that obeys the contract, and its case for the conformance suite.

A target is the directory of a running `fakevictim`, a plain child process. Its image is a tree that
goes first; the destination half restores nothing without it. For tests of what drives engines: it
needs no root, no CRIU and no second host, and moves in milliseconds. It dumps no memory by CRIU:
give its `PhaulClient` a `NoCriu`, and a `PhaulRemote` that does nothing. How a test makes a step
fail: override it in a subclass, as tests/contract/test_fake.py does.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from phaul_runtime.criu.session import Criu
from phaul_runtime.engine.findings import OK, REFUSED, Finding
from phaul_runtime.engine.interface import (
    Claim,
    DestinationHalf,
    Engine,
    Handover,
    Inspection,
    SourceHalf,
)
from phaul_runtime.engine.targets import Tree
from phaul_runtime.errors import (
    DestinationError,
    MigrationFailed,
    NoSuchTarget,
    PhaulError,
    Refused,
    TargetGone,
)
from phaul_runtime.library.api import Outcome, PhaulConfig, PhaulLocal
from phaul_runtime.memory.image_dirs import RESUMED, new_directory, remove_tree
from phaul_runtime.system import proc
from phaul_runtime.system.cancel import Cancellation
from phaul_runtime.system.poll import readable
from phaul_runtime.system.procfs import PROC, start_time, stat_fields
from phaul_runtime.testing import fakevictim
from phaul_runtime.testing.case import Case, Place, Told

IMAGE = "memory.img"
HELD = "held.json"
MADE = "made.json"
IMAGE_TREE = "image"
CGROUP = "cgroup"
_STAGED = "staged"
_LAYER = "layer"
_PROGRAM = Path(fakevictim.__file__)
_WITHIN_S = 20.0
_POLL_S = 0.005


@dataclass(frozen=True)
class _Process:
    """A process, told from a later one with its pid."""

    pid: int
    started: int

    @classmethod
    def at(cls, pid: int) -> _Process:
        return cls(pid, _started(pid))

    @property
    def alive(self) -> bool:
        return self.started > 0 and _started(self.pid) == self.started

    def kill(self) -> None:
        if self.alive:
            os.kill(self.pid, signal.SIGKILL)

    def wait_dead(self) -> bool:
        deadline = time.monotonic() + _WITHIN_S
        while self.alive and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return not self.alive


def _started(pid: int) -> int:
    """Its start in clock ticks since boot; 0 if it does not exist, or is a zombie."""
    home = PROC / str(pid)
    return 0 if "".join(stat_fields(home)[:1]) in "ZX" else start_time(home)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _victim(directory: Path) -> _Process:
    return _Process.at(int(_read(directory / fakevictim.VICTIM).get("pid", 0)))


def _spawn(directory: Path, *more: str, **pipes: Any) -> proc.Process:
    return proc.spawn([sys.executable, "-I", str(_PROGRAM), str(directory), *more], **pipes)


def _line(process: proc.Process, within_s: float = _WITHIN_S) -> str:
    """The next line that it prints; empty if it ended, or printed none in time."""
    if process.stdout is None or not readable(process.stdout, within_s=within_s):
        return ""
    return process.stdout.readline().decode().strip()


class FakeOptions(BaseModel):
    """There are none."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FakeEngine(Engine):
    """The engine. What is to fail in a test is overridden in a subclass."""

    name = "fake"
    options_model = FakeOptions

    def source(self, target: str, options: Any, *, criu_log_level: int) -> SourceHalf:
        """See `Engine`; `target` is a victim's directory."""
        return FakeSource(target)

    def destination(self, options: Any, *, criu_log_level: int, hold_s: float) -> DestinationHalf:
        return FakeDestination(hold_s)


class FakeSource(SourceHalf):
    """The source half."""

    def __init__(self, target: str) -> None:
        self.directory = Path(target)
        self._process = _Process(0, 0)

    def inspect(self) -> Inspection:
        process = _victim(self.directory)
        if not process.alive:
            raise NoSuchTarget(f"nothing runs in {self.directory}")
        self._process = process
        return Inspection(
            pid=process.pid,
            memory=fakevictim.PAGES * len(fakevictim.content(0, 0)),
            manifest={"path": str(self.directory)},
            findings=[Finding("target", OK, f"pid {process.pid}")],
            trees=[Tree(IMAGE_TREE, str(self.directory.absolute() / _STAGED), first=True)],
        )

    def local(self, handover: Handover, cancellation: Cancellation) -> PhaulLocal:
        return FakeLocal(self, handover)

    def identity(self) -> Mapping[str, Any]:
        return {"pid": self._process.pid, "started": self._process.started}

    def recall(self, identity: Mapping[str, Any]) -> None:
        self._process = _Process(int(identity["pid"]), int(identity["started"]))

    def stage(self, name: str, cancellation: Cancellation) -> None:
        staged = self.directory / _STAGED
        staged.mkdir(mode=0o700, exist_ok=True)
        cancellation.check()
        (staged / _LAYER).write_text(IMAGE_TREE, encoding="utf-8")

    def unstage(self, name: str) -> None:
        remove_tree(self.directory / _STAGED)

    def throttle_cgroup(self) -> Path:
        """See `SourceHalf`: files in a victim's directory that stand for a cgroup."""
        group = self.directory / CGROUP
        if not (group / "cpu.max").exists():
            raise Refused("the victim has no cgroup of its own")
        return group

    def gone(self) -> bool:
        return not self._process.alive

    def end_rest(self) -> None:
        self._process.kill()

    def finish(self) -> Sequence[str]:
        if self.gone():
            for name in (fakevictim.VICTIM, fakevictim.CONTROL):
                (self.directory / name).unlink(missing_ok=True)
        return []

    def rollback(self) -> None:
        """See `SourceHalf`: the end of the connection has let it run."""


class FakeLocal(PhaulLocal):
    """The final dump: a connection to the victim, which stands still while it lasts."""

    def __init__(self, source: FakeSource, handover: Handover) -> None:
        self.source = source
        self.handover = handover

    def dump_copy_restore(
        self, criu: Criu, config: PhaulConfig, last_client_images_dir: str | None
    ) -> Outcome:
        images_dir = new_directory(Path(config.wdir), "final")
        self.handover.freezing(self.source.identity())
        frozen_at = time.monotonic()
        with self._connect() as connection:
            memory = self._freeze(connection)
            self.handover.stopped()
            self.write(images_dir / IMAGE, memory)
            self.handover.prepare(images_dir)
            return self.give_up(connection, frozen_at)

    def _freeze(self, connection: socket.socket) -> dict[str, Any]:
        try:
            connection.sendall(b"freeze\n")
            with connection.makefile("rb") as lines:
                memory: dict[str, Any] = json.loads(lines.readline())
        except (OSError, ValueError) as error:
            raise TargetGone("the victim has ended by itself") from error
        return memory

    def write(self, image: Path, memory: dict[str, Any]) -> None:
        """Write what was dumped."""
        image.write_text(json.dumps(memory), encoding="utf-8")

    def give_up(self, connection: socket.socket, frozen_at: float) -> Outcome:
        """The destination holds its copy: end this one, and let that one run."""
        with contextlib.suppress(OSError):  # dead already: the other copy is the one all the same
            connection.sendall(b"die\n")
        return self.handover.commit(self.source.gone, frozen_at)

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        # By way of a descriptor: a path of a socket may not be longer than 108 bytes.
        directory = os.open(self.source.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            connection.settimeout(_WITHIN_S)
            connection.connect(f"/proc/self/fd/{directory}/{fakevictim.CONTROL}")
        except OSError as error:
            connection.close()
            raise MigrationFailed(f"{self.source.directory}: {error.strerror}") from error
        finally:
            os.close(directory)
        return connection


class FakeDestination(DestinationHalf):
    """The destination half."""

    def __init__(self, hold_s: float) -> None:
        self.hold_s = hold_s
        self.directory: Path | None = None
        self._id = ""
        self._resumed = False
        self._images_dir = Path()
        self.process: proc.Process | None = None

    def check(self, manifest: Mapping[str, Any]) -> Sequence[Finding]:
        path = Path(manifest["path"])
        if _victim(path).alive:
            return [Finding("name", REFUSED, f"something runs in {path} already")]
        return [Finding("name", OK, f"{path} is free")]

    def claim(self, manifest: Mapping[str, Any]) -> Claim:
        return Claim(str(manifest["path"]))

    def prepare(self, manifest: Mapping[str, Any], migration_id: str) -> None:
        self.directory, self._id = Path(manifest["path"]), migration_id
        made = self.directory / MADE
        if _read(made).get("id") == migration_id:
            return
        try:
            self.directory.mkdir(mode=0o700)
            made.write_text(json.dumps({"id": migration_id}), encoding="utf-8")
        except OSError as error:
            raise DestinationError(f"cannot make {self.directory}: {error.strerror}") from error

    def trees(self) -> Mapping[str, Path]:
        """See `DestinationHalf`: the image, until it is there."""
        if self.directory is None or _read(self.directory / MADE).get("image"):
            return {}
        return {IMAGE_TREE: self.directory / IMAGE_TREE}

    def arrived(self, name: str, cancellation: Cancellation) -> None:
        directory = self.directory or Path("/")
        cancellation.check()
        try:
            image = (directory / IMAGE_TREE / _LAYER).read_text(encoding="utf-8")
        except OSError as error:
            raise DestinationError(f"the image is not whole: {error.strerror}") from error
        remove_tree(directory / IMAGE_TREE)
        (directory / MADE).write_text(json.dumps({"id": self._id, "image": image}), "utf-8")

    def restore(self, criu: Criu, images_dir: Path, *, lazy: bool = False) -> int:
        if self.directory is None:
            raise MigrationFailed("nothing was prepared")
        if not _read(self.directory / MADE).get("image"):
            raise DestinationError("the image did not arrive")
        self._resumed, self._images_dir = False, images_dir
        self.process = _spawn(
            self.directory,
            *(str(images_dir / IMAGE), str(self.hold_s)),
            stdin=proc.PIPE,
            stdout=proc.PIPE,
        )
        held = _Process.at(self.process.pid)
        (self.directory / HELD).write_text(
            json.dumps({"pid": held.pid, "started": held.started}), encoding="utf-8"
        )
        if _line(self.process) != "held":
            self.discard()
            raise DestinationError(f"{images_dir} cannot be restored")
        return self.process.pid

    def resume(self) -> float:
        process, self.process = self.process, None
        if process is None or process.stdin is None or self.directory is None:
            raise MigrationFailed("nothing was restored")
        try:
            process.stdin.write(b"run\n")
            process.stdin.flush()
        except OSError as error:
            raise DestinationError("the held copy has ended") from error
        if _line(process) != "running":
            raise DestinationError("the held copy does not run")
        resumed_at = time.monotonic()
        self._resumed = True
        # As CRIU does. A successor may prepare, and its `discard` finds what was held, as the
        # process engine's does in its cgroup: what keeps it from that is the core alone.
        (self._images_dir / RESUMED).touch()
        return resumed_at

    def wait_let_go(self) -> None:
        """See `DestinationHalf`: a held copy ends with the process that holds it."""
        if self.process is None and not self._runs():
            self._held().wait_dead()

    def discard(self) -> None:
        """See `DestinationHalf`: what runs is ended too, if another object let it run."""
        if self.directory is None or self._resumed:
            return
        self._held().kill()
        if self.process is not None:
            proc.end(self.process)
            self.process = None
        self._held().wait_dead()
        (self.directory / HELD).unlink(missing_ok=True)

    def undo(self) -> None:
        if self.directory is not None and _read(self.directory / MADE).get("id") == self._id:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _runs(self) -> bool:
        """It is the victim: it was let run."""
        return self.directory is not None and _victim(self.directory) == self._held()

    def _held(self) -> _Process:
        held = _read((self.directory or Path("/")) / HELD)
        return _Process(int(held.get("pid", 0)), int(held.get("started", 0)))


class FakeCase(Case):
    """The fake engine for the conformance suite; victims live in directories under `root`."""

    pause_s = 0.15
    within_s = 20.0

    def __init__(self, root: Path, engine: FakeEngine | None = None) -> None:
        self.engine = engine or FakeEngine()
        self._root = root
        self._count = 0
        self._started: list[proc.Process] = []

    def _directory(self, place: Place) -> Path:
        return self._root / f"{self._count}-{place.value}"

    def start(self) -> str:
        self._count += 1
        directory = self._directory(Place.SOURCE)
        directory.mkdir(parents=True)
        process = _spawn(directory, stdout=proc.PIPE)
        self._started.append(process)
        if _line(process) != "running":
            raise PhaulError("the victim did not start")
        return str(directory)

    def missing(self) -> str:
        return str(self._root / "missing")

    def told(self, place: Place) -> Told | None:
        status = _read(self._directory(place) / fakevictim.STATUS)
        return Told(**status) if status else None

    def alive(self, place: Place) -> bool:
        return bool(self._processes(self._directory(place)))

    def _processes(self, directory: Path) -> list[_Process]:
        """Found by their command lines."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if str(_PROGRAM).encode() in words and str(directory).encode() in words:
                found.append(_Process.at(int(entry.name)))
        return [process for process in found if process.alive]

    def leftovers(self, *, undone: bool) -> Sequence[str]:
        directory = self._directory(Place.DESTINATION)
        found = [f"process {process.pid}" for process in self._processes(directory)]
        found += [str(directory / HELD)] if (directory / HELD).exists() else []
        return [*found, str(directory)] if undone and directory.exists() else found

    def clear(self) -> None:
        for place in Place:
            for process in self._processes(self._directory(place)):
                process.kill()
                process.wait_dead()
            shutil.rmtree(self._directory(place), ignore_errors=True)
        while self._started:
            proc.end(self._started.pop())

    def criu(self) -> Criu | None:
        """See `Case`: none is used."""
        return None

    def there(self, manifest: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `Case`: another directory."""
        return {**manifest, "path": str(self._directory(Place.DESTINATION))}

    def taken(self, manifest: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """See `Case`: the directory in which the victim runs."""
        return manifest
