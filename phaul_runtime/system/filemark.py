"""Which file it is: a file system gives the number of a removed one to the next that is made."""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from typing import NamedTuple

_AT_FDCWD = -100
_AT_EMPTY_PATH, _AT_NO_AUTOMOUNT = 0x1000, 0x800
_STATX_TYPE, _STATX_INO, _STATX_BTIME = 0x1, 0x100, 0x800
_SIZE = 256
_libc = ctypes.CDLL(None, use_errno=True)


class Mark(NamedTuple):
    """What tells a file from every other, before and after it.

    Attributes:
        device: of its file system.
        inode: its number there.
        born_ns: when it was made, since the epoch; 0 where the file system does not tell, and of a
            directory: overlayfs makes it anew with the first file that is written there.
    """

    device: int
    inode: int
    born_ns: int


def mark_of(file: int | str) -> Mark:
    """The mark of an open file, or of what a link of /proc/PID/fd and the like leads to.

    Raises:
        OSError: there is none.
    """
    fd, path = (file, b"") if isinstance(file, int) else (_AT_FDCWD, os.fsencode(file))
    flags = _AT_NO_AUTOMOUNT | (_AT_EMPTY_PATH if isinstance(file, int) else 0)
    data = ctypes.create_string_buffer(_SIZE)
    if _libc.statx(fd, ctypes.c_char_p(path), flags, _STATX_TYPE | _STATX_INO | _STATX_BTIME, data):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    # struct statx of linux/stat.h: mask, mode, inode, birth, device.
    (mask,) = struct.unpack_from("=I", data, 0)
    (mode,) = struct.unpack_from("=H", data, 28)
    (inode,) = struct.unpack_from("=Q", data, 32)
    seconds, nanoseconds = struct.unpack_from("=qI", data, 80)
    device = os.makedev(*struct.unpack_from("=II", data, 136))
    tells = mask & _STATX_BTIME and not stat.S_ISDIR(mode)
    born = seconds * 1_000_000_000 + nanoseconds if tells else 0
    return Mark(device, inode, max(0, born))
