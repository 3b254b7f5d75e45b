"""The one door through which every subprocess goes: argument lists, deadlines, no shell."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Mapping, Sequence
from typing import IO

from phaul_runtime.errors import PhaulError, Refused

Process = subprocess.Popen[bytes]
Expired = subprocess.TimeoutExpired
DEVNULL, PIPE = subprocess.DEVNULL, subprocess.PIPE


def spawn(
    argv: Sequence[str],
    *,
    stdin: int | IO[bytes] | None = subprocess.DEVNULL,
    stdout: int | IO[bytes] | None = subprocess.DEVNULL,
    stderr: int | IO[bytes] | None = subprocess.DEVNULL,
    pass_fds: Sequence[int] = (),
    cwd: str | None = None,
    env: Mapping[str, str] | None = None,
) -> Process:
    """Start `argv` in a session of its own, so that a Ctrl-C at the terminal does not reach it.

    Raises:
        Refused: the program cannot be started (not installed, not executable).
    """
    try:
        return subprocess.Popen(
            list(argv),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            pass_fds=tuple(pass_fds),
            start_new_session=True,
            cwd=cwd,
            env=env,
        )
    except OSError as error:
        raise Refused(
            f"cannot start {argv[0]}: {error.strerror}", hint=f"install {argv[0]} or put it on PATH"
        ) from error


def run(
    argv: Sequence[str], *, timeout_s: float, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `argv` to its end and return what it printed; its exit code is for the caller to judge.

    Raises:
        Refused: the program cannot be started.
        PhaulError: it did not end within `timeout_s` seconds; it was killed.
    """
    try:
        return subprocess.run(
            list(argv),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            env=env,
        )
    except subprocess.TimeoutExpired as error:
        raise PhaulError(f"{argv[0]} did not end within {timeout_s:g} s") from error
    except OSError as error:
        raise Refused(
            f"cannot start {argv[0]}: {error.strerror}", hint=f"install {argv[0]} or put it on PATH"
        ) from error


def end(process: Process, *, grace_s: float = 2.0) -> int:
    """End a process started by `spawn` (SIGTERM, then SIGKILL); idempotent; its exit code."""
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    if process.poll() is None:
        process.terminate()
        try:
            return process.wait(grace_s)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait(grace_s)
