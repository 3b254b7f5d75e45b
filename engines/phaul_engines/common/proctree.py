"""A process tree as /proc shows it: members, descriptors, mappings, sockets."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import stat
import sys
from dataclasses import dataclass, field
from pathlib import Path

from phaul_runtime.engine import User
from phaul_runtime.errors import NoSuchTarget
from phaul_runtime.files.compare import Use
from phaul_runtime.files.identity import ROOT
from phaul_runtime.system import procfs
from phaul_runtime.system.filemark import Mark, mark_of
from phaul_runtime.system.process import Member

PROC = Path("/proc")
_DELETED = " (deleted)"
_TCP_LISTEN = "0A"
_PAGE = os.sysconf("SC_PAGE_SIZE")
_O_ACCMODE = 0o3
# Of one file: enough to find it again once some are closed.
_LINKS = 4
# The kernel writes some characters of paths so in /proc/PID/maps, and a backslash as it is.
_ESCAPED = "\\"
# Majors of tty(4): consoles, /dev/tty, and the pseudo-terminals.
_TTY_MAJORS = frozenset({4, 5, *range(136, 144)})
_UNDUMPABLE = (
    "anon_inode:[io_uring]",
    "anon_inode:[perf_event]",
    "anon_inode:kvm",
    "anon_inode:bpf",
    "/dev/kvm",
    "/dev/nvidia",
)


@dataclass(frozen=True)
class Process:
    """One process; ids as this pid namespace sees them, but `inner_pids` as its own do."""

    pid: int
    name: str
    state: str
    parent: int
    group: int
    session: int
    start_time: int
    kernel_thread: bool
    tracer: int
    threads: tuple[int, ...]
    inner_pids: tuple[int, ...]
    memory: int
    namespaces: dict[str, str]
    user: User = ROOT

    def alive(self) -> bool:
        """It still exists (the same, not another with its pid) and is no zombie."""
        return Member(self.pid, self.start_time).alive()


@dataclass
class OpenFile:
    """A path that the tree uses, and how.

    Attributes:
        path_only: by O_PATH descriptors alone.
        user: as whom: root, if root writes to it, else the first who writes to it, or has it.
        held_by: some of the descriptors, as `/proc/4711/fd/3`: no path leads there more surely.
        known: which file they were of.
    """

    path: str
    written: bool = False
    executable: bool = False
    shared_map: bool = False
    path_only: bool = True
    user: User | None = None
    held_by: list[str] = field(default_factory=list)
    known: Mark | None = None

    def add(self, user: User, held_by: str, *, written: bool = False) -> None:
        """One more use of it."""
        if self.user is None or (written and (not self.written or user.uid == ROOT.uid)):
            self.user = user
        self.written |= written
        if len(self.held_by) < _LINKS:
            self.held_by.append(held_by)

    @property
    def use(self) -> Use:
        """For `filesystem.gather`."""
        return Use(
            written=self.written,
            executable=self.executable,
            shared_map=self.shared_map,
            path_only=self.path_only,
            user=self.user,
            held_by=tuple(self.held_by),
        )


@dataclass
class Tree:
    """A root and all its descendants."""

    members: list[Process]
    files: dict[str, OpenFile] = field(default_factory=dict)
    deleted: list[tuple[str, int]] = field(default_factory=list)
    terminals: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)
    socket_inodes: set[str] = field(default_factory=set)
    pipe_ends: dict[str, set[int]] = field(default_factory=dict)

    @property
    def root(self) -> Process:
        """The process at the top."""
        return self.members[0]

    @property
    def pids(self) -> list[int]:
        """All pids, the root's first."""
        return [member.pid for member in self.members]


def _stat(pid: int) -> tuple[str, int, str, list[str]]:
    """State, start time, name and the fields after the name of /proc/PID/stat."""
    try:
        text = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise NoSuchTarget(f"no process has pid {pid}") from error
    name = text[text.index("(") + 1 : text.rindex(")")]
    rest = text[text.rindex(")") + 2 :].split()
    return rest[0], int(rest[19]), name, rest


def ancestors(pid: int) -> list[Member]:
    """Its parent, that one's parent, and so on up to the init, which is not among them.

    Raises:
        NoSuchTarget: one of them is gone.
    """
    found: list[Member] = []
    while (parent := int(_stat(pid)[3][1])) > 1:
        found.append(Member(parent, _stat(parent)[1]))
        pid = parent
    return found


def tracer_of(pid: int) -> int:
    """The pid that traces it; 0 if nobody does, or it is gone."""
    return procfs.tracer_of(PROC / str(pid))


