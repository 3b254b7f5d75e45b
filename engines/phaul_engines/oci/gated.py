"""A container runtime's checkpoint or restore, whose CRIU asks at the gate."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from phaul_hooks.gate import Gate, GateEvent

from phaul_runtime.criu.hints import advice
from phaul_runtime.criu.session import LOG_LINES, LOG_TAIL, error_lines
from phaul_runtime.errors import CriuError
from phaul_runtime.system import proc

OUTPUT = "runtime.out"
_END_S = 30.0


class GatedCommand:
    """One run of a runtime, from its start to its end.

    Args:
        argv: the command.
        gate: opened by `start`, closed by `close`.
        name: of the runtime, for messages.
        request: what CRIU is asked to do, for messages: `DUMP` or `RESTORE`.
        log: CRIU's own log.
        pass_fds: descriptors that CRIU is to inherit through the runtime.
        quiet: its output is /dev/null, since what it restores may inherit that; then it has to be
            told to log to OUTPUT in the gate's directory.
        before_exec: called with the command's pid; the command waits for a line on its standard
            input, which it gets after that. Without it, that is /dev/null.
    """

    def __init__(
        self,
        argv: Sequence[str],
        gate: Gate,
        *,
        name: str,
        request: str,
        log: Path,
        pass_fds: Sequence[int] = (),
        quiet: bool = False,
        before_exec: Callable[[int], object] | None = None,
    ) -> None:
        self._name = name
        self._before_exec = before_exec
        self._quiet = quiet
        self._argv = list(argv)
        self.gate = gate
        self._request = request
        self._log = log
        self._pass_fds = tuple(pass_fds)
        self._process: proc.Process | None = None
        self._pidfd = -1

    def start(self) -> None:
        """Open the gate and start the command.

        Raises:
            Refused: it cannot be started.
        """
        self.gate.open()
        env = proc.environment(self.gate.environment)
        with Path(os.devnull if self._quiet else self.gate.directory / OUTPUT).open("wb") as output:
            self._process = proc.spawn(
                self._argv,
                stdin=proc.PIPE if self._before_exec else proc.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=self._pass_fds,
                env=env,
            )
        self._pidfd = os.pidfd_open(self._process.pid)
        if self._before_exec and self._process.stdin:
            self._before_exec(self._process.pid)
            with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
                stdin.write(b"\n")

    def next(self, deadline: float) -> GateEvent | None:
        """The next event; None when the command has ended, or at `deadline`."""
        return self.gate.next(deadline, self._pidfd)

    def wait(self, timeout_s: float) -> int | None:
        """Its exit code; None if it has not ended within `timeout_s` seconds."""
        if self._process is None:
            return None
        with contextlib.suppress(proc.Expired):
            return self._process.wait(timeout_s)
        return None

    def failure(self) -> CriuError:
        """Why it failed: CRIU's first error lines, and the runtime's own where there are none."""
        said = _tail(self.gate.directory / OUTPUT).splitlines()
        code = self.wait(0)
        if not said and code:
            # One that did not come as far as its log: its loader says why, by hand.
            said = [f"{self._argv[0]} ended with code {code} and said nothing"]
        return failure(self._name, self._request, self._log, said)

    def close(self) -> None:
        """Answer no to whatever is still asked, and wait for the end; idempotent."""
        self.gate.close()
        if self._process is not None:
            # CRIU takes the no for an answer and undoes: give it the time.
            if self.wait(_END_S) is None:
                proc.end(self._process)
            self._process = None
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def failure(name: str, request: str, log: Path, said: Sequence[str]) -> CriuError:
    """Why a runtime's dump or restore failed: CRIU's first error lines, and what `name` said."""
    text = _tail(log)
    lines = error_lines(text)
    said = [line for line in said if line.strip()]
    return CriuError(
        f"{name}'s {request.lower()} failed",
        request=request,
        hint=advice([*lines, *said]),
        log=[*lines, *said[-2:]][: LOG_LINES + 2],
        log_text=text,
    )


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_TAIL))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def deadline_in(seconds: float) -> float:
    """A `time.monotonic()` so far from now."""
    return time.monotonic() + seconds
