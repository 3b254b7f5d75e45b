"""The gate: how a CRIU that somebody else starts (runc, crun) asks before it takes a decisive step.

The engine's own CRIU is reached by its action script, and that by CRIU's configuration. Of the ways
into it, this project takes the environment: `CRIU_CONFIG_FILE` names a file of this migration
alone, and runc and crun hand their environment on to CRIU. Seen working with runc 1.1 and crun 1.21
over CRIU 4.1. Nothing is installed on the host, two migrations at once do not meet, and a script is
called once for an event. Where a daemon starts the runtime (docker, at the destination), that is
out of reach, and the container gets the annotation `org.criu.config` when it is created. (The third
way, /etc/criu/runc.conf, is every container's. Both are read after the environment's, by RPC, and
apply beside it. There the file is parsed twice, and so each event calls the script twice: the gate
gives the same answer again.)

The script (criu-gate.sh) is POSIX sh, starts no interpreter beside it, and fails closed. CRIU
executes it by its path, without arguments: a link to it lies in the gate's directory, and that is
how it finds its gate. (A link, since /run is often mounted noexec, which counts for the script.)
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phaul_runtime.errors import MigrationFailed
from phaul_runtime.system.poll import readable

SCRIPT = Path(__file__).with_name("criu-gate.sh")
EVENTS = "events"
VERDICT = "verdict"
SECONDS = "seconds"
ASK = "ask"
EARLY = "early"
CONFIG = "criu.conf"


@dataclass(frozen=True)
class GateEvent:
    """What CRIU is about to do: `action` as its manual names it, `pid` of the tree's root or 0."""

    action: str
    pid: int


class Gate:
    """The FIFOs, the script and the configuration file of one request to CRIU.

    Args:
        directory: to be created, mode 0700.
        deadline_s: how long the script waits for a verdict before it takes it for a no.
        options: further lines of CRIU's configuration file, without dashes.
        early: be asked before a restore, too (`pre-restore`).
    """

    def __init__(
        self,
        directory: Path,
        *,
        deadline_s: float,
        options: Sequence[str] = (),
        early: bool = False,
    ) -> None:
        self.directory = directory
        self._lines = [f"action-script {directory / ASK}", *options]
        self._seconds = max(1, round(deadline_s))
        self._events = self._verdict = -1
        self._unread = b""
        self._early = early
        self._asked: set[str] = set()
        self._verdicts: dict[str, bool] = {}

    def open(self) -> None:
        """Make everything.

        Raises:
            MigrationFailed: the directory cannot be made, or the script cannot be executed.
        """
        if not os.access(SCRIPT, os.X_OK):
            raise MigrationFailed(
                f"{SCRIPT} cannot be executed", hint="install phaul-runtime from its wheel by pip"
            )
        try:
            self.directory.mkdir(mode=0o700)
            (self.directory / CONFIG).write_text("\n".join(self._lines) + "\n", encoding="utf-8")
            (self.directory / SECONDS).write_text(f"{self._seconds}\n", encoding="ascii")
            (self.directory / ASK).symlink_to(SCRIPT)
            if self._early:
                (self.directory / EARLY).touch()
            for name in (EVENTS, VERDICT):
                os.mkfifo(self.directory / name, 0o600)
            # Neither may be inherited: the script learns of our death by the last writer's end.
            flags = os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC
            self._events = os.open(self.directory / EVENTS, flags)
            self._verdict = os.open(self.directory / VERDICT, flags)
        except OSError as error:
            self.close()
            raise MigrationFailed(f"cannot make {self.directory}: {error.strerror}") from error

    @property
    def environment(self) -> dict[str, str]:
        """For the command whose CRIU is to ask."""
        return {"CRIU_CONFIG_FILE": str(self.directory / CONFIG)}

    def next(self, deadline: float, command: int) -> GateEvent | None:
        """The next event; None once the command has ended and nothing was asked, or at `deadline`.

        Args:
            deadline: a `time.monotonic()`.
            command: a pidfd of the command whose CRIU asks.
        """
        over: list[int] = []
        while True:
            if event := self._read():
                if event.action not in self._asked:
                    self._asked.add(event.action)
                    return event
                if event.action in self._verdicts:
                    self.answer(event, yes=self._verdicts[event.action])
                continue
            left = deadline - time.monotonic()
            if over or left <= 0:
                return None
            ready = readable(self._events, command, within_s=left)
            over = [fd for fd in ready if fd == command]

    def _read(self) -> GateEvent | None:
        with contextlib.suppress(BlockingIOError):
            self._unread += os.read(self._events, 4096)
        line, newline, rest = self._unread.partition(b"\n")
        if not newline:
            return None
        self._unread = rest
        action, _, pid = line.decode("ascii", "replace").partition(" ")
        return GateEvent(action, int(pid) if pid.isdigit() else 0)

    def answer(self, event: GateEvent, *, yes: bool) -> None:
        """Let CRIU go on, or not; should it ask once more, it gets the same answer."""
        self._verdicts[event.action] = yes
        with contextlib.suppress(OSError):
            os.write(self._verdict, f"{'yes' if yes else 'no'} {event.action}\n".encode())

    def close(self) -> None:
        """From now on every answer is a no; idempotent. The directory stays."""
        for fd in (self._events, self._verdict):
            if fd >= 0:
                os.close(fd)
        self._events = self._verdict = -1
