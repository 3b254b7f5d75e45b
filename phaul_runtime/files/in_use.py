"""The very file that a target uses, whatever has its name by now.

It is reached through the target's own descriptors and mappings in /proc, and recognized by its mark
(`system.filemark`): its path is the user's to change at any moment. Where only the path is left, it
is opened as the target's user, so that nothing is read that the user could not read.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable

from phaul_runtime.engine.targets import FileFact, User
from phaul_runtime.files.identity import acting_as
from phaul_runtime.files.leases import has_lease, leased_inodes
from phaul_runtime.system.filemark import Mark, mark_of
from phaul_runtime.system.pathwalk import open_path, reopen


def user_of(fact: FileFact) -> User:
    """As whom the target uses a file."""
    return fact.user or owner_of(fact)


def owner_of(fact: FileFact) -> User:
    """Whose a file is, with the groups that the target's user has, if he is the owner."""
    groups = fact.user.groups if fact.user and fact.user.uid == fact.uid else ()
    return User(fact.uid, fact.gid, groups)


def _mark(fact: FileFact) -> Mark:
    return Mark(fact.device, fact.inode, fact.born_ns)


def find_held(held_by: Iterable[str], known: Mark | None = None) -> int:
    """An O_PATH descriptor of what a target has at one of `held_by`; the caller closes it.

    Args:
        held_by: as /proc/4711/fd/3.
        known: which file it is, where that is known.

    Raises:
        OSError: it has it no more.
    """
    for link in held_by:
        try:
            fd = os.open(link, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        if known is None or known == mark_of(fd):
            return fd
        os.close(fd)
    raise FileNotFoundError(errno.ENOENT, "is not in use any more")


def find(fact: FileFact) -> int:
    """An O_PATH descriptor of a target's file: of the one that is known, else what is at its path.

    Raises:
        OSError: there is none, or a link is in the way.
    """
    try:
        return find_held(fact.held_by, _mark(fact))
    except FileNotFoundError:
        pass
    return open_path(fact.path)


def changed_since(fact: FileFact) -> bool:
    """Whether a file may have other contents now than when `fact` was gathered."""
    if fact.shared_map:
        return True
    try:
        fd = find(fact)
    except OSError:
        return True
    try:
        info, mark = os.fstat(fd), mark_of(fd)
    finally:
        os.close(fd)
    return (mark, info.st_size, info.st_mtime_ns) != (_mark(fact), fact.size, fact.mtime_ns)


def open_to_read(fact: FileFact, found: int) -> int:
    """Open what `find` found for reading; the caller closes it.

    The file that is known, as root: it goes with its owner and mode. Another, as the target's user.

    Raises:
        OSError: it is no file, somebody has a lease on it, or it is not the user's to read.
    """
    info = os.fstat(found)
    if not stat.S_ISREG(info.st_mode):
        raise OSError(errno.EINVAL, "is no regular file any more")
    if info.st_ino in leased_inodes() or any(map(has_lease, fact.held_by)):
        raise OSError(errno.EAGAIN, "has a lease on it, which reading would break")
    if mark_of(found) == _mark(fact):
        return reopen(found, os.O_RDONLY)
    with acting_as(user_of(fact)):
        return reopen(found, os.O_RDONLY)
