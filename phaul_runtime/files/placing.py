"""Where a carried file goes at the destination, and as whom everything is done there.

Each step is relative to a descriptor of the directory, which is found without following links
(`pathwalk`), and is done as the user to whom the file belongs (`identity`): what he may not do, the
kernel refuses. Where he may not write to the directory, its permissions are overridden only if he
may not write to it at the source either: there, too, an administrator put the file in its place
(/var/log/app.log).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from phaul_runtime.engine.targets import FileFact, User
from phaul_runtime.files.identity import ROOT, acting_as
from phaul_runtime.files.in_use import owner_of, user_of
from phaul_runtime.system.filemark import Mark, mark_of
from phaul_runtime.system.pathwalk import walk

_NAME_BYTES = 255
_SET_ID = stat.S_ISUID | stat.S_ISGID
_HOW = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


@dataclass(frozen=True)
class Place:
    """A file's or a directory's place.

    Attributes:
        path: absolute.
        directory: which directory is above it, where that is known.
        user: as whom it is worked on.
        override: whether the permissions of that directory do not count.
    """

    path: str
    directory: Mark | None = None
    user: User = ROOT
    override: bool = False

    @classmethod
    def recall(cls, noted: Mapping[str, Any]) -> Place:
        """What `noted` has said, out of a journal."""
        uid, gid, groups = noted["user"]
        return cls(
            noted["path"],
            Mark(*noted["directory"]),
            User(uid, gid, tuple(groups)),
            bool(noted["override"]),
        )

    def noted(self) -> dict[str, Any]:
        """For a journal; JSON values."""
        return {
            "path": self.path,
            "directory": list(self.directory or ()),
            "user": [self.user.uid, self.user.gid, list(self.user.groups)],
            "override": self.override,
        }

    @contextlib.contextmanager
    def entered(self) -> Iterator[tuple[int, str]]:
        """In the block, this thread acts as the user; yields the directory, and the name in it.

        Raises:
            OSError: the directory is gone, is another one by now, or a link is in the way.
        """
        above, name = _split(self.path)
        with walk(above) as (directory, missing):
            if missing:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), above)
            if self.directory not in (None, mark_of(directory)):
                raise OSError(errno.ESTALE, "is another directory by now", above)
            with acting_as(self.user, override=self.override):
                yield directory, name

    def beside(self, suffix: str) -> str:
        """A name in the same directory, as `.NAME.phaul-ID.new`; of a long name a part."""
        name = os.fsencode(PurePosixPath(self.path).name)
        end = os.fsencode(suffix)
        if len(name) + len(end) + 1 > _NAME_BYTES:
            end = b"~" + hashlib.blake2b(name, digest_size=8).hexdigest().encode() + end
            # Not within a character: some file systems want UTF-8.
            name = name[: _NAME_BYTES - 1 - len(end)].decode(errors="ignore").encode()
        return os.fsdecode(b"." + name + end)


def find_place(fact: FileFact, note: Callable[[Place], None], *, made: bool = False) -> Place:
    """The place of a file, or of a directory that is missing; directories above it are made.

    Args:
        fact: of the source's file.
        note: told of each directory just before it is made.
        made: whether the directory above is known to be made for this move.

    Raises:
        OSError: it has none here.
    """
    owner = owner_of(fact)
    above, _ = _split(fact.path)
    with walk(above) as (directory, missing):
        if not missing:
            return _place(fact, owner, directory, made=made)
    done = above.split("/")[: -len(missing)] if missing else []
    for name in missing:
        done.append(name)
        place = Place("/".join(done))
        place = replace(place, user=owner if may_place(place.path, owner) else ROOT)
        place = make_directory(place, 0o755, note)
    return find_place(fact, note, made=True)


def make_directory(place: Place, mode: int, note: Callable[[Place], None]) -> Place:
    """Make a directory, which belongs to the place's user from the beginning.

    Args:
        place: where; its directory is there.
        mode: its permissions.
        note: told of it before, with the directory above it.

    Raises:
        OSError: it cannot be made.
    """
    above, name = _split(place.path)
    with walk(above) as (directory, missing):
        if missing:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), above)
        place = replace(place, directory=mark_of(directory))
        note(place)
        with acting_as(place.user, override=place.override):
            os.mkdir(name, 0o700, dir_fd=directory)
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | _HOW, dir_fd=directory)
            try:
                if os.fstat(fd).st_uid != place.user.uid:
                    raise OSError(errno.ESTALE, "was replaced while it was made", place.path)
                os.fchmod(fd, mode)
            finally:
                os.close(fd)
    return place


def _place(fact: FileFact, owner: User, directory: int, *, made: bool) -> Place:
    info = os.fstat(directory)
    if not stat.S_ISDIR(info.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), fact.path)
    override = not _may_write(directory, owner)
    if override and fact.owner_may_place and not made:
        raise PermissionError(
            errno.EACCES,
            f"uid {fact.uid}, to whom it belongs, may not write to its directory there",
        )
    place = Place(fact.path, mark_of(directory), owner, override)
    # What a target of root's may replace, its owner may not.
    if user_of(fact).uid == 0 and _owner(directory, fact.path) not in (None, owner.uid):
        return replace(place, user=ROOT, override=False)
    return place


def _owner(directory: int, path: str) -> int | None:
    try:
        return os.stat(_split(path)[1], dir_fd=directory, follow_symlinks=False).st_uid
    except FileNotFoundError:
        return None


def may_place(path: str, owner: User) -> bool:
    """Whether a user may write to the directory of `path`; yes, if that cannot be told."""
    try:
        with walk(_split(path)[0]) as (directory, missing):
            return bool(missing) or _may_write(directory, owner)
    except OSError:
        return True


def _may_write(directory: int, user: User) -> bool:
    with acting_as(user):
        # By the same rights as an open: faccessat2(2) with AT_EACCESS.
        return os.access(f"/proc/self/fd/{directory}", os.W_OK | os.X_OK, effective_ids=True)


# -- what may be replaced ----------------------------------------------------------------------


def obstacle(fact: FileFact, *, replaces: bool) -> str:
    """Why a file cannot be put in its place on this host; empty if it can. Changes nothing."""
    if fact.path_only and not fact.directory:
        return "the target knows it by its path alone (O_PATH)"
    if fact.leased:
        return "somebody has a lease on it at the source, which reading would break"
    if not fact.directory and fact.mode & _SET_ID and user_of(fact).uid not in (0, fact.uid):
        return f"it is set-user-ID or set-group-ID of uid {fact.uid}, whom the target is not"
    try:
        above, name = _split(fact.path)
        with walk(above) as (directory, missing):
            if missing:
                return ""
            place = _place(fact, owner_of(fact), directory, made=False)
            if replaces:
                may_replace(fact, directory, name)
            elif len(os.fsencode(place.beside(""))) > _NAME_BYTES:
                return "its name is too long there"
    except OSError as error:
        return f"{error.strerror}"
    return ""


def may_replace(fact: FileFact, directory: int, name: str) -> bool:
    """Whether there is a file in the place of another; that it may be replaced, too.

    Raises:
        OSError: it may not, or it is something else.
    """
    try:
        info = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(info.st_mode):
        raise OSError(errno.EEXIST, "is no regular file there")
    user = user_of(fact)
    if not fact.written:
        raise PermissionError(errno.EACCES, "the target only reads it")
    if user.uid not in (0, info.st_uid) and not _may_read_and_write(info, user):
        raise PermissionError(
            errno.EACCES, f"it belongs to uid {info.st_uid} there, and uid {user.uid}, who is the "
            "target, may not write to it"
        )  # fmt: skip
    return True


def _may_read_and_write(info: os.stat_result, user: User) -> bool:
    """By the mode's bits; a file that an ACL opens counts as closed to all but its group."""
    if info.st_mode & _SET_ID:
        return False
    bits = info.st_mode >> (3 if info.st_gid in (user.gid, *user.groups) else 0)
    return bits & 0o6 == 0o6


def _split(path: str) -> tuple[str, str]:
    """The directory and the name.

    Raises:
        OSError: it has none.
    """
    above, _, name = path.rpartition("/")
    if name in ("", ".", "..") or "\0" in path or not path.startswith("/"):
        raise OSError(errno.EINVAL, "is no usable path", path)
    return above or "/", name
