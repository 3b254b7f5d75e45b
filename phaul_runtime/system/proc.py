"""The one door through which every subprocess goes: argument lists, deadlines, no shell."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import IO

from phaul_runtime.errors import PhaulError, Refused

log = logging.getLogger(__name__)

Process = subprocess.Popen[bytes]
Expired = subprocess.TimeoutExpired
DEVNULL, PIPE = subprocess.DEVNULL, subprocess.PIPE

_KILLED_S = 2.0
# Where the environment names none.
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# By variables that begin so, files that are not an interpreter's own become its code.
_INTERPRETERS = ("PYTHON", "PERL5", "RUBY", "NODE_", "BASH_ENV", "BASH_FUNC_", "SHELLOPTS")
# The same for any program: in root's own environment they are root's wish.
_LOADERS = ("LD_", "GCONV_", "GLIBC_", "LOCPATH", "NLSPATH", "OPENSSL_", "CRIU_", "RSYNC_")
# sudo, doas and pkexec say who has become root.
_BEFORE = ("SUDO_UID", "DOAS_USER", "PKEXEC_UID")
_CANNOT_START = {
    errno.ENOENT: "install {0} or put it on PATH",
    errno.ENOTDIR: "install {0} or put it on PATH",
    errno.EACCES: "let it be executed: chmod +x {0}, on a file system without noexec",
    errno.ENOEXEC: "{0} is no program for this machine, nor a script that names its interpreter",
}


def interpreter(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of ours in an interpreter of its own.

    Isolated (`-I`): neither the working directory, which may be anybody's, nor PYTHON* nor a
    user's own packages are where it looks for modules.
    """
    return [sys.executable, "-I", "-m", module, *arguments]


def environment(
    more: Mapping[str, str] | None = None, own: Mapping[str, str] | None = None
) -> dict[str, str]:
    """What a program that we start gets: this process's environment, and `more`.

    Left out is what makes other files into a program's code: PYTHON* and its like, what is not
    absolute in PATH; and LD_* and its like where this is root by sudo, doas or pkexec.

    Args:
        more: further variables, taken as they are.
        own: this process's environment, if it is not to be all of it.
    """
    own = os.environ if own is None else own
    others = os.geteuid() == 0 and any(own.get(name) not in (None, "0", "root") for name in _BEFORE)
    dangerous = (*_INTERPRETERS, *(_LOADERS if others else ()))
    kept = {name: value for name, value in own.items() if not name.startswith(dangerous)}
    path = own.get("PATH", _PATH).split(os.pathsep)
    kept["PATH"] = os.pathsep.join(part for part in path if part.startswith("/")) or _PATH
    return {**kept, **(more or {})}


def find(program: str) -> str | None:
    """Where `spawn` finds a program; None for nowhere."""
    return shutil.which(program, path=environment()["PATH"])


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

    Args:
        argv: the program, found in the environment's PATH, and its arguments.
        stdin: where it reads from; with `stdout` and `stderr` as `subprocess.Popen` takes them.
        stdout: where it writes to.
        stderr: where it complains.
        pass_fds: descriptors that it gets under their numbers.
        cwd: its working directory; None for ours.
        env: the whole environment, made by `environment`; None for just that.

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
            env=environment() if env is None else env,
        )
    except ValueError as error:
        # A NUL, or what is no text: in an argument or a variable.
        raise Refused(f"cannot start {argv[0]}: {error}") from error
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
        env: the whole environment, made by `environment`; None for just that.
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
    """Wait until a process and all holders of its pipes are gone; the starts of what they printed.

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
