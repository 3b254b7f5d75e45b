"""The destination's side of `tree_sender`: rsync as a server at the end of a connection.

The client says with which options; of these only those that `tree_sender` uses are taken, and where
a tree lies is said by the engine's half here, never by the client.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from phaul_runtime.cutover.journal import Journal
from phaul_runtime.engine.targets import TREE_NAME
from phaul_runtime.errors import DestinationError, PhaulError, Refused
from phaul_runtime.files.tree_sender import INSTALL_RSYNC, rsync_environment
from phaul_runtime.memory.image_dirs import mounts_below, remove_tree
from phaul_runtime.system import proc
from phaul_runtime.system.filemark import Mark, mark_of
from phaul_runtime.system.pathwalk import make_directory, open_path, walk

log = logging.getLogger(__name__)

_ARGUMENTS_BYTES = 1024
_ARGUMENTS_S = 10.0
_ENDED_S = 10.0
_POLL_S = 0.005
_LOG_LINES = 5
# `e.` begins what the client's rsync is capable of.
_FLAGS = re.compile(r"-[AHIDSXglopRrtx]+e\.[A-Za-z]*")
_LONG = re.compile(
    r"--delete-during|--stats|--numeric-ids|--inplace|--timeout=[0-9]{1,9}"
    r"|-@-1|--modify-window=-1"
)


def checked_arguments(line: str, name: str) -> list[str]:
    """The options of an `rsync --server` command line for the tree `name`, without its path.

    Raises:
        DestinationError: it has anything that `tree_sender` does not use.
    """
    match line.split(" "):
        case ["--server", flags, *options, ".", target] if (
            target == name and _FLAGS.fullmatch(flags) and all(map(_LONG.fullmatch, options))
        ):
            return ["--server", flags, *options]
    raise DestinationError(f"arguments of rsync that are not expected: {line[:200]!r}")


def read_line(channel: socket.socket) -> str:
    """The line before rsync's own protocol; nothing after it is read.

    Empty if the client left, which then knows why.

    Raises:
        DestinationError: there is none.
    """
    channel.settimeout(_ARGUMENTS_S)
    line = bytearray()
    while len(line) < _ARGUMENTS_BYTES:
        try:
            byte = channel.recv(1)
        except OSError as error:
            raise DestinationError(f"no arguments of rsync came: {error}") from error
        if byte == b"\n":
            channel.settimeout(None)
            return line.decode("ascii", "backslashreplace")
        if not byte:
            return ""
        line += byte
    raise DestinationError("no arguments of rsync came")


class TreeServer:
    """The streams of one migration's trees.

    Args:
        journal: of the migration: what is made is noted there before.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._places: dict[str, Path] = {}
        self._running: dict[str, proc.Process] = {}
        self._failures: dict[str, PhaulError] = {}
        self._lock = threading.Lock()

    def place(self, places: Mapping[str, Path]) -> None:
        """Where each tree lies, as the engine's half says.

        Raises:
            DestinationError: not by an absolute path.
        """
        for name, path in places.items():
            if not path.is_absolute() or ".." in path.parts or not path.name:
                raise DestinationError(f"the engine puts the tree {name} to {str(path)!r}")
        self._places = dict(places)

    @property
    def places(self) -> Mapping[str, Path]:
        """What `place` was told."""
        return self._places

    @property
    def failures(self) -> Mapping[str, PhaulError]:
        """Why the last stream of a tree failed, where this side knows a reason."""
        with self._lock:
            return dict(self._failures)

    def failed(self, name: str, error: PhaulError) -> None:
        """A stream of that tree came to nothing."""
        log.warning("tree %s: %s", name, error)
        if TREE_NAME.fullmatch(name):
            with self._lock:
                self._failures[name] = error

    def start(self, name: str, line: str, channel: socket.socket) -> proc.Process:
        """Start rsync for a tree on a connection; the caller keeps steps away meanwhile.

        Raises:
            PhaulError: the arguments are refused, or it cannot be started.
        """
        if name not in self._places:
            raise DestinationError(f"no tree {name[:40]!r} in this migration")
        options = checked_arguments(line, name)
        with self._made(self._places[name]) as directory, self._lock:
            self._failures.pop(name, None)
            if name in self._running:
                raise DestinationError(f"tree {name} has a stream already")
            try:
                process = proc.spawn(
                    ["rsync", *options, ".", "./"],
                    stdin=channel.fileno(),
                    stdout=channel.fileno(),
                    stderr=subprocess.PIPE,
                    # The directory itself, whatever has its name by now.
                    cwd=f"/proc/self/fd/{directory}",
                    env=rsync_environment(),
                )
            except Refused as error:
                raise DestinationError(error.message, hint=INSTALL_RSYNC) from error
            self._running[name] = process
        return process

    def attend(self, name: str, process: proc.Process) -> None:
        """Wait until that rsync has ended: with its connection, or by `stop`.

        Raises:
            DestinationError: it failed, and said here why, not to the client.
        """
        try:
            _, said = proc.collect(process)
        finally:
            proc.end(process)
            with self._lock:
                self._running.pop(name, None)
        lines = [line for line in said.decode(errors="replace").splitlines() if line.strip()]
        if process.returncode < 0:
            raise DestinationError(f"tree {name}: rsync died of signal {-process.returncode}")
        if process.returncode and lines:
            raise DestinationError(
                f"tree {name}: {lines[0].removeprefix('rsync: ')}", log=lines[1:_LOG_LINES]
            )

    def stop(self) -> None:
        """End every rsync; those who attend it clean up."""
        with self._lock:
            running = tuple(self._running.values())
        for process in running:
            with contextlib.suppress(OSError):
                process.terminate()

    def wait_ended(self) -> None:
        """Wait until no rsync writes any more: the client has seen them all end.

        Raises:
            DestinationError: one does not.
        """
        deadline = time.monotonic() + _ENDED_S
        while self._running:
            if time.monotonic() > deadline:
                raise DestinationError("a tree is still being carried")
            time.sleep(_POLL_S)

    @contextlib.contextmanager
    def _made(self, path: Path) -> Iterator[int]:
        """A descriptor of a tree's directory, which is made where it is missing.

        Its mode, owner and times are the source's, by rsync. No link of others leads there.
        """
        try:
            self._make(path)
            directory = open_path(str(path))
        except OSError as error:
            where = f": {error.filename}" if isinstance(error.filename, str) else ""
            raise DestinationError(f"cannot create {path}{where}: {error.strerror}") from error
        try:
            yield directory
        finally:
            os.close(directory)

    def _make(self, path: Path) -> None:
        with walk(str(path)) as (above, missing), contextlib.ExitStack() as opened:
            wanted = [path, *path.parents][: len(missing)]
            at = above
            for made in reversed(wanted):
                last = made == path
                self._journal.add("tree_made" if last else "tree_parents", str(made))
                at = make_directory(made.name, 0o700 if last else 0o711, at)
                opened.callback(os.close, at)
                if last:
                    self._journal.add("tree_marks", [str(path), list(mark_of(at))])

    def undo(self) -> None:
        """The move failed: remove the trees that were not there before; idempotent.

        One that was there keeps what was carried into it.
        """
        facts = self._journal.facts
        marks = {path: Mark(*mark) for path, mark in facts.get("tree_marks", [])}
        for path in facts.get("tree_made", []):
            if mounts := mounts_below(Path(path)):
                log.warning("%s is left: %s is mounted in it", path, mounts[0])
            else:
                remove_tree(Path(path), marks.get(path))
        for path in reversed(facts.get("tree_parents", [])):
            with contextlib.suppress(OSError):  # somebody else put something there
                Path(path).rmdir()
