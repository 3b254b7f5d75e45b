"""Descriptors of paths whose directories others may write to: none of their links is followed.

A path is walked name by name, each relative to the descriptor of the directory before it. A link is
followed only if root alone can have put it there: it belongs to root, and so does the directory in
which it lies, which is writable by nobody else (/bin > usr/bin, /var/run > /run). One step with
`openat2` and RESOLVE_NO_SYMLINKS would refuse those too.

The descriptors are O_PATH: nothing is opened by a walk, so a FIFO, a device, or a lease on a file
does not notice. A file system that may never answer is not asked either: one of FUSE that an
ordinary user mounted, or one that autofs would have to mount first.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from phaul_runtime.system.procfs import mounts

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_LINKS = 40
_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
DIRECTORY = _PATH | os.O_DIRECTORY
"""Flags for the directory of a name itself, whatever is mounted there; nothing that is a link."""
_MOUNT_ID = re.compile(rb"^mnt_id:\s*([0-9]+)$", re.MULTILINE)
_USER_ID = re.compile(r"\buser_id=([0-9]+)")
_ROOT = 0


@contextlib.contextmanager
def walk(path: str) -> Iterator[tuple[int, list[str]]]:
    """Go along an absolute path as far as it exists.

    Yields:
        An O_PATH descriptor of the last that exists (it is closed in the end), and the names that
        are missing below it.

    Raises:
        OSError: why it cannot be gone along; `filename` is the place.
    """
    if not path.startswith("/") or "\0" in path or ".." in path.split("/"):
        raise OSError(errno.EINVAL, "is no absolute path", path)
    opened = [os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)]
    try:
        missing = _walk(opened, path)
        yield opened[-1], missing
    finally:
        for fd in opened:
            os.close(fd)


def open_path(path: str) -> int:
    """An O_PATH descriptor of what an absolute path leads to; the caller closes it.

    Raises:
        OSError: as `walk`, or it does not exist.
    """
    with walk(path) as (fd, missing):
        if missing:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return os.dup(fd)


def reopen(fd: int, flags: int) -> int:
    """Open what a descriptor is of, and nothing else, whatever has its name now; never waits."""
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)


def is_ours_alone(info: os.stat_result) -> bool:
    """Whether only root, or this process's user, can have written to it."""
    return info.st_uid in (_ROOT, os.geteuid()) and not info.st_mode & OTHERS_WRITE


def write_file(path: str, text: str) -> None:
    """Write a file of ours whole, mode 0644 if it is new, in a directory that is there.

    Raises:
        OSError: it cannot be, is no regular file, or has another name, which may be anybody's.
    """
    above, _, name = path.rpartition("/")
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with walk(above or "/") as (directory, missing):
        if missing:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), above)
        with os.fdopen(os.open(name, flags, 0o644, dir_fd=directory), "wb") as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1:
                raise OSError(errno.EEXIST, "is no file of its own", path)
            file.truncate(0)
            file.write(text.encode())


