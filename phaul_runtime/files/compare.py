"""Files that a target holds open or has mapped: facts, comparison.

CRIU does not carry them: it opens them by path at the destination and refuses a wrong size or
build id. So each is held against its namesake before anything is frozen.

Looking disturbs nobody: a file is known by a descriptor that does not open it, and is opened only
if it is a regular file on which nobody has a lease. How much is read is bounded.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, TypeVar

from phaul_runtime.engine.targets import FileFact, FileVerdict, User
from phaul_runtime.files import placing
from phaul_runtime.files.in_use import find_held
from phaul_runtime.files.leases import has_lease, leased_inodes
from phaul_runtime.files.patience import while_it_moves
from phaul_runtime.system.filemark import Mark, mark_of
from phaul_runtime.system.pathwalk import open_path, reopen

# Contents of files up to this size are compared; above it size and mtime, as rsync does.
DIGEST_LIMIT = 256 << 20
# Of all files of one look together.
DIGESTS_LIMIT = 1 << 30
# A look that gets no further for so long is given up; a chunk of a slow disk takes less.
SILENT_S = 20.0
_CHUNK = 1 << 20
_ELF_MAGIC = b"\x7fELF"
_NT_GNU_BUILD_ID = 3
# Build ids lie in the first note segment, close to the start of the file.
_HEAD_BYTES = 4096
_PT_NOTE = 4
_HEADERS = 256
_NOTES_BYTES = 1 << 20
_T = TypeVar("_T")


@dataclass
class Look:
    """What one look at many files shares.

    Attributes:
        left: bytes that may still be read for digests.
        leased: inodes that are not opened.
        moved_at: when it last got on, by `time.monotonic()`.
        at: the path that it is at.
    """

    left: int = DIGESTS_LIMIT
    leased: frozenset[int] = field(default_factory=leased_inodes)
    moved_at: float = field(default_factory=time.monotonic)
    at: str = ""

    def moves(self, path: str = "") -> None:
        """It has got on."""
        self.moved_at, self.at = time.monotonic(), path or self.at


@dataclass(frozen=True)
class Use:
    """How a target uses a file.

    Attributes:
        written: it can write to it.
        executable: mapped with PROT_EXEC.
        shared_map: mapped shared and writable.
        path_only: known to it by O_PATH descriptors alone.
        user: as whom; None: as the file's owner.
        held_by: where its descriptors are, as `/proc/4711/fd/3`.
    """

    written: bool = False
    executable: bool = False
    shared_map: bool = False
    path_only: bool = False
    user: User | None = None
    held_by: Sequence[str] = ()


UNUSED = Use()


@dataclass(frozen=True)
class InUse:
    """A path that a target uses.

    Attributes:
        path: absolute.
        use: how.
        known: which file was at `use.held_by` when that was read.
    """

    path: str
    use: Use = UNUSED
    known: Mark | None = None


def gather_all(files: Iterable[InUse]) -> list[FileFact]:
    """The facts of those that are regular files and directories.

    Raises:
        Refused: a file system does not answer.
    """
    look = Look()

    def work() -> list[FileFact]:
        facts = (gather(f.path, use=f.use, known=f.known, look=look) for f in files)
        return [fact for fact in facts if fact is not None]

    return _patiently(work, look)


def gather(
    path: str,
    *,
    use: Use = UNUSED,
    written: bool = False,
    known: Mark | None = None,
    look: Look | None = None,
) -> FileFact | None:
    """The facts of a regular file or directory; None if `path` is anything else or gone.

    Args:
        path: absolute; a link is only followed as `pathwalk` says.
        use: how the target uses it: of what it holds, the path is not gone along at all.
        written: short for a `use` that is only that.
        known: which file was at `use.held_by`, where there may be another by now.
        look: shared by many files.
    """
    try:
        return _gather(path, use, known, look or Look(), written=written)
    except OSError:
        return None


def _gather(
    path: str, use: Use, known: Mark | None, look: Look, *, written: bool = False
) -> FileFact | None:
    look.moves(path)
    with _looked_at(path, use.held_by, known) as fd:
        info, mark = os.fstat(fd), mark_of(fd)
        directory = stat.S_ISDIR(info.st_mode)
        if not directory and not stat.S_ISREG(info.st_mode):
            return None
        fact = FileFact(
            path=path,
            directory=directory,
            size=0 if directory else info.st_size,
            mode=stat.S_IMODE(info.st_mode),
            uid=info.st_uid,
            gid=info.st_gid,
            mtime_ns=info.st_mtime_ns,
            written=use.written or written,
            executable=use.executable,
            shared_map=use.shared_map,
            path_only=use.path_only,
            user=use.user,
            device=mark.device,
            inode=mark.inode,
            born_ns=mark.born_ns,
            held_by=use.held_by,
            owner_may_place=placing.may_place(path, User(info.st_uid, info.st_gid)),
        )
        if not directory:
            _read_into(fact, fd, look)
        return fact


def _read_into(fact: FileFact, fd: int, look: Look) -> None:
    """Add what only the contents tell, if they can be read without disturbing anybody."""
    fact.leased = fact.inode in look.leased or any(map(has_lease, fact.held_by))
    if fact.leased:
        return
    with os.fdopen(reopen(fd, os.O_RDONLY), "rb") as file:
        fact.build_id = build_id(file)
        if not fact.build_id and fact.size <= min(DIGEST_LIMIT, look.left):
            look.left -= fact.size
            fact.digest = digest(file, fact.size, look)


@contextlib.contextmanager
def _looked_at(path: str, held_by: Iterable[str], known: Mark | None) -> Iterator[int]:
    fd = find_held(held_by, known) if held_by else open_path(path)
    try:
        yield fd
    finally:
        os.close(fd)


# -- comparison --------------------------------------------------------------------------------


def compare(facts: Iterable[FileFact]) -> list[FileVerdict]:
    """Hold another host's facts against this host; returns only what differs.

    A verdict is `copyable` if carrying the file cannot harm this host: it is missing, or it is
    data that the target itself could write to. A program or library that exists here in another
    build is never replaced.

    Raises:
        Refused: a file system does not answer.
    """
    look = Look()

    def work() -> list[FileVerdict]:
        found = ((theirs.path, *_difference(theirs, look)) for theirs in facts)
        return [FileVerdict(path, reason, copyable) for path, reason, copyable in found if reason]

    return _patiently(work, look)


def _patiently(work: Callable[[], list[_T]], look: Look) -> list[_T]:
    return while_it_moves(work, lambda: look.moved_at, SILENT_S, lambda: f"looking at {look.at}")


def _difference(theirs: FileFact, look: Look) -> tuple[str, bool]:
    kind = "directory" if theirs.directory else "file"
    try:
        ours = _gather(theirs.path, UNUSED, None, look)
    except FileNotFoundError:
        reason, replaces = f"{kind} is missing there", False
    except OSError as error:
        where = f"{error.filename} " if error.filename not in (None, theirs.path) else ""
        return f"cannot be looked at there: {where}{error.strerror}", False
    else:
        if ours is None or ours.directory != theirs.directory:
            return f"is no {kind if ours is not None else f'regular {kind}'} there", False
        reason, harmless = ("", True) if theirs.directory else _contents(theirs, ours)
        if not reason or not harmless:
            return reason, False
        replaces = True
    if obstacle := placing.obstacle(theirs, replaces=replaces):
        return f"{reason}; {obstacle}", False
    return reason, True


def _contents(theirs: FileFact, ours: FileFact) -> tuple[str, bool]:
    """How a file differs, and whether it is of a kind that may be replaced at all."""
    if theirs.build_id or ours.build_id:
        if theirs.build_id != ours.build_id and not theirs.leased and not ours.leased:
            return (
                f"is another build there (build-id {ours.build_id[:12] or 'none'}, "
                f"here {theirs.build_id[:12] or 'none'})",
                not ours.build_id,
            )
        if theirs.size != ours.size:
            return f"has {ours.size} bytes there, {theirs.size} here", False
        return _mode_difference(theirs, ours)
    if theirs.size != ours.size:
        return f"has {ours.size} bytes there, {theirs.size} here", True
    if theirs.digest and ours.digest:
        if theirs.digest != ours.digest:
            return "has other contents there", True
    elif theirs.mtime_ns != ours.mtime_ns:
        why = "somebody has a lease on it" if theirs.leased or ours.leased else "too large"
        return f"has another modification time there ({why}: contents are not compared)", True
    return _mode_difference(theirs, ours)


def _mode_difference(theirs: FileFact, ours: FileFact) -> tuple[str, bool]:
    # CRIU compares the mode of a file that is held open ("File ... has bad mode").
    if theirs.mode != ours.mode:
        return f"has mode {ours.mode:o} there, {theirs.mode:o} here", not theirs.build_id
    return "", True


# -- contents ----------------------------------------------------------------------------------


def digest(file: BinaryIO, size: int, look: Look | None = None) -> bytes:
    """A 20-byte BLAKE2 digest of a file's first `size` bytes: it may grow meanwhile."""
    state = hashlib.blake2b(digest_size=20)
    file.seek(0)
    while size > 0 and (chunk := file.read(min(size, _CHUNK))):
        state.update(chunk)
        size -= len(chunk)
        if look is not None:
            look.moves()
    return state.digest()


