"""Doing file work as the user whom a file belongs to: the kernel then refuses what he may not do.

By the user, group and groups that the kernel has for access to files, of the calling thread alone
(setfsuid(2)): nobody gets a right to signal or trace us by that. All rights that root has on files
go with it; one may be kept, to enter and write to directories (CAP_DAC_OVERRIDE).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
from collections.abc import Callable, Iterator, Sequence

from phaul_runtime.engine.targets import User

# glibc's own function changes all threads.
_SETGROUPS = {
    "x86_64": 116,
    "aarch64": 159,
    "riscv64": 159,
    "loongarch64": 159,
    "ppc64le": 81,
    "s390x": 206,
}
_CAP_DAC_OVERRIDE = 1 << 1
_CAPABILITY_VERSION_3 = 0x20080522
_NOBODY_AT_ALL = (1 << 32) - 1
_libc = ctypes.CDLL(None, use_errno=True)

ROOT = User(0, 0)


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


@contextlib.contextmanager
def acting_as(user: User, *, override: bool = False) -> Iterator[None]:
    """In the block, this thread works on files as `user`.

    Args:
        user: of nobody else a file is made, changed or removed.
        override: whether the permissions of directories and files do not count; owners do, and so
            does the sticky bit.

    Raises:
        OSError: it cannot be done on this host, or for that user.
    """
    if os.geteuid() != 0:
        if user.uid != os.geteuid():
            raise PermissionError(errno.EPERM, f"is not for others than uid {user.uid}")
        yield
        return
    if user.uid == 0:
        yield
        return
    if not 0 < user.uid < _NOBODY_AT_ALL or not 0 <= user.gid < _NOBODY_AT_ALL:
        raise OSError(errno.EINVAL, f"there is no user {user.uid}, or no group {user.gid}")
    ours, group = os.getgroups(), os.getegid()
    try:
        _set_groups(user.groups)
        _set(_libc.setfsgid, user.gid)
        _set(_libc.setfsuid, user.uid)
        if override:
            _raise_override()
        yield
    finally:
        try:
            _set(_libc.setfsuid, 0)
            _set(_libc.setfsgid, group)
            _set_groups(ours)
        except OSError:
            # A thread that went on so would fail at anything, anywhere.
            os.abort()


def _set(function: Callable[[ctypes.c_uint32], int], number: int) -> None:
    """setfsuid or setfsgid, which do not say whether they did it."""
    function(ctypes.c_uint32(number))
    if function(ctypes.c_uint32(_NOBODY_AT_ALL)) & _NOBODY_AT_ALL != number:
        raise PermissionError(errno.EPERM, f"cannot work as {number}: CAP_SETUID or CAP_SETGID?")


def _set_groups(groups: Sequence[int]) -> None:
    number = _SETGROUPS.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"cannot work as another user on {platform.machine()}")
    array = (ctypes.c_uint32 * len(groups))(*groups)
    if _libc.syscall(ctypes.c_long(number), ctypes.c_size_t(len(groups)), array):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _raise_override() -> None:
    header, data = _Header(_CAPABILITY_VERSION_3, 0), (_Data * 2)()
    if _libc.capget(ctypes.byref(header), data) == 0:
        data[0].effective |= _CAP_DAC_OVERRIDE & data[0].permitted
        if _libc.capset(ctypes.byref(header), data) == 0:
            return
    code = ctypes.get_errno()
    raise OSError(code, os.strerror(code))