def make_directories(path: str, mode: int) -> None:
    """Make what is missing of a path.

    Raises:
        OSError: it cannot be made, or is no directory.
    """
    with walk(path) as (directory, missing), contextlib.ExitStack() as opened:
        if not stat.S_ISDIR(os.fstat(directory).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        at = directory
        for name in missing:
            at = make_directory(name, mode, at)
            opened.callback(os.close, at)


def make_directory(name: str, mode: int, above: int) -> int:
    """Make a directory in that of `above`; returns a descriptor, which the caller closes.

    Raises:
        OSError: it cannot be made, or has been replaced.
    """
    os.mkdir(name, mode, dir_fd=above)
    return os.open(name, DIRECTORY, dir_fd=above)


def who_else(path: str) -> str:
    """Where others than root could put something else in the way to a directory; empty if nowhere.

    In a directory with the sticky bit (/tmp) nobody replaces what is root's.
    """
    place = path
    while True:
        try:
            fd = open_path(place)
        except OSError as error:
            return f"{error.filename or place}: {error.strerror}"
        try:
            info = os.fstat(fd)
        finally:
            os.close(fd)
        sticky = place != path and info.st_mode & stat.S_ISVTX
        if info.st_uid not in (_ROOT, os.geteuid()) or (info.st_mode & OTHERS_WRITE and not sticky):
            return f"others may write to {place}, or own it"
        if place == "/":
            return ""
        place = place.rpartition("/")[0] or "/"


def private_problem(path: Path) -> str:
    """Why a directory cannot be made, or be trusted; empty if it is private and can be used."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        return f"{error.strerror}"
    return who_else(str(path))


def _walk(opened: list[int], path: str) -> list[str]:
    """Open what is on the path; returns what is missing of it."""
    links = 0
    names = _names(path)
    while names:
        name = names.popleft()
        if name == "..":  # out of a link
            if len(opened) > 1:
                os.close(opened.pop())
            continue
        try:
            fd = os.open(name, _PATH, dir_fd=opened[-1])
        except FileNotFoundError:
            return [name, *names]
        except OSError as error:
            raise OSError(error.errno, error.strerror, _path_of(opened[-1], name)) from error
        opened.append(fd)
        _refuse_to_wait(fd, opened[-2], name)
        info = os.fstat(fd)
        if stat.S_ISLNK(info.st_mode):
            opened.pop()
            try:
                links += 1
                target = _target(fd, opened[-1], name, info, links)
            finally:
                os.close(fd)
            if target.startswith("/"):
                while len(opened) > 1:
                    os.close(opened.pop())
            names.extendleft(reversed(_names(target)))
        elif names and not stat.S_ISDIR(info.st_mode):
            raise NotADirectoryError(
                errno.ENOTDIR, os.strerror(errno.ENOTDIR), _path_of(opened[-2], name)
            )
    return []


def _names(path: str) -> deque[str]:
    return deque(name for name in path.split("/") if name not in ("", "."))


def _path_of(directory: int, name: str) -> str:
    return f"{os.readlink(f'/proc/self/fd/{directory}').rstrip('/')}/{name}"


def _target(fd: int, directory: int, name: str, link: os.stat_result, links: int) -> str:
    """Where a link leads that may be followed."""
    if links > _LINKS:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), _path_of(directory, name))
    if link.st_uid not in (_ROOT, os.geteuid()) or not is_ours_alone(os.fstat(directory)):
        raise OSError(
            errno.ELOOP,
            f"is a link that uid {link.st_uid} or others may have made: it is not followed",
            _path_of(directory, name),
        )
    return os.readlink("", dir_fd=fd)


# -- file systems that may never answer --------------------------------------------------------


def _refuse_to_wait(fd: int, above: int, name: str) -> None:
    """Of a mount point that has just been reached, before anything is asked of what is there.

    Raises:
        OSError: it may never answer.
    """
    mount = _mount_id(fd)
    if mount == _mount_id(above):
        return
    kind, options = _mounted(mount)
    if kind == "autofs":
        raise OSError(errno.EAGAIN, "is not mounted: autofs would, look into it first (ls)",
                      _path_of(above, name))  # fmt: skip
    user = _USER_ID.search(options)
    if kind.startswith("fuse") and user and int(user[1]) not in (_ROOT, os.geteuid()):
        raise OSError(
            errno.EAGAIN,
            f"is a FUSE file system of uid {user[1]}, which need not answer",
            _path_of(above, name),
        )


def _mount_id(fd: int) -> bytes:
    found = _MOUNT_ID.search(Path(f"/proc/self/fdinfo/{fd}").read_bytes())
    return found[1] if found else b""


def _mounted(mount_id: bytes) -> tuple[str, str]:
    """Type and options of a mount; empty if it has just gone."""
    found = (mount for mount in mounts() if mount.id == mount_id)
    return next(((mount.type, mount.options) for mount in found), ("", ""))
