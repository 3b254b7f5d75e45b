"""As lazy_task.py, with threads that touch memory beside it; or the process the pages come from.

    python -m tests.integration.remote_task WORKDIR BASE PAGES SEED STEPS THREADS [EARLY]
    python -m tests.integration.remote_task --source BASE PAGES
    python -m tests.integration.remote_task --give-up WORKDIR BASE PAGES ADDRESS...

EARLY is touched before the restore has finished, as CRIU's restorer may do. The last quarter of
the memory is the threads': each checks and writes pages of its own. All go by calls that let go of
the interpreter's lock: a thread that waits for a page stops none but itself.
"""

from __future__ import annotations

import ctypes
import os
import random
import struct
import sys
import threading
import time

from tests.integration import lazy_task as t
from tests.integration.lazy_task import PAGE, libc

libc.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
libc.memcpy.restype = ctypes.c_void_p


class Whole(t.Memory):
    """Looks at all of a page."""

    def check(self, address: int) -> None:
        got = ctypes.create_string_buffer(PAGE)
        libc.memcpy(got, address, PAGE)
        if got.raw != struct.pack("=Q", self.expected[address]) * 512:
            self.wrong += 1
            word = struct.unpack_from("=Q", got.raw)[0]
            print(f"{os.getpid()} {address:x}: {word}, not {self.expected[address]}", flush=True)

    def write(self, address: int, value: int) -> None:
        libc.memcpy(address, struct.pack("=Q", value) * 512, PAGE)
        self.expected[address] = value


def work(memory: Whole, addresses: list[int], rng: random.Random) -> None:
    order = addresses * 2
    rng.shuffle(order)
    for address in order:
        if rng.random() < 0.3:
            memory.write(address, rng.getrandbits(60) | 1)
        else:
            memory.check(address)
        time.sleep(rng.choice((0, 0, 0.001)))
    for address in addresses:
        memory.check(address)


def source(base: int, pages: int) -> None:
    assert libc.mmap(base, pages * PAGE, 3, 0x32, -1, 0) == base
    for page in range(pages):
        libc.memcpy(base + page * PAGE, struct.pack("=Q", page + 1) * 512, PAGE)
    print("runs", flush=True)
    time.sleep(600)


def give_up(workdir: str, base: int, pages: int, addresses: list[int]) -> None:
    """While threads wait for pages of the second half, give it up; then unmap all."""
    size = pages * PAGE
    assert libc.mmap(base, size, 3, 0x32, -1, 0) == base
    criu = t.hand_over(workdir, t.register(base, size))
    criu.send(struct.pack("=i", t.FINISHED))
    criu.close()
    got: list[bytes] = []

    def read(address: int) -> None:
        page = ctypes.create_string_buffer(PAGE)
        libc.memcpy(page, address, PAGE)
        got.append(page.raw)

    threads = [threading.Thread(target=read, args=(at,), daemon=True) for at in addresses]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    assert not got
    assert not libc.madvise(base + size // 2, size // 2, 4)
    for thread in threads:
        thread.join(20)
    assert got == [bytes(PAGE)] * len(addresses)
    assert not libc.munmap(base, size)


def main() -> None:
    if sys.argv[1] == "--give-up":
        give_up(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), [*map(int, sys.argv[5:])])
        return
    if sys.argv[1] == "--source":
        source(int(sys.argv[2]), int(sys.argv[3]))
        return
    workdir, base, pages, seed, steps, threads = sys.argv[1], *map(int, sys.argv[2:7])
    assert libc.mmap(base, pages * PAGE, 3, 0x32, -1, 0) == base
    libc.mprotect(ctypes.c_void_p(base), ctypes.c_size_t((pages // 3) * PAGE), 7)
    memory = Whole(base, pages)
    criu = t.hand_over(workdir, t.register(base, pages * PAGE))
    for address in map(int, sys.argv[7:]):
        memory.check(address)
    try:
        criu.send(struct.pack("=i", t.FINISHED))
    except OSError:
        sys.exit(2)
    criu.close()
    print("runs", flush=True)
    rng = random.Random(seed)
    behind = sorted(memory.expected)[pages * 3 // 4 :]
    parts = []
    for number in range(threads):
        part = Whole(0, 0)
        part.expected = {
            address: memory.expected.pop(address) for address in behind[number::threads]
        }
        parts.append(part)
    started = [
        threading.Thread(
            target=work, args=(part, sorted(part.expected), random.Random(rng.random()))
        )
        for part in parts
    ]
    for thread in started:
        thread.start()
    children = t.act(memory, rng, steps, 0)
    memory.check_all()
    for thread in started:
        thread.join()
    wrong = memory.wrong + sum(part.wrong for part in parts)
    sys.exit(1 if wrong or t.bad(children) else 0)


if __name__ == "__main__":
    main()
