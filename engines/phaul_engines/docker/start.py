"""A container's start by docker, which lasts as long as its restore, and the shims that hold it."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

from phaul_engines.docker.daemon import Daemon
from phaul_runtime.errors import PhaulError
from phaul_runtime.system.procfs import PROC


class Start:
    """`docker start --checkpoint` on a thread of its own: it lasts until the gate lets it.

    Attributes:
        ended: a descriptor that is readable once it has.
        error: why it failed.
    """

    def __init__(self, daemon: Daemon, container: str, checkpoint: str, timeout_s: float) -> None:
        self.error: PhaulError | None = None
        self.ended, self._end = os.pipe()

        def run() -> None:
            try:
                daemon.start(container, checkpoint, timeout_s)
            except PhaulError as error:
                self.error = error
            finally:
                os.close(self._end)

        self._thread = threading.Thread(target=run, name="docker start", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended, within that time."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def __del__(self) -> None:
        os.close(self.ended)


def shims(container: str) -> list[int]:
    """The processes by which containerd holds on to a container.

    Once one is dead, containerd has the same program clean up (`delete`), which must not be ended.
    """
    found = []
    for entry in os.listdir(PROC):
        with contextlib.suppress(OSError):
            if entry.isdigit():
                text = (PROC / entry / "cmdline").read_text(errors="replace")
                program, *words = text.rstrip("\0").split("\0")
                shim = Path(program).name.startswith("containerd-shim")
                if shim and container in words and "delete" not in words:
                    found.append(int(entry))
    return found
