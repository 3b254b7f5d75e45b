"""The same tree is dumped twice, its pages taken by our receiver and by CRIU's page server.

    two_receivers.py DIRECTORY         prints what both have; fails if it is not the same

A parent and two children with memory of their own, and some that they share. A round with their
own, a round with all of it once a third has changed, then a restore in full from what ours has
written.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from phaul_runtime import Criu, PhaulConfig, PhaulServer
from phaul_runtime.criu.session import criu_opts
from phaul_runtime.memory.image_dirs import image_files
from phaul_runtime.memory.pagemap import IN_PARENT, PRESENT, read_pagemap

PAGE = 4096
OWN, SHARED = 1500, 700
RECEIVERS = ("phaul", "criu")
TOUCHED = 4


def victim(directory: Path) -> None:
    """Change memory at SIGUSR1, say what it is at SIGUSR2; never returns."""
    shared = mmap.mmap(-1, SHARED * PAGE)
    children = [] if os.fork() == 0 else [0]
    if not children and os.fork() == 0:
        children = [0, 0]
    own = mmap.mmap(-1, OWN * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    number, turn = len(children), 0
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2})

    def change() -> None:
        for page in range(OWN):
            # All at first, then some here and there, and a stretch.
            if turn == 0 or page % 7 == number or 300 < page < 600:
                own[page * PAGE : page * PAGE + 8] = (page << 8 | number << 4 | turn).to_bytes(8)
        for page in range(number, SHARED, 3 if turn == 0 else 9):
            shared[page * PAGE : page * PAGE + 8] = (page << 8 | turn).to_bytes(8)

    def say(what: str) -> None:
        digest = hashlib.sha256(own[:] + shared[:]).hexdigest()
        new = directory / f"{what}.new"
        new.write_text(f"{os.getpid()} {digest}")
        new.rename(directory / what)

    while True:
        change()
        turn += 1
        say(f"changed-{number}-{turn}")
        while signal.sigwait({signal.SIGUSR1, signal.SIGUSR2}) == signal.SIGUSR2:
            say(f"said-{number}")


def wait_for(directory: Path, names: list[str]) -> dict[str, str]:
    deadline = time.monotonic() + 60
    while not all((directory / name).exists() for name in names):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{names} in {os.listdir(directory)}")
        time.sleep(0.05)
    return {name: (directory / name).read_text() for name in names}


class Chain:
    """One receiver's directories, and the source's side of them."""

    def __init__(self, directory: Path, page_server: Any) -> None:
        for name in ("client", "server"):
            (directory / name).mkdir(parents=True)
        self.client = directory / "client"
        self.ours, theirs = socket.socketpair()
        config = PhaulConfig(0, theirs.detach(), str(directory / "server"))
        self.server = PhaulServer(config, page_server=page_server)
        self.count = 0

    def round(self, pid: int, *, final: bool = False) -> Path:
        self.server.start_iter()
        self.count += 1
        images = self.client / str(self.count)
        images.mkdir()
        directory = os.open(images, os.O_RDONLY | os.O_DIRECTORY)
        parent = f"../{self.count - 1}" if self.count > 1 else None
        opts = criu_opts(
            pid=pid,
            images_dir_fd=directory,
            log_file="dump.log",
            log_level=4,
            parent_img=parent,
            track_mem=None if final else True,
            leave_running=True if final else None,
        )
        opts.ps.fd = self.ours.fileno()
        if final:
            Criu().dump(opts)
        else:
            Criu().pre_dump(opts)
        os.close(directory)
        self.server.stop_iter()
        return Path(self.server.last_images_dir or "")


Contents = dict[str, dict[int, tuple[int, bytes]]]


def contents(images: Path) -> Contents:
    """Of each page map its pages, one by one, each read along the chain."""
    found: Contents = {}
    before = contents(images / "parent") if (images / "parent").is_symlink() else {}
    for path in sorted(images.glob("pagemap-*.img")):
        pagemap = read_pagemap(path)
        pages = (images / f"pages-{pagemap.pages_id}.img").read_bytes()
        offset, each = 0, {}
        for vaddr, count, flags in pagemap.entries:
            for page in range(vaddr, vaddr + count * PAGE, PAGE):
                if flags & PRESENT:
                    each[page] = (flags, hashlib.sha256(pages[offset : offset + PAGE]).digest())
                    offset += PAGE
                else:
                    each[page] = (flags, before[path.name][page][1])
        assert offset == len(pages), f"{path}: {offset} of {len(pages)}"
        found[path.name] = each
    return found


def live(name: str, page: int) -> bytes:
    """What a process has there now."""
    with Path(f"/proc/{name.removeprefix('pagemap-').removesuffix('.img')}/mem").open(
        "rb"
    ) as memory:
        memory.seek(page)
        return hashlib.sha256(memory.read(PAGE)).digest()


def compared(ours: Path, theirs: Path) -> dict[str, int]:
    """Hold them against each other.

    A dump touches a page or two of the tree itself (it lets it call the kernel): those the next one
    has as they are then, which is what the tree has still. Ours was the last.
    """
    one, other = contents(ours), contents(theirs)
    assert one.keys() == other.keys(), (one.keys(), other.keys())
    for name in one:
        differ = [
            page
            for page in one[name].keys() & other[name].keys()
            if one[name][page][1] != other[name][page][1]
        ]
        told = f"{ours}/{name}: {list(map(hex, differ[:9]))}"
        assert len(differ) <= TOUCHED, told
        assert all(one[name][page][1] == live(name, page) for page in differ), told
        flags = [
            page
            for page in one[name].keys() | other[name].keys()
            if one[name].get(page, (0,))[0] != other[name].get(page, (0,))[0]
        ]
        assert len(flags) <= TOUCHED, f"{ours}/{name}: {list(map(hex, flags[:9]))}"
    links = [each.joinpath("parent").is_symlink() for each in (ours, theirs)]
    assert links[0] == links[1], links
    pages = [page for each in one.values() for page in each.values()]
    return {
        "maps": len(one),
        "shared": sum("shmem" in name for name in one),
        "present": sum(bool(flags & PRESENT) for flags, _ in pages),
        "in_parent": sum(bool(flags & IN_PARENT) for flags, _ in pages),
    }


def main(directory: Path) -> None:
    """See above."""
    said = directory / "said"
    said.mkdir()
    root = os.fork()
    if root == 0:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):
            os.dup2(null, fd)
        os.closerange(3, 100)
        victim(said)
    first = wait_for(said, [f"changed-{number}-1" for number in range(3)])
    pids = [int(text.split()[0]) for text in first.values()]
    assert root in pids
    chains = [Chain(directory / receiver, receiver) for receiver in RECEIVERS]
    rounds = [compared(*[chain.round(root) for chain in chains])]
    for pid in pids:
        os.kill(pid, signal.SIGUSR1)
    wait_for(said, [f"changed-{number}-2" for number in range(3)])
    for pid in pids:
        os.kill(pid, signal.SIGUSR2)
    before = wait_for(said, [f"said-{number}" for number in range(3)])
    ours, theirs = chains
    last = theirs.round(root, final=True)
    images = ours.round(root, final=True)
    rounds.append(compared(images, last))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    os.waitpid(root, 0)
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.05)
    for path in image_files(ours.client / "2"):
        shutil.copy(path, images)
    for path in said.iterdir():
        path.unlink()
    fd = os.open(images, os.O_RDONLY | os.O_DIRECTORY)
    restored = ours.server.criu.restore(
        criu_opts(images_dir_fd=fd, log_file="restore.log", log_level=4)
    )
    try:
        for pid in pids:
            os.kill(pid, signal.SIGUSR2)
        assert wait_for(said, list(before)) == before, "the restored tree has other memory"
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    assert restored == root
    for receiver in RECEIVERS:
        logs = list((directory / receiver / "server").glob("*/page-server.log"))
        assert len(logs) == (2 if receiver == "criu" else 0), logs
    sys.stdout.write(json.dumps(rounds) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
