"""A final dump fails in its last moment, the tree runs on for a while, and the move is tried again.

    retry.py PID DIRECTORY [same-parent]      prints the new outside pid

A failed final dump has reset the kernel's dirty tracking: what was dirtied before it is in no
image. `same-parent` does what must not be done, and loses those pages.
"""

from __future__ import annotations

import shutil
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from phaul_runtime import Criu, PhaulClient, PhaulConfig, PhaulServer
from phaul_runtime.errors import DestinationError, PhaulError
from phaul_runtime.library.policy import AncestorPolicy

if TYPE_CHECKING:
    from tests.e2e.programs import library_use
else:
    import library_use  # it lies beside this program


class Reluctant(library_use.Local):
    """Its first restore is refused."""

    attempts = 0

    def post_dump(self) -> None:
        """See CriuNotify."""
        if self.attempts == 1:
            raise DestinationError("no room")
        super().post_dump()

    def dump_copy_restore(
        self, criu: Criu, config: PhaulConfig, last_client_images_dir: str | None
    ) -> None:
        """See PhaulLocal."""
        self.attempts += 1
        if self.attempts == 2:
            Path(config.wdir, "last").rename(Path(config.wdir, "failed"))
        else:
            time.sleep(1)  # what is dirtied here, only the failed dump knows of
        super().dump_copy_restore(criu, config, last_client_images_dir)


class Remote(library_use.Remote):
    """Can begin anew."""

    same_parent = False

    def end_chain(self) -> None:
        """See PhaulRemote."""
        self.server.end_chain()
        if self.same_parent:
            shutil.rmtree(self.server.last_images_dir or "")
            self.server._dirs.count -= 1
            self.server._dirs.orphans = frozenset()


def main(pid: int, directory: Path, *, same_parent: bool) -> int:
    """Move `pid` at the second attempt; returns its new outside pid."""
    ours, theirs = socket.socketpair()
    for name in ("client", "server"):
        (directory / name).mkdir(parents=True)
    server = PhaulServer(PhaulConfig(pid, theirs.fileno(), str(directory / "server")))
    local, remote = Reluctant(server), Remote(server)
    client = PhaulClient(
        local,
        remote,
        PhaulConfig(pid, ours.fileno(), str(directory / "client")),
        policy=AncestorPolicy(),
    )
    try:
        client.migrate()
    except PhaulError as error:
        sys.stderr.write(f"first: {error}\n")
    if same_parent:
        # As if the failed dump had never been.
        remote.same_parent = True
        client._dirs.end_chain = lambda: None  # type: ignore[method-assign]
    report = client.migrate()
    sys.stderr.write(f"second: {[round.pages_skipped for round in report.iterations]}\n")
    return local.pid


if __name__ == "__main__":
    new = main(int(sys.argv[1]), Path(sys.argv[2]), same_parent="same-parent" in sys.argv[3:])
    sys.stdout.write(f"{new}\n")
