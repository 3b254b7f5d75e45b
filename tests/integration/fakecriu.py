"""A program that speaks `criu swrk` and moves bytes that nobody has ever dumped.

For whole moves of the fake engine through agent and transport, without CRIU, root or kernel
features: `python fakecriu.py swrk FD`. A round sends PAGES pages to `ps.fd` as CRIU does and waits
until they are acknowledged; what was sent is noted in $FAKECRIU_NOTES.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import socket
import struct
import sys
import types
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Two modules of pycriu, and not the seventy that it imports for all kinds of images: this is
    # started for each request.
    found = importlib.util.find_spec("pycriu")
    (top,) = (found and found.submodule_search_locations) or ("",)
    for name, path in (("pycriu", top), ("pycriu.images", f"{top}/images")):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [path]

from pycriu import rpc_pb2 as rpc
from pycriu.images import stats_pb2

PAGES = 512
# The page-server protocols of CRIU 4.1 and 4.2: command and flags, pages, address, where to.
_HEADERS = {1: struct.Struct("<IIQQ"), 2: struct.Struct("<I4xQQQ")}
_OPEN, _ADD, _CLOSE = 4, 6 | 4 << 16, 0x1024
_TARGET = 1 << 8 | 1
_RUN = 16


def minor() -> int:
    """It is CRIU 4.1, unless $FAKECRIU_MINOR says another."""
    return int(os.environ.get("FAKECRIU_MINOR", "1"))


def content(number: int) -> bytes:
    """A page as it is seen on the wire: text that occurs nowhere else."""
    return hashlib.sha256(f"page {number}".encode()).hexdigest().encode() * 64


def round_of(number: int) -> bytes:
    """What a round sends; each another part of the pages."""
    return b"".join(content(page) for page in range(number * PAGES, (number + 1) * PAGES))


def exactly(channel: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = channel.recv(size - len(data))
        if not part:
            raise EOFError("the memory channel ended")
        data += part
    return bytes(data)


def send_round(channel: socket.socket, data: bytes) -> None:
    """What a dump does with `ps.fd`."""
    header = _HEADERS[minor()]
    channel.sendall(header.pack(_OPEN, 0, 0, _TARGET))
    exactly(channel, 1)
    for at in range(0, len(data), _RUN << 12):
        run = data[at : at + (_RUN << 12)]
        channel.sendall(header.pack(_ADD, len(run) >> 12, at, _TARGET) + run)
    channel.sendall(header.pack(_CLOSE, 0, 0, 0))
    if exactly(channel, 4) != bytes(4):
        raise ValueError("the page server did not acknowledge")
    note("sent", data)


def note(what: str, data: bytes) -> None:
    digest = hashlib.sha256(data).hexdigest()
    with Path(os.environ["FAKECRIU_NOTES"]).open("a") as notes:
        notes.write(f"{what} {len(data)} {digest}\n")


def images(opts: Any) -> Path:
    return Path(f"/proc/{os.getppid()}/fd/{opts.images_dir_fd}").resolve()


def pre_dump(opts: Any) -> None:
    directory = images(opts)
    number = int(directory.name) if directory.name.isdigit() else 0
    channel = socket.socket(fileno=os.dup(opts.ps.fd))
    send_round(channel, round_of(number))
    stats = stats_pb2.stats_entry()
    stats.dump.freezing_time = stats.dump.frozen_time = 1000
    stats.dump.memdump_time = stats.dump.memwrite_time = 1000
    stats.dump.pages_scanned = stats.dump.pages_written = PAGES
    stats.dump.pages_skipped_parent = stats.dump.pages_lazy = 0
    body = stats.SerializeToString()
    head = struct.pack("<III", 0x55105940, 0x57093306, len(body))
    (directory / "stats-dump").write_bytes(head + body)


def answer(request: Any) -> Any:
    response = rpc.criu_resp(type=request.type, success=True)
    if request.type == rpc.VERSION:
        response.version.major_number, response.version.minor_number = 4, minor()
    elif request.type == rpc.FEATURE_CHECK:
        response.features.mem_track = True
        response.features.lazy_pages = False
    elif request.type == rpc.CPUINFO_DUMP:
        (images(request.opts) / "cpuinfo.img").write_bytes(b"cpu")
    elif request.type == rpc.SINGLE_PRE_DUMP:
        pre_dump(request.opts)
    elif request.type == rpc.PAGE_SERVER_CHLD:
        # Its images directory is the client's, whose child it is not.
        directory = images(request.opts)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
                os.chdir(fd)
                serve(request.opts)
                code = 0
            finally:
                os._exit(code)
        response.type = rpc.PAGE_SERVER
        response.ps.pid, response.ps.port = pid, 0
    elif request.type == rpc.WAIT_PID:
        response.status = os.waitpid(request.pid, 0)[1]
    return response


def serve(opts: Any) -> None:
    """A page server, in its images directory."""
    channel = socket.socket(fileno=os.dup(opts.ps.fd))
    header = _HEADERS[minor()]
    with Path("pages-1.img").open("wb") as pages:
        while True:
            command, count, _, _ = header.unpack(exactly(channel, header.size))
            if command == _OPEN:
                channel.sendall(b"\0")
            elif command == _ADD:
                pages.write(exactly(channel, count << 12))
            else:
                break
    Path("page-server-was-here").touch()
    channel.sendall(bytes(4))


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[2]))
    while data := channel.recv(1 << 20):
        request = rpc.criu_req.FromString(data)
        channel.send(answer(request).SerializeToString())
        if not request.keep_open:
            break


if __name__ == "__main__":
    main()
