"""Directory trees of a target, carried by rsync over the agent's own channel.

The source's rsync gets a connection to the agent in place of a remote shell (`channel-rsh`); the
agent starts its rsync on the other end (`treeserver`). Trees are synchronised while the target
runs, and once more, with what changed since, in the freeze. A tree that is made for the move goes
before all others, once.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, replace
from pathlib import Path

from phaul_runtime.engine.targets import Tree
from phaul_runtime.errors import DestinationError, MigrationFailed, PhaulError
from phaul_runtime.events import Listener, TreeProgress, TreeSynced
from phaul_runtime.system import proc
from phaul_runtime.system.cancel import Cancellation
from phaul_runtime.system.pathwalk import open_path

INSTALL_RSYNC = "apt-get install rsync, on both hosts"
# In the source's journal: the trees of which `SourceHalf.stage` has begun.
STAGED = "staged"
_SHELL = Path(__file__).with_name("channel-rsh")
# Without nanoseconds (-1), what was written twice within a second would be missed.
_OPTIONS = (
    "-aHAXS",
    "--numeric-ids",
    "--one-file-system",
    "--modify-window=-1",
    "--stats",
    "--no-human-readable",
    "--no-s",
)
_SOME_FAILED = 23
_SOME_VANISHED = 24
_NOT_FOUND = 127
# A pass that took so long is worth another before pre-copy, and its results are old so soon.
_LONG_S = 5.0
_OLD_S = 2.0
_TELL_S = 2.0
_AT_ONCE = 4
_END_S = 5.0
_LOG_LINES = 5
_WRITTEN = re.compile(r"^wchar: ([0-9]+)$", re.MULTILINE)


def trees_to_carry(
    trees: Iterable[Tree], places: Mapping[str, str], there: str, *, same_host: bool
) -> list[Tree]:
    """Those of `trees` that are not at their place already; `places`: where each lies there.

    One with `first` that has no place is not needed there.

    Raises:
        DestinationError: the destination has no place for another.
        MigrationFailed: on one host, a tree and its place contain each other.
    """
    carried = []
    for tree in trees:
        if tree.name not in places:
            if tree.first:
                continue
            raise DestinationError(f"its engine has no place for the tree {tree.name}", host=there)
        if same_host:
            old, new = Path(tree.path).resolve(), Path(places[tree.name]).resolve()
            if old == new:
                continue
            if old in new.parents or new in old.parents:
                raise MigrationFailed(f"tree {tree.name}: {old} and {new} contain each other")
        carried.append(tree)
    return carried


def rsync_environment() -> dict[str, str]:
    """Ours without what changes rsync's behaviour or its words."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RSYNC_")}
    return proc.environment({"LC_ALL": "C"}, own)


