"""What a test has for itself: a network in which nobody else listens or speaks."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Iterator

import pytest

# Python has these calls from 3.12 on.
_NEWNET = 0x40000000
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914
_IFF_UP = 1
_IFREQ = struct.Struct("16sh14x")


@contextlib.contextmanager
def own_network() -> Iterator[None]:
    """This thread is in a network of its own meanwhile, with what it starts; its loopback is up.

    Raises:
        OSError: it may not make one: it is not root, or root without CAP_SYS_ADMIN.
    """
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _call("unshare", _NEWNET)
        try:
            _bring_up("lo")
            yield
        finally:
            _call("setns", before, _NEWNET)
    finally:
        os.close(before)


def _call(name: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments):
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def _bring_up(device: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        answer = fcntl.ioctl(any_socket, _SIOCGIFFLAGS, _IFREQ.pack(device.encode(), 0))
        flags = _IFREQ.unpack(answer)[1] | _IFF_UP
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, _IFREQ.pack(device.encode(), flags))


@pytest.fixture(scope="package", autouse=True)
def network() -> Iterator[None]:
    """For a conftest: two runs of its tests side by side share no port and no traffic.

    Who may not have a network of its own uses the machine's. A port that was chosen to be used
    again may be taken there meanwhile; otherwise every test lets the kernel choose.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(own_network())
        yield
