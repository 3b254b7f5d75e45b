"""As lazy_task.py, of a restore that has left areas out, and that is held until it is told to run.

    python -m tests.integration.held_task WORKDIR BASE PAGES ACT

The first `LEFT_OUT` pages are in two areas that are not registered, the second of them read-only;
three of these pages are there already, as if the kernel had written to them. It says "held", and
"runs" once a line has come, then does ACT:

    look        nothing but look at all pages
    unregister  take the first area from the userfaultfd again and touch its page 2, once it runs
    replace     have shared memory take the place of the first area, which nobody announces
    fork        fork without the first area

What it did then is said, too; after one more line it looks at every page. ACT may also be how the
restore goes wrong: `hole`, an area is not there; `shared`, it is shared memory.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import sys

from tests.integration.lazy_task import FINISHED, PAGE, Memory, bad, hand_over, libc, register

LEFT_OUT = 16
FIRST = 8
STAINED = (0, 1, FIRST)
MADV_DONTFORK = 10
UNREGISTER = 0x8010AA01
SHM_REMAP = 0o40000
libc.shmat.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
libc.shmat.restype = ctypes.c_void_p


def word(address: int) -> ctypes.c_uint64:
    return ctypes.c_uint64.from_address(address)


def restore(workdir: str, base: int, pages: int, act: str) -> tuple[object, int]:
    assert libc.mmap(base, pages * PAGE, 3, 0x32, -1, 0) == base
    # One is only read: the kernel's own page of zeros.
    assert word(base).value == 0
    for page in STAINED[1:]:
        word(base + page * PAGE).value = 77
    assert not libc.mprotect(
        ctypes.c_void_p(base + FIRST * PAGE), ctypes.c_size_t((LEFT_OUT - FIRST) * PAGE), 1
    )
    if act == "hole":
        assert not libc.munmap(base + 4 * PAGE, PAGE)
    if act == "shared":
        assert libc.mmap(base + 4 * PAGE, PAGE, 3, 0x31, -1, 0) == base + 4 * PAGE
    fd = register(base + LEFT_OUT * PAGE, (pages - LEFT_OUT) * PAGE)
    kept = os.dup(fd)
    return hand_over(workdir, fd), kept


def replace(base: int, size: int) -> int:
    segment = libc.shmget(0, size, 0o600)
    assert segment >= 0
    assert libc.shmat(segment, base, SHM_REMAP) == base
    libc.shmctl(segment, 0, None)
    return base


def fork(base: int, memory: Memory, told: int, telling: int) -> list[int]:
    assert not libc.madvise(base, FIRST * PAGE, MADV_DONTFORK)
    pid = os.fork()
    if pid:
        return [pid]
    # Its parent's end is told, too.
    os.close(telling)
    # Something of its own where its parent has the area.
    assert libc.mmap(base, FIRST * PAGE, 3, 0x32, -1, 0) == base
    memory.expected.update((base + page * PAGE, 0) for page in range(FIRST))
    os.read(told, 1)
    memory.check_all()
    os._exit(1 if memory.wrong else 0)


def main() -> None:
    workdir, base, pages, act = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    criu, kept = restore(workdir, base, pages, act)
    memory = Memory(base, pages)
    children: list[int] = []
    mine, theirs = os.pipe()
    print("held", flush=True)
    sys.stdin.readline()
    criu.send(struct.pack("=i", FINISHED))  # type: ignore[attr-defined]
    criu.close()  # type: ignore[attr-defined]
    print("runs", flush=True)
    if act == "unregister":
        fcntl.ioctl(kept, UNREGISTER, struct.pack("=QQ", base, FIRST * PAGE))
        assert word(base + 2 * PAGE).value == 0
        memory.expected[base + 2 * PAGE] = 0
    elif act == "replace":
        replace(base, FIRST * PAGE)
        memory.expected.update((base + page * PAGE, 0) for page in range(FIRST))
    elif act == "fork":
        children = fork(base, memory, mine, theirs)
    print("did", flush=True)
    sys.stdin.readline()
    os.write(theirs, b"!")
    memory.check_all()
    sys.exit(1 if memory.wrong or bad(children) else 0)


if __name__ == "__main__":
    main()
