"""The process engine: a plain process and its descendants, by CRIU alone."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from phaul_engines.common import netlock
from phaul_engines.common.members import LET_GO_WITHIN_S, POLL_S, Members
from phaul_engines.common.netlock import Connection
from phaul_engines.common.proctree import (
    Process,
    Tree,
    established_connections,
    pipes_to_others,
    read_process,
    read_tree,
)
from phaul_engines.common.tracked import TrackedSource
from phaul_engines.process.options import ProcessOptions
from phaul_runtime.criu.held_restore import HeldRestore
from phaul_runtime.criu.session import Criu, CriuNotify, criu_opts, rpc
from phaul_runtime.criu.stats import DumpStats, read_dump_stats
from phaul_runtime.engine import (
    OK,
    REFUSED,
    Claim,
    DestinationHalf,
    Engine,
    Finding,
    Handover,
    Inspection,
    SourceHalf,
)
from phaul_runtime.errors import (
    MigrationFailed,
    NoSuchTarget,
    PhaulError,
    Refused,
    TargetGone,
    UsageError,
)
from phaul_runtime.files.compare import InUse, gather_all
from phaul_runtime.library.api import Outcome, PhaulConfig, PhaulLocal
from phaul_runtime.memory.image_dirs import new_directory, relative_parent
from phaul_runtime.system import cgroup
from phaul_runtime.system.cancel import Cancellation

DUMP_LOG = "dump.log"
RESTORE_LOG = "restore.log"
RESTORE_WITHIN_S = 300.0
# Namespaces of a container, whose engine knows them. (Time: CRIU restores into one of its own.)
_FOREIGN = ("mnt", "net", "user")
_MIB = 1 << 20


class ProcessEngine(Engine):
    """`--engine process PID`."""

    name = "process"
    options_model = ProcessOptions

    def source(self, target: str, options: Any, *, criu_log_level: int) -> SourceHalf:
        """See `Engine`.

        Raises:
            UsageError: `target` is not a pid.
        """
        if not target.isascii() or not target.isdigit() or not 0 < int(target) < 1 << 22:
            raise UsageError(f"{target!r} is not a pid", hint="migrate --engine process PID")
        return ProcessSource(int(target), options, criu_log_level)

    def destination(
        self,
        options: Any,
        *,
        criu_log_level: int,
        hold_s: float,
    ) -> DestinationHalf:
        return ProcessDestination(options, criu_log_level, hold_s)


class ProcessSource(TrackedSource):
    """The source half."""

    no_post_copy = ""

    def __init__(self, pid: int, options: ProcessOptions, log_level: int) -> None:
        super().__init__()
        self._pid = pid
        self._options = options
        self._log_level = log_level
        self._tree: Tree | None = None

    def inspect(self) -> Inspection:
        if os.geteuid() != 0:
            raise Refused(
                "moving a process needs root: CRIU traces it and restores its pid",
                hint="run phaul-runtime as root",
            )
        root = read_process(self._pid)
        if root.kernel_thread:
            raise NoSuchTarget(f"pid {self._pid} is a kernel thread ({root.name})")
        if root.state in "ZX":
            raise NoSuchTarget(f"process {self._pid} ({root.name}) has ended: it is a zombie")
        tree = self.look()
        return Inspection(
            pid=self._pid,
            memory=sum(member.memory for member in tree.members),
            files=gather_all(
                InUse(file.path, file.use, file.known)
                for file in tree.files.values()
                if _is_utf8(file.path)
            ),
            manifest={
                "pids": sorted({tid for member in tree.members for tid in member.threads}),
                "own_pid_namespace": _own_pid_namespace(tree),
                "shell_job": self._shell_job(tree),
            },
            findings=_findings(tree, self._options),
        )

    def look(self) -> Tree:
        """Read the tree as it is now."""
        tree = self._tree = read_tree(self._pid)
        self._members = Members.of(tree.members)
        self._connections = established_connections(tree)
        return tree

    def _shell_job(self, tree: Tree) -> bool:
        """Whether the tree's session is led by somebody outside it."""
        if isinstance(self._options.shell_job, bool):
            return self._options.shell_job
        return tree.root.session not in tree.pids and not _own_pid_namespace(tree)

    def local(self, handover: Any, cancellation: Cancellation) -> PhaulLocal:
        opts = criu_opts(
            pid=self._pid,
            log_level=self._log_level,
            log_file=DUMP_LOG,
            **_common_opts(self._options, self._shell_job(self._tree or self.look())),
        )
        return ProcessLocal(self, opts, handover)

    def finish(self) -> Sequence[str]:
        self.await_end()
        cgroup.sweep()  # the tree may have been restored here before, into a group of its own
        return netlock.release(self._connections, table=self._lock_table)

    def rollback(self) -> None:
        """See `SourceHalf`: CRIU lets the tree run; killed, it leaves its network lock."""
        netlock.release(self._connections, table=self._lock_table, all_of_them=True)


