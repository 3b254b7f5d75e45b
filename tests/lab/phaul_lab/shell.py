"""Running commands: argument lists, deadlines, one clear line on failure; and file locks."""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class LabError(Exception):
    """The laboratory cannot do what it was asked to; the message is for people."""


def run(
    argv: Sequence[str | Path],
    *,
    timeout: float = 600,
    check: bool = True,
    stdin: bytes | None = None,
    log: Path | None = None,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run `argv` to its end; with `log`, what it prints goes there."""
    words = [str(word) for word in argv]
    try:
        done = subprocess.run(
            words,
            input=stdin,
            stdin=None if stdin is not None else subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            check=False,
            env={**os.environ, **env} if env else None,
        )
    except FileNotFoundError as error:
        raise LabError(f"{words[0]} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise LabError(f"{words[0]} did not end within {timeout:g} s") from error
    if log is not None:
        log.write_bytes(done.stdout + done.stderr)
    if check and done.returncode != 0:
        tail = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()[-4:]
        raise LabError(f"{' '.join(words[:4])} ended with {done.returncode}: {' | '.join(tail)}")
    return done


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path` while in here; its holder may remove it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                continue  # it was removed by the one before
            yield
            return
