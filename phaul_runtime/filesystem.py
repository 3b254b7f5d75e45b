"""Files that a target holds open or has mapped: facts, comparison.

CRIU does not carry them: it opens them by path at the destination and refuses a wrong size or
build id. So each is held against its namesake before anything is frozen.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from phaul_runtime.rpc import phaul_pb2 as pb

# Contents of files up to this size are compared; above it size and mtime, as rsync does.
DIGEST_LIMIT = 256 << 20
_CHUNK = 1 << 20
_ELF_MAGIC = b"\x7fELF"
_NT_GNU_BUILD_ID = 3
# Build ids lie in the first note segment, close to the start of the file.
_HEAD_BYTES = 4096
_PT_NOTE = 4


def gather(
    path: str, *, written: bool = False, executable: bool = False, shared_map: bool = False
) -> pb.FileFact | None:
    """The facts of a regular file or directory; None if `path` is anything else or gone."""
    try:
        info = os.stat(path)
    except OSError:
        return None
    fact = pb.FileFact(
        path=path,
        mode=stat.S_IMODE(info.st_mode),
        uid=info.st_uid,
        gid=info.st_gid,
        mtime_ns=info.st_mtime_ns,
        written=written,
        executable=executable,
        shared_map=shared_map,
    )
    if stat.S_ISDIR(info.st_mode):
        fact.directory = True
        return fact
    if not stat.S_ISREG(info.st_mode):
        return None
    fact.size = info.st_size
    try:
        fact.build_id = build_id(path)
        if not fact.build_id and info.st_size <= DIGEST_LIMIT:
            fact.digest = digest(path)
    except OSError:
        return None
    return fact


def changed_since(fact: pb.FileFact) -> bool:
    """Whether a file may have other contents now than when `fact` was gathered."""
    if fact.shared_map:
        return True
    try:
        info = os.stat(fact.path)
    except OSError:
        return True
    return (info.st_size, info.st_mtime_ns) != (fact.size, fact.mtime_ns)


def compare(facts: Iterable[pb.FileFact]) -> list[pb.FileVerdict]:
    """Hold another host's facts against this host; returns only what differs.

    A verdict is `copyable` if carrying the file cannot harm this host: it is missing, or it is
    data. A program or library that exists here in another build is never replaced.
    """
    verdicts = []
    for theirs in facts:
        reason, copyable = _difference(theirs)
        if reason:
            verdicts.append(pb.FileVerdict(path=theirs.path, reason=reason, copyable=copyable))
    return verdicts


def _difference(theirs: pb.FileFact) -> tuple[str, bool]:
    ours = gather(theirs.path)
    kind = "directory" if theirs.directory else "file"
    if ours is None:
        if os.path.lexists(theirs.path):
            return f"is no regular {kind} there", False
        return f"{kind} is missing there", True
    if ours.directory != theirs.directory:
        return f"is no {kind} there", False
    if theirs.directory:
        return "", True
    if theirs.build_id or ours.build_id:
        if theirs.build_id != ours.build_id:
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
    if theirs.digest != ours.digest:
        return "has other contents there", True
    if not theirs.digest and theirs.mtime_ns != ours.mtime_ns:
        return "has another modification time there (too large to compare contents)", True
    return _mode_difference(theirs, ours)


def _mode_difference(theirs: pb.FileFact, ours: pb.FileFact) -> tuple[str, bool]:
    # CRIU compares the mode of a file that is held open ("File ... has bad mode").
    if theirs.mode != ours.mode:
        return f"has mode {ours.mode:o} there, {theirs.mode:o} here", not theirs.build_id
    return "", True


def digest(path: str) -> bytes:
    """A 20-byte BLAKE2 digest of a file's contents."""
    state = hashlib.blake2b(digest_size=20)
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    return state.digest()


def build_id(path: str) -> str:
    """The GNU build id of an ELF file, hex; empty for anything else.

    Program headers and notes as in elf(5); 64-bit and 32-bit little-endian files.
    """
    with Path(path).open("rb") as file:
        head = file.read(_HEAD_BYTES)
        if head[:4] != _ELF_MAGIC or len(head) < 64 or head[5] != 1:
            return ""
        wide = head[4] == 2
        phoff = _number(head, 32, 8) if wide else _number(head, 28, 4)
        entry_size = _number(head, 54 if wide else 42, 2)
        count = _number(head, 56 if wide else 44, 2)
        for index in range(count):
            file.seek(phoff + index * entry_size)
            entry = file.read(entry_size)
            if len(entry) < entry_size or _number(entry, 0, 4) != _PT_NOTE:
                continue
            offset = _number(entry, 8, 8) if wide else _number(entry, 4, 4)
            size = _number(entry, 32, 8) if wide else _number(entry, 16, 4)
            file.seek(offset)
            if found := _build_id_note(file.read(min(size, 1 << 16))):
                return found
    return ""


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