class ProcessLocal(PhaulLocal, CriuNotify):
    """Final dump over the memory channel; the cut-over happens in CRIU's notifications."""

    def __init__(self, source: ProcessSource, opts: Any, handover: Handover) -> None:
        self._source = source
        self._opts = opts
        self._handover = handover
        self._images_dir = Path()

    def dump_copy_restore(
        self, criu: Criu, config: PhaulConfig, last_client_images_dir: str | None
    ) -> Outcome:
        self._images_dir = new_directory(Path(config.wdir), "final")
        directory = os.open(self._images_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            opts = self._opts
            opts.images_dir_fd = directory
            if last_client_images_dir is not None:
                opts.track_mem = True
                opts.parent_img = relative_parent(self._images_dir, last_client_images_dir)
            if self._handover.post_copy:
                opts.lazy_pages = True
                opts.config_file = str(_quiet_server(self._images_dir))
            else:
                opts.ps.fd = config.memfd
            criu.dump(opts, self)
        except PhaulError as error:
            if self._handover.held:
                pass  # As it has to be: CRIU was killed, with the tree frozen.
            elif self._handover.committing and self._source.gone():
                # CRIU killed the tree, and did not live to say so: there is no way back.
                self._source.end_rest()
            elif isinstance(error.__cause__, PhaulError):
                # Our own veto in a notification: its reason is the reason.
                raise error.__cause__ from None
            else:
                raise
        finally:
            self._source.dump_ends()
            os.close(directory)
        answered = time.monotonic()
        try:
            stats = read_dump_stats(self._images_dir)
        except PhaulError:
            stats = DumpStats()
        # CRIU's clock of the freeze runs until it has killed the tree and answers.
        frozen_at = answered - stats.frozen_s - stats.freezing_s if stats.frozen_s else None
        outcome = self._handover.commit(self._source.dead, frozen_at)
        return replace(
            outcome, pages_written=stats.pages_written, pages_skipped=stats.pages_skipped
        )

    def pre_dump(self) -> None:
        """CRIU begins; the next thing it does is to freeze."""
        if self._source.ended():
            raise TargetGone("the process has ended by itself")
        self._source.look()
        self._source.dump_begins(self._handover)

    def post_dump(self) -> None:
        """The tree is frozen, its memory is over: restore there, or let it run on here."""
        self._source.dump_ends()
        self._source.stands_still(self._opts.pid, self._images_dir)
        self._handover.prepare(self._images_dir, self._source.identity())


class ProcessDestination(DestinationHalf):
    """The destination half."""

    def __init__(self, options: ProcessOptions, log_level: int, hold_s: float) -> None:
        self._options = options
        self._log_level = log_level
        self._hold_s = hold_s
        self._shell_job = False
        self._id = ""
        self._held: HeldRestore | None = None
        self._resumed = False

    def check(self, manifest: Mapping[str, Any]) -> Sequence[Finding]:
        if manifest.get("own_pid_namespace"):
            return [Finding("pids", OK, "the tree has a pid namespace of its own")]
        if manifest.get("same_host"):
            return [
                Finding(
                    "pids",
                    REFUSED,
                    "source and destination are one host: its pids are taken by the source's copy",
                    "within one host only a tree with a pid namespace of its own can move",
                )
            ]
        pids = [int(pid) for pid in manifest.get("pids", [])]
        taken = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        if taken:
            names = ", ".join(f"{pid} ({_name_of(pid)})" for pid in taken[:5])
            return [
                Finding(
                    "pids",
                    REFUSED,
                    f"pid taken: {names}",
                    "CRIU restores the same pids: end that process, or run the target in a pid "
                    "namespace of its own",
                )
            ]
        limit = int(Path("/proc/sys/kernel/pid_max").read_text(encoding="ascii"))
        if pids and max(pids) >= limit:
            return [
                Finding(
                    "pids",
                    REFUSED,
                    f"pid {max(pids)} is above kernel.pid_max ({limit})",
                    "raise kernel.pid_max there",
                )
            ]
        return [Finding("pids", OK, f"{len(pids)} pids are free")]

    def claim(self, manifest: Mapping[str, Any]) -> Claim:
        """See `DestinationHalf`: a process has no name here."""
        return Claim()

    def prepare(self, manifest: Mapping[str, Any], migration_id: str) -> None:
        self._shell_job = bool(manifest.get("shell_job"))
        self._id = migration_id

    can_be_lazy = True

    def restore(self, criu: Criu, images_dir: Path, *, lazy: bool = False) -> int:
        self._resumed = False
        directory = os.open(images_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        session = Criu(criu.binary, deadline_s=criu.deadline_s)
        try:
            session.prepare()
            if session.swrk_pid is not None:
                # What CRIU rebuilds is born in its own cgroup, not in the agent's.
                cgroup.adopt(self._id, session.swrk_pid)
            opts = criu_opts(
                images_dir_fd=directory,
                log_level=self._log_level,
                log_file=RESTORE_LOG,
                lazy_pages=lazy or None,
                **_common_opts(self._options, self._shell_job),
            )
            self._held = HeldRestore(session, opts, hold_s=self._hold_s)
            return self._held.start(RESTORE_WITHIN_S)
        except BaseException:
            session.cleanup()
            cgroup.kill(self._id)
            raise
        finally:
            os.close(directory)

    def resume(self) -> float:
        if self._held is None:
            raise MigrationFailed("nothing was restored")
        resumed_at = self._held.resume(self._hold_s)
        self._resumed = True
        return resumed_at

    def wait_let_go(self) -> None:
        deadline = time.monotonic() + LET_GO_WITHIN_S
        while any(_name_of(pid) == "criu" for pid in cgroup.members(self._id)):
            if time.monotonic() > deadline:
                return
            time.sleep(POLL_S)

    def discard(self) -> None:
        if self._resumed:
            return
        if self._held is not None:
            self._held.discard()
            self._held = None
        # CRIU killed in mid-restore leaves half-built tasks that nobody would ever let go.
        cgroup.kill(self._id)


def _quiet_server(images_dir: Path) -> Path:
    """A configuration for a lazy dump: vetoed, CRIU opens a port before it asks and gives up."""
    path = images_dir / "criu.conf"
    path.write_text("address 127.0.0.1\n", encoding="ascii")
    return path


def _common_opts(options: ProcessOptions, shell_job: bool) -> dict[str, Any]:
    """What dump and restore must agree on."""
    return {
        "shell_job": shell_job,
        "tcp_established": options.tcp_established,
        "file_locks": options.file_locks,
        "ghost_limit": options.ghost_limit_mib * _MIB,
        # The tree goes to a cgroup of its own at the destination; the source's are not rebuilt.
        "manage_cgroups": True,
        "manage_cgroups_mode": rpc.IGNORE,
    }


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _own_pid_namespace(tree: Tree) -> bool:
    return len(tree.root.inner_pids) > 1 and tree.root.inner_pids[-1] == 1


def _name_of(pid: int) -> str:
    try:
        return read_process(pid).name
    except NoSuchTarget:
        return "gone"


def _findings(tree: Tree, options: ProcessOptions) -> list[Finding]:
    """What the source side can say for and against this tree."""
    found = [Finding("target", OK, _describe(tree))]
    ours = read_process(os.getpid())
    if ours.pid in tree.pids:
        found.append(Finding("target", REFUSED, "phaul-runtime itself is in that tree"))
    for member in tree.members:
        found += _member_findings(member, ours, tree)
    if tree.terminals:
        found.append(
            Finding(
                "terminal",
                REFUSED,
                f"a terminal stays on this host: {tree.terminals[0]}",
                "start it with setsid and its input and output in files or /dev/null",
            )
        )
    if strange := [path for path in tree.files if not _is_utf8(path)]:
        name = strange[0].encode(errors="surrogateescape").decode(errors="backslashreplace")
        found.append(
            Finding(
                "files",
                REFUSED,
                f"the name of an open file is no UTF-8: {name}",
                "rename it, or close it",
            )
        )
    if tree.odd:
        found.append(Finding("descriptors", REFUSED, f"CRIU cannot dump: {tree.odd[0]}"))
    others = pipes_to_others(tree)
    if others:
        found.append(
            Finding(
                "pipes",
                REFUSED,
                f"a pipe leads out of the tree: {others[0]}",
                "start it with its input and output in files or /dev/null, or move both ends",
            )
        )
    limit = options.ghost_limit_mib * _MIB
    for path, size in tree.deleted:
        if size > limit:
            found.append(
                Finding(
                    "ghosts",
                    REFUSED,
                    f"{path} is deleted but open, with {size} bytes",
                    "raise engines.process.ghost_limit_mib",
                )
            )
    connections = established_connections(tree)
    if connections and not options.tcp_established:
        found.append(
            Finding(
                "tcp",
                REFUSED,
                f"{len(connections)} TCP connections are established: {_arrow(connections[0])}",
                "--tcp-established carries them, if their address moves too",
            )
        )
    return found


def _arrow(connection: Connection) -> str:
    return "{}:{} > {}:{}".format(*connection)


def _describe(tree: Tree) -> str:
    memory = sum(member.memory for member in tree.members) / _MIB
    return (
        f"{tree.root.name}, {len(tree.members)} processes, {memory:.0f} MiB, "
        f"{len(tree.files)} files"
    )


def _member_findings(member: Process, ours: Process, tree: Tree) -> list[Finding]:
    found = []
    if member.tracer:
        found.append(
            Finding(
                "tracer",
                REFUSED,
                f"pid {member.pid} is traced by pid {member.tracer}",
                "end the debugger: CRIU traces the tree itself",
            )
        )
    for kind in _FOREIGN:
        if member.namespaces.get(kind) != ours.namespaces.get(kind):
            found.append(
                Finding(
                    "namespaces",
                    REFUSED,
                    f"pid {member.pid} has a {kind} namespace of its own",
                    "it belongs to a container: use the engine of that container",
                )
            )
    inner = len(member.inner_pids) - len(ours.inner_pids)
    if inner > 0 and not _own_pid_namespace(tree):
        found.append(
            Finding(
                "namespaces",
                REFUSED,
                f"pid {member.pid} is in a pid namespace, the tree's root is not its init",
                "move the tree from the init of that namespace",
            )
        )
    return found


__all__ = ["ProcessDestination", "ProcessEngine", "ProcessLocal", "ProcessSource"]
