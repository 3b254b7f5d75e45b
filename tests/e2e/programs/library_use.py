"""The ancestor's own demonstration (go-criu, test/phaul/main.go), ported line by line.

Client and server in one process, a socketpair for memory, a PhaulLocal of its own: piggie, in a
pid namespace of its own, moves within one host and runs on with another outside pid.

    library_use.py PIGGIE_PID DIRECTORY       prints the new outside pid
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
from pathlib import Path

from phaul_runtime import (
    Criu,
    CriuNotify,
    PhaulClient,
    PhaulConfig,
    PhaulLocal,
    PhaulRemote,
    PhaulServer,
)
from phaul_runtime.criu.session import criu_opts


class Local(PhaulLocal, CriuNotify):
    """Dumps for the last time; in post-dump carries the images over and restores."""

    def __init__(self, server: PhaulServer) -> None:
        self.server = server
        self.images = ""
        self.pid = 0

    def post_dump(self) -> None:
        """The tree is frozen, its memory has gone to the server: bring it up from there."""
        target = self.server.last_images_dir
        assert target is not None
        for image in Path(self.images).glob("*.img"):
            shutil.copy(image, target)
        directory = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
        opts = criu_opts(images_dir_fd=directory, log_level=4, log_file="restore.log")
        self.pid = self.server.criu.restore(opts)
        os.close(directory)

    def dump_copy_restore(
        self, criu: Criu, config: PhaulConfig, last_client_images_dir: str | None
    ) -> None:
        """The final dump: its parent is the last pre-dump, its pages go to the server."""
        self.images = str(Path(config.wdir) / "last")
        Path(self.images).mkdir()
        directory = os.open(self.images, os.O_RDONLY | os.O_DIRECTORY)
        opts = criu_opts(
            pid=config.pid,
            images_dir_fd=directory,
            log_level=4,
            log_file="dump.log",
            track_mem=True,
            parent_img=last_client_images_dir
            and os.path.relpath(last_client_images_dir, self.images),
        )
        opts.ps.fd = config.memfd
        criu.dump(opts, self)
        os.close(directory)


class Remote(PhaulRemote):
    """The RPC of a program of one process: plain calls."""

    def __init__(self, server: PhaulServer) -> None:
        self.server = server

    def start_iter(self) -> None:
        """See PhaulRemote."""
        self.server.start_iter()

    def stop_iter(self) -> None:
        """See PhaulRemote."""
        self.server.stop_iter()


def main(pid: int, directory: Path) -> int:
    """Move `pid`; returns its new outside pid."""
    ours, theirs = socket.socketpair()
    for name in ("client", "server"):
        (directory / name).mkdir(parents=True)
    server = PhaulServer(PhaulConfig(pid, theirs.fileno(), str(directory / "server")))
    local = Local(server)
    client = PhaulClient(
        local, Remote(server), PhaulConfig(pid, ours.fileno(), str(directory / "client"))
    )
    report = client.migrate()
    sys.stderr.write(f"{len(report.iterations)} rounds, {report.bytes_transferred} bytes\n")
    return local.pid


if __name__ == "__main__":
    sys.stdout.write(f"{main(int(sys.argv[1]), Path(sys.argv[2]))}\n")