class TreeSender:
    """The source's side: runs rsync for each tree, and counts.

    Args:
        trees: what to carry.
        open_stream: a connection for a tree by its name, claimed at the agent.
        explain: why the agent ended a tree's stream; None if it knows nothing.
        there: the agent's host, for messages.
        timeout_s: longest silence of an rsync, and the longest final pass.
        cancellation: ends a pass.
        listener: told of each tree and pass.
        mapped: asked in the freeze; adds to `Tree.always`, by the trees' names.
    """

    def __init__(
        self,
        trees: Sequence[Tree],
        *,
        open_stream: Callable[[str], socket.socket],
        explain: Callable[[str], PhaulError | None],
        there: str,
        timeout_s: float,
        cancellation: Cancellation,
        listener: Listener,
        mapped: Callable[[], Mapping[str, Iterable[str]]],
    ) -> None:
        self._trees = tuple(trees)
        self._open_stream = open_stream
        self._explain = explain
        self._there = there
        self._timeout_s = timeout_s
        self._cancellation = cancellation
        self._listener = listener
        self._mapped = mapped
        self._running: dict[int, tuple[str, proc.Process, socket.socket]] = {}
        # A signal may ask to stop in the thread that has it.
        self._lock = threading.RLock()
        self._stopped = False
        self._reason: PhaulError | None = None
        self._began = 0.0
        self.files = 0
        self.bytes = 0

    def sync(self) -> None:
        """Carry all trees while the target runs; what vanishes meanwhile is no failure.

        Raises:
            MigrationFailed: a tree cannot be carried.
            Cancelled: by the user.
        """
        self._pass(self._sync_tree)
        if time.monotonic() - self._began > _LONG_S:
            self._pass(self._sync_tree)

    def carry_once(self) -> None:
        """Carry all trees, of which nothing changes any more: all of it arrives.

        Raises as `sync`.
        """
        self._pass(self._carry_tree)

    def freshen(self) -> None:
        """Just before the freeze: once more, if the last pass began some time ago."""
        if self._trees and time.monotonic() - self._began > _OLD_S:
            self._pass(self._sync_tree)

    def finish(self) -> None:
        """In the freeze: what changed since, and `Tree.always` by contents. Raises as `sync`."""
        mapped = self._mapped()
        self._trees = tuple(
            replace(tree, always=tuple(dict.fromkeys((*tree.always, *mapped.get(tree.name, ())))))
            for tree in self._trees
        )
        self._pass(self._finish_tree, timeout_s=self._timeout_s)

    def stop(self, reason: PhaulError | None = None) -> None:
        """End what runs and refuse what comes, with that reason, if given; never raises."""
        with self._lock:
            self._stopped = True
            self._reason = self._reason or reason
            running = tuple(self._running.values())
        for _, process, stream in running:
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)
            with contextlib.suppress(OSError):
                process.terminate()

    # -- passes ----------------------------------------------------------------------------

    def _pass(
        self,
        carry: Callable[[Tree, float | None], TreeSynced],
        *,
        timeout_s: float | None = None,
    ) -> None:
        """All trees, side by side; the first failure ends the others."""
        if not self._trees:
            return
        self._began = time.monotonic()
        deadline = None if timeout_s is None else self._began + timeout_s
        failures: list[BaseException] = []

        def done(future: Future[TreeSynced]) -> None:
            if error := future.exception():
                failures.append(error)
                self.stop()

        with (
            self._cancellation.interrupt_with(self.stop),
            ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="tree") as pool,
        ):
            futures = [pool.submit(carry, tree, deadline) for tree in self._trees]
            for future in futures:
                future.add_done_callback(done)
            while wait_for(futures, _TELL_S).not_done:
                self._tell()
        self._cancellation.check()
        if failures:
            raise self._reason or failures[0]
        for event in (future.result() for future in futures):
            self.files += event.files
            self.bytes += event.bytes
            self._listener(event)

    def _tell(self) -> None:
        """How far each rsync is that runs."""
        with self._lock:
            running = [(name, process.pid) for name, process, _ in self._running.values()]
        for name, pid in running:
            sent = _written(pid)
            if sent is not None:
                self._listener(TreeProgress(name, sent))

    def _carry_tree(self, tree: Tree, _deadline: float | None) -> TreeSynced:
        begun = time.monotonic()
        files, count, _ = self._run(_Run(tree, ("--delete-during",)), None)
        return TreeSynced(tree.name, files, count, (time.monotonic() - begun) * 1000, final=False)

    def _sync_tree(self, tree: Tree, _deadline: float | None) -> TreeSynced:
        begun = time.monotonic()
        run = _Run(tree, ("--delete-during",), good=(0, _SOME_VANISHED, _SOME_FAILED))
        files, count, code = self._run(run, None)
        if code == _SOME_FAILED:
            # A file that shrinks while it is read says no more than a full disk does: ask twice.
            again = self._run(_Run(tree, run.options, good=(0, _SOME_VANISHED)), None)
            files, count = files + again[0], count + again[1]
        return TreeSynced(tree.name, files, count, (time.monotonic() - begun) * 1000, final=False)

    def _finish_tree(self, tree: Tree, deadline: float | None) -> TreeSynced:
        begun = time.monotonic()
        files = count = 0
        for run in (_Run(tree, ("--delete-during",)), *_by_contents(tree)):
            more_files, more, _ = self._run(run, deadline)
            files, count = files + more_files, count + more
        return TreeSynced(tree.name, files, count, (time.monotonic() - begun) * 1000, final=True)

    def _run(self, run: _Run, deadline: float | None) -> tuple[int, int, int]:
        """One rsync; returns files and bytes sent, and its exit code."""
        tree = run.tree
        left = None if deadline is None else max(0.1, deadline - time.monotonic())
        with (
            _directory_of(tree) as directory,
            self._open_stream(tree.name) as stream,
            _as_file(run.paths) as listed,
        ):
            names = "/dev/null" if listed is None else f"/proc/self/fd/{listed}"
            argv = ["sh", str(_SHELL), "run", names, "rsync", *_OPTIONS, *run.options]
            argv += [f"--timeout={max(1, round(self._timeout_s))}", f"--rsh=sh '{_SHELL}'"]
            if listed is not None:
                argv += ["--from0", "--files-from=-"]
            argv += ["--", "./", f"channel:{tree.name}"]
            process = proc.spawn(
                argv,
                stdin=stream.fileno(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=() if listed is None else (listed,),
                # The directory itself, whatever has its name by now.
                cwd=f"/proc/self/fd/{directory}",
                env=rsync_environment(),
            )
            try:
                self._enter(tree.name, process, stream)
                out, err = proc.collect(process, timeout_s=left)
                if process.returncode not in run.good:
                    _await_end(stream)
            except PhaulError as error:
                raise MigrationFailed(
                    f"tree {tree.name}: rsync: {error.message}", host=self._there
                ) from error
            finally:
                with self._lock:
                    self._running.pop(process.pid, None)
                # The script's children end with the connection.
                with contextlib.suppress(OSError):
                    stream.shutdown(socket.SHUT_RDWR)
                proc.end(process)
        if process.returncode not in run.good:
            raise self._failure(tree, process.returncode, err)
        return *stats(out), process.returncode

    def _enter(self, name: str, process: proc.Process, stream: socket.socket) -> None:
        with self._lock:
            if self._stopped:
                raise MigrationFailed("it was stopped")
            self._running[process.pid] = (name, process, stream)

    def _failure(self, tree: Tree, code: int, err: bytes) -> PhaulError:
        """What to tell: what the agent says of it, else what rsync printed."""
        lines = [line for line in err.decode(errors="replace").splitlines() if line.strip()]
        if code == _NOT_FOUND:
            return MigrationFailed(f"tree {tree.name}: rsync is missing", hint=INSTALL_RSYNC)
        if not self._stopped and (theirs := self._explain(tree.name)):
            return theirs
        first = lines[0].removeprefix("rsync: ") if lines else f"rsync ended with code {code}"
        there = any(part in first for part in ("[receiver]", "[Receiver]", "[generator]"))
        return MigrationFailed(
            f"tree {tree.name}: {first}",
            host=self._there if there else "",
            log=lines[1:_LOG_LINES],
        )


@dataclass(frozen=True)
class _Run:
    """One run of rsync: with all of a tree, or with `paths` of it; `good`: exit codes."""

    tree: Tree
    options: tuple[str, ...]
    paths: tuple[str, ...] = ()
    good: tuple[int, ...] = (0,)


def _by_contents(tree: Tree) -> list[_Run]:
    """The runs for what has to be compared by contents; a file that is gone is left out."""
    single: list[str] = []
    linked: list[str] = []
    for path in tree.always:
        with contextlib.suppress(OSError):
            info = os.lstat(Path(tree.path, path))
            (single if info.st_nlink == 1 else linked).append(path)
    runs = []
    if single:
        runs.append(_Run(tree, ("--ignore-times",), tuple(single)))
    if linked:
        # A new file in its place would leave its other names behind.
        runs.append(_Run(tree, ("--ignore-times", "--inplace"), tuple(linked)))
    return runs


def _written(pid: int) -> int | None:
    """Bytes that a process has written, of which an rsync that sends has sent nearly all.

    None if it has ended, or if the kernel does not count them.
    """
    try:
        # Not the process's own: that has what its ended children wrote, who passed on the same.
        text = Path(f"/proc/{pid}/task/{pid}/io").read_text(encoding="ascii")
    except OSError:
        return None
    found = _WRITTEN.search(text)
    return int(found[1]) if found else None


def _await_end(stream: socket.socket) -> None:
    """Wait until the agent has closed a stream that failed: from then on it can say why."""
    with contextlib.suppress(OSError):
        stream.settimeout(_END_S)
        stream.shutdown(socket.SHUT_WR)
        while stream.recv(1 << 16):
            pass


@contextlib.contextmanager
def _directory_of(tree: Tree) -> Iterator[int]:
    """A descriptor of a tree's directory, to which no link of others leads.

    Raises:
        MigrationFailed: it cannot be reached.
    """
    try:
        directory = open_path(tree.path)
    except OSError as error:
        raise MigrationFailed(
            f"tree {tree.name}: {error.filename or tree.path}: {error.strerror}"
        ) from error
    try:
        yield directory
    finally:
        os.close(directory)


@contextlib.contextmanager
def _as_file(paths: Sequence[str]) -> Iterator[int | None]:
    """A descriptor of a file in memory with NUL-ended paths; None if there are none."""
    if not paths:
        yield None
        return
    with os.fdopen(os.memfd_create("files-from"), "wb") as file:
        file.write(b"".join(os.fsencode(path) + b"\0" for path in paths))
        file.flush()
        # The script uses descriptors below 10.
        fd = fcntl.fcntl(file.fileno(), fcntl.F_DUPFD_CLOEXEC, 10)
    try:
        yield fd
    finally:
        os.close(fd)


def stats(out: bytes) -> tuple[int, int]:
    """Files and bytes sent, from the output of `--stats`; 0 for what it does not say."""
    found = {}
    for line in out.decode(errors="replace").splitlines():
        name, _, value = line.partition(": ")
        digits = value.partition(" ")[0].replace(",", "")
        if digits.isdigit():
            found[name] = int(digits)
    return (
        found.get("Number of regular files transferred", 0),
        found.get("Total bytes sent", 0),
    )
