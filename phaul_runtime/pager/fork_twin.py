"""Two processes with one table of descriptors.

A userfaultfd that is closed lets the process it belongs to run on with zeros. As long as one of the
pair lives, the table lives, and with it every userfaultfd in it, also one that the other received a
moment before it died.

A process of the pair has one thread, and closes by number: an object that closes its descriptor
when it is collected would close, in the twin, what the number means by then.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal

_CLONE_FILES = 0x400
_SYS_CLONE = {"x86_64": 56, "aarch64": 220, "riscv64": 220, "ppc64le": 120, "s390x": 120}

# Holds the interpreter's lock through the call, as `os.fork` does.
_syscall = ctypes.PyDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long
_python = ctypes.pythonapi


def clone() -> int:
    """`os.fork`, but the table of descriptors is shared.

    Raises:
        OSError: no more processes, or a machine whose number of the call is not known.
    """
    number = _SYS_CLONE.get(platform.machine())
    if number is None:
        raise OSError(f"clone is not known on {platform.machine()}")
    arguments = [ctypes.c_long(value) for value in (number, _CLONE_FILES | signal.SIGCHLD)]
    # Stack, ids and thread-local storage: none. s390x wants the stack first.
    arguments += [ctypes.c_long(0)] * 4
    if platform.machine() == "s390x":
        arguments[1], arguments[2] = arguments[2], arguments[1]
    _python.PyOS_BeforeFork()
    pid = int(_syscall(*arguments))
    if pid == 0:
        _python.PyOS_AfterFork_Child()
        return 0
    code = ctypes.get_errno()
    _python.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(code, os.strerror(code))
    return pid


def end(pidfd: int) -> None:
    """Kill and reap a child, and close its pidfd."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    os.close(pidfd)
