"""The one door through which every subprocess goes: argument lists, deadlines, no shell."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import selectors
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import IO

from phaul_runtime.errors import PhaulError, Refused

log = logging.getLogger(__name__)

Process = subprocess.Popen[bytes]
Expired = subprocess.TimeoutExpired
DEVNULL, PIPE = subprocess.DEVNULL, subprocess.PIPE

_KILLED_S = 2.0
_CANNOT_START = {
    errno.ENOENT: "install {0} or put it on PATH",
    errno.ENOTDIR: "install {0} or put it on PATH",
    errno.EACCES: "let it be executed: chmod +x {0}, on a file system without noexec",
    errno.ENOEXEC: "{0} is no program for this machine, nor a script that names its interpreter",
}


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
    log.debug("running %s", shlex.join(map(str, argv)))
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
        hint = _CANNOT_START.get(error.errno or 0, "").format(argv[0])
        raise Refused(f"cannot start {argv[0]}: {error.strerror}", hint=hint) from error


def run(
    argv: Sequence[str],
    *,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    input: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `argv` to its end and return what it printed; its exit code is for the caller to judge.

    It runs in a session of its own. One that does not end in time is killed together with whatever
    it started and has not left its process group: a shell's children too.

    Args:
        argv: the program and its arguments.
        timeout_s: until it has ended and nobody holds its stdout and stderr any more.
        env: the whole environment; None hands on this process's.
        input: what it gets on stdin, which it may leave unread; None for an empty stdin.

    Raises:
        Refused: the program cannot be started.
        PhaulError: it did not end within `timeout_s` seconds; `log` has its last words.
    """
    process = spawn(
        argv, stdin=DEVNULL if input is None else PIPE, stdout=PIPE, stderr=PIPE, env=env
    )
    try:
        out, err = process.communicate(None if input is None else input.encode(), timeout_s)
    except Expired as error:
        said = (error.stderr or error.stdout or b"").decode(errors="replace")
        raise PhaulError(
            f"{argv[0]} did not end within {timeout_s:g} s", log=last_lines(said)
        ) from error
    finally:
        if process.returncode is None:
            _kill_group(process)
    return subprocess.CompletedProcess(
        list(argv), process.returncode, out.decode(errors="replace"), err.decode(errors="replace")
    )


def last_lines(said: str, count: int = 4) -> list[str]:
    """The last lines of what a program printed, for an error's `log`."""
    return said.strip().splitlines()[-count:]


def _kill_group(process: Process) -> None:
    """Kill a process started by `spawn` and its group, and close its pipes."""
    # Not waited for yet: until then nobody else can have its number.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    # One that hangs in the kernel ends when it can.
    with contextlib.suppress(Expired):
        process.wait(_KILLED_S)


def collect(
    process: Process, *, timeout_s: float | None = None, limit: int = 64 << 10
) -> tuple[bytes, bytes]:
    """Wait until a process and whoever has its pipes are gone; the starts of what they printed.

    Args:
        process: started by `spawn`; pipes of its stdout and stderr are read, others ignored.
        timeout_s: None waits as long as it takes: then something else has to end it.
        limit: bytes that are kept of each; what follows is read and dropped.

    Raises:
        PhaulError: it did not end in time; ending it is the caller's.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s

    def left() -> float | None:
        if deadline is None:
            return None
        if time.monotonic() >= deadline:
            raise PhaulError(f"it did not end within {timeout_s:g} s")
        return deadline - time.monotonic()

    said = (bytearray(), bytearray())
    with selectors.DefaultSelector() as selector:
        for pipe, kept in zip((process.stdout, process.stderr), said, strict=True):
            if pipe is not None:
                selector.register(pipe, selectors.EVENT_READ, kept)
        while selector.get_map():
            for key, _ in selector.select(left()):
                data = os.read(key.fd, 1 << 16)
                if not data:
                    selector.unregister(key.fileobj)
                key.data.extend(data[: max(0, limit - len(key.data))])
    try:
        process.wait(left())
    except subprocess.TimeoutExpired as error:
        raise PhaulError(f"it did not end within {timeout_s:g} s") from error
    return bytes(said[0]), bytes(said[1])


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
