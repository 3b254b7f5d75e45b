"""The kernel's userfaultfd: its messages and the calls that answer them.

Calls return the errno and do not raise: most of them are answers, not failures.
"""

from __future__ import annotations

import ctypes
import struct

PAGE = 4096

EVENT_PAGEFAULT = 0x12
EVENT_FORK = 0x13
EVENT_REMAP = 0x14
EVENT_REMOVE = 0x15
EVENT_UNMAP = 0x16

MESSAGE_SIZE = 32
ADDRESS = struct.Struct("=16xQ")
"""The address in a page fault's message."""
FORK = struct.Struct("=8xI")
"""The child's descriptor, which the reading has put into the reader's table."""
REMAP = struct.Struct("=8xQQQ")
"""From, to, length."""
REMOVE = struct.Struct("=8xQQ")
"""Start, end; of an unmap too."""

_REGISTER, _WAKE = 0xC020AA00, 0x8010AA02
_COPY, _ZEROPAGE = 0xC028AA03, 0xC020AA04

libc = ctypes.CDLL(None, use_errno=True)
_ioctl = libc.ioctl
_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_REGISTER_MISSING = 1
_argument = (ctypes.c_int64 * 5)()
_pointer = ctypes.addressof(_argument)


def copy(fd: int, to: int, source: int, size: int) -> tuple[int, int]:
    """Fill missing pages and wake who waits for them.

    Returns:
        Bytes done, from the start; and the errno of what came then, 0 if all is done. EAGAIN
        after none: an event is to be read first, or its sender has not gone on yet.
    """
    argument = _argument
    argument[0], argument[1], argument[2], argument[3], argument[4] = to, source, size, 0, 0
    if not _ioctl(fd, _COPY, _pointer):
        return size, 0
    return max(0, argument[4]), ctypes.get_errno()


def zero(fd: int, to: int) -> int:
    """Fill one missing page with zeros; the errno, 0 if done."""
    argument = _argument
    argument[0], argument[1], argument[2], argument[3] = to, PAGE, 0, 0
    return ctypes.get_errno() if _ioctl(fd, _ZEROPAGE, _pointer) else 0


def register(fd: int, start: int, size: int) -> int:
    """Have missing pages announced from now on; the errno, 0 if done.

    Of the process that the descriptor came from; harmless where it is so already. EINVAL: there is
    nothing, or nothing of a kind that could be registered; ENOMEM: the process is ending.
    """
    argument = _argument
    argument[0], argument[1], argument[2], argument[3] = start, size, _REGISTER_MISSING, 0
    return ctypes.get_errno() if _ioctl(fd, _REGISTER, _pointer) else 0


def wake(fd: int, address: int) -> None:
    """Let who waits for a page try again."""
    argument = _argument
    argument[0], argument[1] = address, PAGE
    _ioctl(fd, _WAKE, _pointer)
