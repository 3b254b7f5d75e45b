"""What CRIU says on lazy-pages.socket while it restores, read into the journal.

CRIU v4.1.1 and v4.2, criu/uffd.c: for each task a pid as a native int, then one byte with the
task's userfaultfd as a control message; for a zombie only the pid, negated (`send_uffd`). The pid
is the one of the images. Sent under a lock, before the task registers its memory with it and before
anything of it runs. At last `0x52535446` (`lazy_pages_finish_restore`): after post-restore, before
the tasks are let go; a failure to send that makes CRIU kill what it restored. CRIU expects no
answer to anything.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct

from phaul_runtime.pager.shared_log import Kind, SharedLog
from phaul_runtime.pager.uffd import libc

FINISHED = 0x52535446
_INT = struct.Struct("=i")
_CONTROL = struct.Struct("=QiiI")
_CONTROL_SIZE = 24
_DONTWAIT_CLOEXEC = 0x40 | 0x40000000

_recv = libc.recv
_recv.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_recv.restype = ctypes.c_ssize_t
_recvmsg = libc.recvmsg
_recvmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_recvmsg.restype = ctypes.c_ssize_t


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _Header(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_size", ctypes.c_uint),
        ("vectors", ctypes.c_void_p),
        ("count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_size", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


def listen(name: str, umask: int = 0o177) -> int:
    """A listening socket in the current directory, for its owner only; what was there goes.

    Raises:
        OSError: it cannot be made.
    """
    if os.path.lexists(name):
        os.unlink(name)  # noqa: PTH108 - relative to the current directory on purpose
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    before = os.umask(umask)
    try:
        listener.bind(name)
        listener.listen(16)
    finally:
        os.umask(before)
    return listener.detach()


def accept(listener: int) -> int:
    """The next connection, not blocking; -1 if there is none."""
    sock = socket.socket(fileno=listener)
    try:
        connection, _ = sock.accept()
    except OSError:
        return -1
    finally:
        sock.detach()
    connection.setblocking(False)
    return connection.detach()


def shut(connection: int) -> None:
    """CRIU's next sending fails from now on; what it has sent can still be read."""
    sock = socket.socket(fileno=connection)
    try:
        sock.shutdown(socket.SHUT_RD)
    except OSError:
        pass  # It is gone already.
    finally:
        sock.detach()


def is_connection(fd: int, name: str) -> bool:
    """Whether a descriptor is an accepted connection of the listening socket `name`."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        return False
    try:
        return bool(
            sock.family == socket.AF_UNIX
            and sock.getsockname() == name
            and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        )
    except OSError:
        return False
    finally:
        sock.detach()


def said(body: bytes) -> int:
    """The number in a SAID record."""
    return int(_INT.unpack_from(body)[0])


def handed(body: bytes) -> int:
    """The descriptor in a HANDED record."""
    return int(_CONTROL.unpack_from(body)[3])


def receive(connection: int, journal: SharedLog, descriptor: bool) -> bool | None:
    """Read CRIU's next word into the journal's next record, not yet counted.

    Args:
        connection: CRIU's.
        journal: where to.
        descriptor: whether a userfaultfd is due; a number otherwise.

    Returns:
        False if there is none yet, None at the end of the connection.

    Raises:
        OSError: the connection broke, or this is not what CRIU speaks.
    """
    if not descriptor:
        journal.expect(Kind.SAID, 0)
        size = _recv(connection, journal.body_address, _INT.size, _DONTWAIT_CLOEXEC)
        good = size == _INT.size
    else:
        journal.expect(Kind.HANDED, 0)
        byte = ctypes.create_string_buffer(1)
        vector = _Vector(ctypes.addressof(byte), 1)
        header = _Header(
            None, 0, ctypes.addressof(vector), 1, journal.body_address, _CONTROL_SIZE, 0
        )
        size = _recvmsg(connection, ctypes.addressof(header), _DONTWAIT_CLOEXEC)
        length, level, kind, _ = _CONTROL.unpack_from(journal.body)
        good = size == 1 and (length, level, kind) == (
            _CONTROL.size,
            socket.SOL_SOCKET,
            socket.SCM_RIGHTS,
        )
    if good:
        return True
    if size == 0:
        return None
    code = ctypes.get_errno()
    if size < 0 and code in (11, 4):
        return False
    raise OSError(code, "not what CRIU says")