def build_id(file: BinaryIO) -> str:
    """The GNU build id of an ELF file, hex; empty for anything else.

    Program headers and notes as in elf(5); 64-bit and 32-bit little-endian files. Whatever the file
    says of itself, no more than `_NOTES_BYTES` are read.
    """
    head = file.read(_HEAD_BYTES)
    if head[:4] != _ELF_MAGIC or len(head) < 64 or head[5] != 1:
        return ""
    wide = head[4] == 2
    phoff = _number(head, 32, 8) if wide else _number(head, 28, 4)
    entry_size = _number(head, 54 if wide else 42, 2)
    count = _number(head, 56 if wide else 44, 2)
    left = _NOTES_BYTES
    for index in range(min(count, _HEADERS)):
        entry = _at(file, phoff + index * entry_size, min(entry_size, 64))
        if len(entry) < min(entry_size, 64) or _number(entry, 0, 4) != _PT_NOTE:
            continue
        offset = _number(entry, 8, 8) if wide else _number(entry, 4, 4)
        size = min(_number(entry, 32, 8) if wide else _number(entry, 16, 4), 1 << 16, left)
        left -= size
        if found := _build_id_note(_at(file, offset, size)):
            return found
    return ""


def _at(file: BinaryIO, offset: int, size: int) -> bytes:
    if offset >= 1 << 63:
        return b""
    file.seek(offset)
    return file.read(size)


def _number(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "little")


def _build_id_note(notes: bytes) -> str:
    at = 0
    while at + 12 <= len(notes):
        name_size, desc_size, kind = (_number(notes, at + i, 4) for i in (0, 4, 8))
        name_at = at + 12
        desc_at = name_at + (name_size + 3) // 4 * 4
        if kind == _NT_GNU_BUILD_ID and notes[name_at : name_at + 4] == b"GNU\0":
            return notes[desc_at : desc_at + desc_size].hex()
        at = desc_at + (desc_size + 3) // 4 * 4
    return ""