def _status_number(pid: int, name: str, base: int) -> int:
    return int(next(iter(procfs.status_words(PROC / str(pid), name)), "0"), base)


def read_process(pid: int) -> Process:
    """Read one process.

    Raises:
        NoSuchTarget: it does not exist (any more).
    """
    state, start_time, name, rest = _stat(pid)
    home = PROC / str(pid)
    try:
        status = dict(
            line.split(":\t", 1)
            for line in (home / "status").read_text(encoding="utf-8", errors="replace").splitlines()
            if ":\t" in line
        )
        threads = tuple(sorted(int(entry) for entry in os.listdir(home / "task")))
        namespaces = {}
        for kind in os.listdir(home / "ns"):
            namespaces[kind] = os.readlink(home / "ns" / kind)
    except PermissionError:
        threads, namespaces, status = (pid,), {}, {}
    except OSError as error:
        raise NoSuchTarget(f"process {pid} is ending") from error
    return Process(
        pid=pid,
        name=name,
        state=state,
        parent=int(rest[1]),
        group=int(rest[2]),
        session=int(rest[3]),
        start_time=start_time,
        kernel_thread=bool(int(rest[6]) & 0x00200000),  # PF_KTHREAD
        tracer=int(status.get("TracerPid", "0")),
        threads=threads,
        inner_pids=tuple(int(n) for n in status.get("NSpid", str(pid)).split()),
        memory=int(rest[21]) * _PAGE,
        namespaces=namespaces,
        user=_user(status),
    )


def _user(status: dict[str, str]) -> User:
    """As whom the kernel lets it work on files."""
    uid, gid = (int(status.get(name, "0").split()[-1]) for name in ("Uid", "Gid"))
    return User(uid, gid, tuple(int(group) for group in status.get("Groups", "").split()))


def tasks_below(pid: int) -> dict[int, int]:
    """All threads of a tree, as this pid namespace numbers them, each with its process."""
    found: dict[int, int] = {}
    processes = [pid]
    for process in processes:
        with contextlib.suppress(OSError):
            found |= {int(task): process for task in os.listdir(PROC / str(process) / "task")}
        processes += procfs.children(PROC / str(process))
    return found


def is_stopped_by_tracer(process: int, task: int) -> bool:
    """Whether a thread stands in a ptrace stop, or has ended."""
    try:
        text = (PROC / str(process) / "task" / str(task) / "stat").read_text(errors="replace")
    except OSError:
        return True
    return text[text.rindex(")") + 2] in "tZX"


def read_tree(pid: int) -> Tree:
    """Read the tree below `pid` with everything it has open.

    Raises:
        NoSuchTarget: the root does not exist (any more).
    """
    tree = read_members(pid)
    for member in tree.members:
        if member.state in "ZX":
            continue
        try:
            _add_links(tree, member)
            _add_descriptors(tree, member)
            _add_mappings(tree, member)
        except FileNotFoundError:
            continue  # it ended meanwhile
        except ProcessLookupError:
            continue
    return tree


def read_standing(pid: int) -> Tree:
    """The members and sockets of a tree that stands still: what may have changed since it ran.

    Raises:
        NoSuchTarget: the root does not exist (any more).
    """
    tree = read_members(pid)
    for member in tree.members:
        with contextlib.suppress(OSError):
            for link in os.scandir(PROC / str(member.pid) / "fd"):
                path = os.readlink(link.path)
                if path.startswith("socket:["):
                    tree.socket_inodes.add(path[8:-1])
    return tree


def read_members(pid: int) -> Tree:
    """The processes of the tree below `pid` alone.

    Raises:
        NoSuchTarget: the root does not exist (any more).
    """
    tree = Tree([read_process(pid)])
    for member in tree.members:
        for child in procfs.children(PROC / str(member.pid)):
            try:
                tree.members.append(read_process(child))
            except NoSuchTarget:
                continue  # it ended meanwhile
    return tree


def _use(tree: Tree, path: str, link: Path, user: User, **how: bool) -> OpenFile:
    """Note a use of what `link` leads to."""
    use = tree.files.setdefault(path, OpenFile(path))
    if use.known is None:
        with contextlib.suppress(OSError):
            use.known = mark_of(str(link))
    use.add(user, str(link), **how)
    return use


def _add_links(tree: Tree, member: Process) -> None:
    home = PROC / str(member.pid)
    for name in ("cwd", "root", "exe"):
        link = home / name
        path = os.readlink(link)
        if path == "/" or (path.endswith(_DELETED) and os.stat(link).st_nlink == 0):
            continue
        use = _use(tree, path, link, member.user)
        use.path_only = False
        use.executable |= name == "exe"


