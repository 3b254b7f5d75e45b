"""What a target consists of beside its memory: files in use, and directories."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TREE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,19}")


@dataclass(frozen=True)
class User:
    """Who works on files: the first two are those that new files get."""

    uid: int
    gid: int
    groups: Sequence[int] = ()


@dataclass
class FileFact:
    """A file that a target holds open or has mapped, or a directory in which it stands.

    Attributes:
        path: absolute.
        size: bytes; 0 of a directory.
        mode: permission bits.
        uid: whose it is.
        gid: and of which group.
        build_id: hex; of ELF files only.
        digest: of the contents of a file without a build id; empty if they were not read.
        directory: it is one.
        written: the target can write to it.
        executable: mapped with PROT_EXEC.
        mtime_ns: of its last modification, since the epoch.
        shared_map: mapped shared and writable: it changes without a new mtime.
        path_only: known to the target by O_PATH descriptors alone.
        leased: somebody has a lease on it: it was not opened.
        user: as whom the target uses it; None: as the file's owner.
        owner_may_place: the file's owner may write to its directory at the source.
        device: with the next two, which file it is, at the source.
        inode: as of stat(2).
        born_ns: as of statx(2); 0 where unknown.
        held_by: where the target has it, as `/proc/4711/fd/3`; at the source alone.
    """

    path: str
    size: int = 0
    mode: int = 0
    uid: int = 0
    gid: int = 0
    build_id: str = ""
    digest: bytes = b""
    directory: bool = False
    written: bool = False
    executable: bool = False
    mtime_ns: int = 0
    shared_map: bool = False
    path_only: bool = False
    leased: bool = False
    user: User | None = None
    owner_may_place: bool = False
    device: int = 0
    inode: int = 0
    born_ns: int = 0
    held_by: Sequence[str] = ()


@dataclass(frozen=True)
class FileVerdict:
    """How a file differs at the destination.

    Attributes:
        path: of the file.
        reason: how.
        copyable: whether carrying it cannot harm that host.
    """

    path: str
    reason: str
    copyable: bool


@dataclass(frozen=True)
class Tree:
    """A directory of the target, with all that is in it on the same file system.

    Attributes:
        name: what the two halves of an engine call it: `[a-z0-9][a-z0-9-]{0,19}`.
        path: where it lies at the source, absolute.
        always: files, relative to it, whose contents are compared in the freeze whatever their
            times say: those that are mapped shared and writable.
        first: carried once, before the trees that are not, if the destination has a place for it.
            `SourceHalf.stage` makes it just before, so that its path need not exist until then.
    """

    name: str
    path: str
    always: tuple[str, ...] = ()
    first: bool = False

    def __post_init__(self) -> None:
        if not TREE_NAME.fullmatch(self.name):
            raise ValueError(f"malformed name of a tree: {self.name!r}")
        if not Path(self.path).is_absolute() or "\0" in self.path:
            raise ValueError(f"the path of a tree is not absolute: {self.path!r}")
        for path in self.always:
            parts = Path(path).parts
            if not parts or parts[0] == "/" or ".." in parts or "\0" in path:
                raise ValueError(f"not a path within a tree: {path!r}")
