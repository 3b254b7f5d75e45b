"""Files of a host that are never half written, whatever interrupts it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from phaul_runtime.cutover.journal import sync_directory


def write_whole(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Put `data` into `path`, on the disk on return; a reader sees the old or the new.

    Args:
        path: no link; its directory exists.
        data: all of the new contents.
        mode: of a new file; one that is there keeps its mode and owner.

    Raises:
        OSError: it could not; the file is as it was.
    """
    new = path.with_name(f".{path.name}.phaul-new")
    # One that a killed predecessor left may have the wrong mode or be anything.
    new.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(new, flags, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            try:
                was = path.stat()
            except FileNotFoundError:
                os.fchmod(fd, mode)
            else:
                os.fchown(fd, was.st_uid, was.st_gid)
                os.fchmod(fd, was.st_mode & 0o7777)
            file.write(data)
            file.flush()
            os.fsync(fd)
        new.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise
    sync_directory(path.parent)
