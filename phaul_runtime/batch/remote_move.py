"""One attempt: `phaul-runtime migrate --id` at its source, directly or by ssh."""

from __future__ import annotations

import contextlib
import os
import selectors
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from phaul_runtime.batch.model import Move
from phaul_runtime.batch.outcome import Answer, as_told
from phaul_runtime.boundedjson import read_json
from phaul_runtime.errors import ExitCode, Refused
from phaul_runtime.system import proc
from phaul_runtime.system.cancel import Cancellation
from phaul_runtime.transport.base import Destination
from phaul_runtime.transport.ssh import ssh_argv

if TYPE_CHECKING:
    from phaul_runtime.config.model import Config

Told = Callable[[dict[str, Any]], None]

# A report has a line for each round; more than this is none.
_LINE_LIMIT = 4 << 20
_SAID = 4 << 10
_POLL_S = 1.0
_CANCEL_S = 120.0
# One that is asked to end first lets the source run again.
_END_S = 20.0


def migrate_flags(move: Move) -> list[str]:
    """The arguments of `phaul-runtime migrate` for a move, without id and output."""
    flags = ["--engine", move.engine, "--to", move.to]
    for name, value in (
        ("--config", move.config),
        ("--files", move.files),
        ("--restore", move.restore),
        ("--mode", move.mode),
        ("--max-downtime-ms", move.max_downtime_ms),
        ("--max-iterations", move.max_iterations),
    ):
        if value is not None:
            flags += [name, str(value)]
    if move.tcp_established:
        flags.append("--tcp-established")
    for check in move.ignore:
        flags += ["--ignore", check]
    return [*flags, "--target", move.target]


class MoveRunner:
    """Runs moves at their sources.

    Args:
        config: its `transport` says how ssh is called, and phaul-runtime there.
        local_command: phaul-runtime on this host, for moves from `local:`.
    """

    def __init__(self, config: Config, local_command: list[str] | None = None) -> None:
        self._transport = config.transport
        self._local = local_command or proc.interpreter("phaul_runtime")

    def argv(self, move: Move, *flags: str) -> list[str]:
        """The command of a move, with further flags."""
        arguments = ["migrate", *migrate_flags(move), "--output", "json", *flags]
        source = Destination.parse(move.from_)
        if source.scheme == "local":
            return [*self._local, *arguments]
        return ssh_argv(source, self._transport, arguments)

    def ask(
        self, move: Move, migration_id: str, told: Told, cancel: Cancellation, timeout_s: float
    ) -> Answer:
        """Run an attempt, or learn its outcome; nothing moves twice, however often it is asked for.

        Args:
            move: what is to be moved.
            migration_id: the attempt's.
            told: called with each event of the move.
            cancel: passed on to the move; it may be too late for it there.
            timeout_s: then the command is ended, and its answer counts as lost.
        """
        return self._run(self.argv(move, "--id", migration_id, "--stdin"), told, cancel, timeout_s)

    def check(self, move: Move, told: Told, cancel: Cancellation, timeout_s: float) -> Answer:
        """The preflight of a move: nothing is moved."""
        return self._run(self.argv(move, "--dry-run"), told, cancel, timeout_s)

    def _run(self, argv: list[str], told: Told, cancel: Cancellation, timeout_s: float) -> Answer:
        if cancel.requested:
            return Answer(None, said="cancelled before it was asked")
        try:
            process = proc.spawn(argv, stdin=proc.PIPE, stdout=proc.PIPE, stderr=proc.PIPE)
        except Refused as error:
            return Answer(int(ExitCode.REFUSED), said=str(error))
        reading = _Reading(process, told)
        try:
            reading.read(cancel, time.monotonic() + timeout_s)
        finally:
            code = proc.end(process, grace_s=_END_S)
        said = reading.said.decode(errors="replace").strip()
        # ssh's own failure, or a signal: the move may go on, or have ended, or never begun.
        lost = code < 0 or code == 255 or not reading.whole
        return Answer(None if lost else code, reading.report, "\n".join(proc.last_lines(said)))


class _Reading:
    """What a command prints: events are told, the report is kept, so are stderr's last words."""

    def __init__(self, process: proc.Process, told: Told) -> None:
        self._process = process
        self._told = told
        self._line = bytearray()
        self.report: dict[str, Any] | None = None
        self.said = bytearray()
        self.whole = False

    def read(self, cancel: Cancellation, deadline: float) -> None:
        """Read until it has ended and nobody holds its pipes, or until the deadline."""
        asked_at: float | None = None
        with selectors.DefaultSelector() as selector:
            for pipe, take in (
                (self._process.stdout, self._out),
                (self._process.stderr, self._err),
            ):
                if pipe is not None:
                    selector.register(pipe, selectors.EVENT_READ, take)
            while selector.get_map():
                if time.monotonic() > deadline:
                    return
                if cancel.requested and asked_at is None:
                    asked_at = time.monotonic()
                    deadline = min(deadline, asked_at + _CANCEL_S)
                    self._cancel()
                for key, _ in selector.select(_POLL_S):
                    data = os.read(key.fd, 1 << 16)
                    if not data:
                        selector.unregister(key.fileobj)
                    key.data(data)
        with contextlib.suppress(proc.Expired):
            self._process.wait(max(0.1, deadline - time.monotonic()))
            self.whole = True

    def _cancel(self) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.write(b"cancel\n")
                self._process.stdin.flush()

    def _err(self, data: bytes) -> None:
        self.said += data
        del self.said[:-_SAID]

    def _out(self, data: bytes) -> None:
        *lines, rest = (bytes(self._line) + data).split(b"\n")
        self._line = bytearray(rest[-_LINE_LIMIT:])
        for line in lines:
            try:
                found = read_json(line)
            except ValueError:
                continue
            if not isinstance(found, dict):
                continue
            if "schema" in found:
                self.report = as_told(found)
            else:
                self._told(as_told(found))
