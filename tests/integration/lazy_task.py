"""A process that gets its memory from a pager, and says whether each page is right.

    lazy_task.py WORKDIR BASE PAGES SEED [STEPS]

Does what CRIU's restorer does: a userfaultfd over fresh memory, handed to lazy-pages.socket with a
pid, then "finished". Then it touches, writes, unmaps, moves, gives up and forks at random, and at
the end looks at every page. Exit 0: all right; 1: wrong pages, told on stdout; 2: the restore
failed, nothing has run; 3: no userfaultfd here.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import os
import random
import socket
import struct
import sys
import time

PAGE = 4096
FINISHED = 0x52535446
# A pid as in the images: the pager knows it from the plan only.
PID = 42
SYS = {"x86_64": 323, "aarch64": 282}[os.uname().machine]
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)


class Memory:
    """What each mapped page must hold: the number of a page of the file, or a written one."""

    def __init__(self, base: int, pages: int) -> None:
        self.expected = {base + i * PAGE: i + 1 for i in range(pages)}
        self.wrong = 0

    def check(self, address: int) -> None:
        # First, middle and last word: a page is one or the other, as a whole.
        got = [ctypes.c_uint64.from_address(address + at).value for at in (0, 2048, 4088)]
        if got != [self.expected[address]] * 3:
            self.wrong += 1
            print(f"{os.getpid()} {address:x}: {got}, not {self.expected[address]}", flush=True)

    def check_all(self) -> None:
        for address in sorted(self.expected):
            self.check(address)


def register(base: int, size: int) -> int:
    fd = int(libc.syscall(SYS, os.O_CLOEXEC | os.O_NONBLOCK))
    if fd < 0:
        sys.exit(3)
    # Fork, remap, remove and unmap events, as CRIU asks for.
    fcntl.ioctl(fd, 0xC018AA3F, struct.pack("=QQQ", 0xAA, 0x2 | 0x4 | 0x8 | 0x40, 0))
    fcntl.ioctl(fd, 0xC020AA00, struct.pack("=QQQQ", base, size, 1, 0))
    return fd


def hand_over(workdir: str, fd: int) -> socket.socket:
    os.chdir(workdir)
    criu = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    criu.connect("lazy-pages.socket")
    # A zombie has no memory: only its negated pid.
    criu.send(struct.pack("=i", -41))
    criu.send(struct.pack("=i", PID))
    criu.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
    os.close(fd)
    return criu


def act(memory: Memory, rng: random.Random, steps: int, depth: int) -> list[int]:
    children: list[int] = []
    for step in range(steps):
        addresses = sorted(memory.expected)
        at = rng.randrange(len(addresses))
        start, count = addresses[at], 1
        most = rng.choice((1, 4, 64))
        while count < most and memory.expected.get(start + count * PAGE) is not None:
            count += 1
        size = count * PAGE
        kind = rng.choice(("touch", "touch", "write", "remove", "unmap", "move", "fork"))
        if kind == "touch":
            memory.check(start)
        elif kind == "write":
            memory.expected[start] = 1 << 40 | step
            words = (ctypes.c_uint64 * 512).from_address(start)
            words[:] = [1 << 40 | step] * 512
        elif kind == "remove":
            assert not libc.madvise(start, size, 4)
            memory.expected.update((start + i * PAGE, 0) for i in range(count))
        elif kind == "unmap" and len(addresses) > 4 * count:
            assert not libc.munmap(start, size)
            for i in range(count):
                del memory.expected[start + i * PAGE]
        elif kind == "move":
            # Grown by a page: nothing has been there before.
            to = libc.mremap(start, size, size + PAGE, 1)
            if to == ctypes.c_void_p(-1).value:
                # It lies in two areas: those cannot be moved and grown in one go.
                assert ctypes.get_errno() == errno.EFAULT
                continue
            pages = [memory.expected.pop(start + i * PAGE) for i in range(count)]
            memory.expected.update((to + i * PAGE, page) for i, page in enumerate(pages))
            memory.expected[to + size] = 0
        elif kind == "fork" and depth < 2 and len(children) < 3:
            pid = os.fork()
            if pid == 0:
                memory.wrong = 0
                inner = act(memory, rng, steps // 4, depth + 1)
                memory.check_all()
                os._exit(1 if memory.wrong or bad(inner) else 0)
            children.append(pid)
        time.sleep(rng.choice((0, 0, 0.0005)))
    return children


def bad(children: list[int]) -> int:
    return sum(os.waitpid(child, 0)[1] != 0 for child in children)


def main() -> None:
    workdir, base, pages, seed = sys.argv[1], *map(int, sys.argv[2:5])
    steps = int(sys.argv[5]) if len(sys.argv) > 5 else 200
    # Private, anonymous, fixed.
    assert libc.mmap(base, pages * PAGE, 3, 0x32, -1, 0) == base
    # Two areas: a run of the plan may go over the border.
    libc.mprotect(ctypes.c_void_p(base), ctypes.c_size_t((pages // 3) * PAGE), 7)
    memory = Memory(base, pages)
    criu = hand_over(workdir, register(base, pages * PAGE))
    # Before the end of the restore the restorer may touch memory, too.
    memory.check(base + PAGE)
    try:
        criu.send(struct.pack("=i", FINISHED))
    except OSError:
        sys.exit(2)
    criu.close()
    print("runs", flush=True)
    children = act(memory, random.Random(seed), steps, 0)
    memory.check_all()
    sys.exit(1 if memory.wrong or bad(children) else 0)


if __name__ == "__main__":
    main()