def _add_descriptors(tree: Tree, member: Process) -> None:
    pid, home = member.pid, PROC / str(member.pid)
    for number in os.listdir(home / "fd"):
        link = home / "fd" / number
        try:
            path = os.readlink(link)
            info = os.stat(link)
            flags = _flags(home / "fdinfo" / number)
        except OSError:
            continue  # closed meanwhile
        if path.startswith("pipe:["):
            tree.pipe_ends.setdefault(path, set()).add(flags & _O_ACCMODE)
        elif path.startswith("socket:["):
            tree.socket_inodes.add(path[8:-1])
        elif stat.S_ISCHR(info.st_mode) and os.major(info.st_rdev) in _TTY_MAJORS:
            tree.terminals.append(f"fd {number} of pid {pid} is {path}")
        elif path.startswith(_UNDUMPABLE):
            tree.odd.append(f"fd {number} of pid {pid} is {path}")
        elif stat.S_ISREG(info.st_mode) and path.startswith("/"):
            if info.st_nlink == 0:
                tree.deleted.append((path.removesuffix(_DELETED), info.st_size))
            elif not path.startswith(("/proc/", "/sys/", "/memfd:")):
                opened = not flags & os.O_PATH
                written = opened and bool(flags & _O_ACCMODE)
                use = _use(tree, path, link, member.user, written=written)
                use.path_only &= not opened
        elif stat.S_ISDIR(info.st_mode) and not path.startswith(("/proc", "/sys")):
            _use(tree, path, link, member.user).path_only = False


def _flags(fdinfo: Path) -> int:
    for line in fdinfo.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("flags:"):
            return int(line.split()[1], 8)
    return 0


def _add_mappings(tree: Tree, member: Process) -> None:
    home = PROC / str(member.pid)
    text = os.fsdecode((home / "maps").read_bytes())
    for line in text.split("\n"):
        fields = line.split(None, 5)
        if len(fields) < 6 or not fields[5].startswith("/"):
            continue
        path, rights = fields[5], fields[1]
        link = home / "map_files" / "-".join(f"{int(end, 16):x}" for end in fields[0].split("-"))
        if _ESCAPED in path or path.endswith(_DELETED):
            try:
                path = os.readlink(link)
                if os.stat(link).st_nlink == 0:
                    continue
            except OSError:
                continue  # unmapped meanwhile
        if path.startswith(("/dev/zero", "/memfd:", "/SYSV", "/proc/")):
            continue
        shared = rights[3] == "s" and "w" in rights
        use = _use(tree, path, link, member.user, written=shared)
        use.path_only = False
        use.executable |= "x" in rights
        use.shared_map |= shared


def pipes_to_others(tree: Tree) -> list[str]:
    """Pipes whose other end a process outside the tree holds: CRIU would cut them silently."""
    open_ended = {pipe for pipe, ends in tree.pipe_ends.items() if ends in ({0}, {1})}
    if not open_ended:
        return []
    inside = set(tree.pids)
    found = []
    for entry in PROC.iterdir():
        if not entry.name.isdigit() or int(entry.name) in inside:
            continue
        try:
            links = {os.readlink(link) for link in (entry / "fd").iterdir()}
        except OSError:
            continue  # it ended meanwhile
        found += [f"{pipe} leads to pid {entry.name}" for pipe in sorted(links & open_ended)]
    return found


def established_connections(tree: Tree) -> list[tuple[str, int, str, int]]:
    """TCP connections of the tree that are not merely listening: local, remote address and port."""
    found = []
    for table in ("tcp", "tcp6"):
        try:
            text = (PROC / str(tree.root.pid) / "net" / table).read_text(encoding="ascii")
        except OSError:
            continue
        for line in text.splitlines()[1:]:
            fields = line.split()
            if fields[9] in tree.socket_inodes and fields[3] != _TCP_LISTEN:
                found.append((*_address(fields[1]), *_address(fields[2])))
    return found


def _address(text: str) -> tuple[str, int]:
    """`0100007F:1F90` is 127.0.0.1 and 8080: the kernel prints 32-bit words in host order."""
    address, port = text.split(":")
    words = [bytes.fromhex(address[i : i + 8]) for i in range(0, len(address), 8)]
    if sys.byteorder == "little":
        words = [word[::-1] for word in words]
    found = ipaddress.ip_address(b"".join(words))
    mapped = getattr(found, "ipv4_mapped", None)
    return str(mapped or found), int(port, 16)
