"""Numbered image directories and their parent chain.

`wdir/1`, `wdir/2`, ...: one an iteration, on both sides. A directory's `parent` is given to CRIU
relative to it (`../1`), so that the chain can be moved as a whole.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from phaul_runtime.errors import MigrationFailed, PhaulError
from phaul_runtime.memory.pagemap import read_pagemap
from phaul_runtime.system import proc
from phaul_runtime.system.filemark import Mark, mark_of
from phaul_runtime.system.pathwalk import DIRECTORY, is_ours_alone, reopen, walk
from phaul_runtime.system.procfs import mounts

log = logging.getLogger(__name__)

RESUMED = "stats-restore"
"""CRIU writes this file once all tasks of a restore run (cr-restore.c, `write_stats`)."""
_UMOUNT_S = 30.0
# All that a destination may name.
_PAGE_MAP = re.compile(r"pagemap(-shmem)?-[0-9]{1,10}\.img")


class ImageDirs:
    """The numbered directories under `wdir`, mode 0700: they hold the process's memory."""

    def __init__(self, wdir: str | Path) -> None:
        self.wdir = Path(wdir)
        self.count = 0
        self.orphans: frozenset[int] = frozenset()

    def open_next(self) -> int:
        """Begin a directory; returns a descriptor of it, which the caller closes."""
        self.count += 1
        path = self.path(self.count)
        path.mkdir(mode=0o700)
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def path(self, number: int) -> Path:
        """The directory of iteration `number`, counted from 1."""
        return self.wdir / str(number)

    @property
    def last(self) -> Path | None:
        """The newest directory, or None before the first."""
        return self.path(self.count) if self.count else None

    @property
    def parent(self) -> str | None:
        """`parent_img` for the newest directory: its predecessor, relative to it."""
        if self.count in self.orphans or self.count < 2:
            return None
        return f"../{self.count - 1}"

    def end_chain(self) -> None:
        """The next directory has no parent: what changed since the newest is not known."""
        self.orphans |= {self.count + 1}


def new_directory(wdir: Path, name: str) -> Path:
    """Make `wdir/name`, mode 0700; a number is appended where an earlier attempt made that."""
    for number in itertools.count(1):
        path = wdir / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
            break
    return path


def relative_parent(images_dir: Path, parent: str | None) -> str | None:
    """`parent_img` of `images_dir` for a parent given by its path; None stays None."""
    return None if parent is None else os.path.relpath(parent, images_dir)


def image_files(images_dir: Path) -> list[Path]:
    """The images of a dump whose pages went to a page server: small, to be laid over there.

    Those of a container's runtime (descriptors.json) are among them, logs and statistics are not.
    """
    return sorted(
        path
        for path in images_dir.iterdir()
        if path.suffix in (".img", ".json") and path.is_file() and not path.is_symlink()
    )


def keep_page_maps(images_dir: Path | None, page_maps: Mapping[str, bytes]) -> None:
    """Make a pre-dump whose pages went to a page server the parent of a dump into files.

    CRIU looks up in the parent's page maps what it leaves out of such a dump, and opens the pages
    files, which it does not read (v4.1.1, criu/page-xfer.c: check_pagehole_in_parent).

    Raises:
        MigrationFailed: they cannot be written.
    """
    if images_dir is None:
        return
    try:
        # The maps tell of all pages: nothing is looked up further back.
        (images_dir / "parent").unlink(missing_ok=True)
        for name, data in page_maps.items():
            if not _PAGE_MAP.fullmatch(name):
                raise MigrationFailed(f"the destination names a page map {name[:80]!a}")
            path = images_dir / name
            path.write_bytes(data)
            (images_dir / f"pages-{read_pagemap(path).pages_id}.img").touch()
    except OSError as error:
        raise MigrationFailed(f"cannot write to {images_dir}: {error.strerror}") from error


def directory_bytes(path: Path) -> int:
    """Bytes in a directory's files, not below; 0 if it is gone."""
    try:
        return sum(entry.stat().st_size for entry in os.scandir(path) if entry.is_file())
    except OSError:
        return 0


def was_resumed(images_dir: Path) -> bool:
    """Whether a restore of these images came to its end: the copy was let run."""
    return (images_dir / RESUMED).exists()


def note_resumed(images_dir: Path) -> None:
    """The copy was let run, although CRIU did not live to say so; where the disk allows it."""
    with contextlib.suppress(OSError):
        (images_dir / RESUMED).touch(mode=0o600)


def forget_resumed(images_dir: Path) -> None:
    """Before a new restore of the same images."""
    (images_dir / RESUMED).unlink(missing_ok=True)


def remove_tree(path: Path, made: Mark | None = None) -> None:
    """Remove a directory of ours and what is in it; idempotent. No link is followed.

    Ours it is if it belongs to root, lies in a directory to which nobody else can write, or is the
    one that `made` tells of. What is not, is left, and logged.

    What is mounted in it is unmounted, never removed: a CRIU that was killed in a restore leaves
    the host's cgroups mounted in its images directory (`.criu.cgyard.*`).
    """
    try:
        with _opened(path) as (directory, above):
            if not (_is_ours(directory, above) or (made and mark_of(directory) == made)):
                log.warning("%s is left: it may be somebody else's", path)
            elif _unmount(_real_path(directory)):
                _empty(directory)
                os.rmdir(path.name, dir_fd=above)
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("%s is left: %s", path, error.strerror)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[int, int]]:
    """Descriptors of a directory that is no link, and of the one above it.

    Raises:
        OSError: it is none, or cannot be reached; FileNotFoundError where there is nothing.
    """
    with walk(str(path.parent.absolute())) as (above, missing):
        if missing:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        directory = os.open(path.name, DIRECTORY, dir_fd=above)
        try:
            yield directory, above
        finally:
            os.close(directory)


def _is_ours(directory: int, above: int) -> bool:
    return os.fstat(directory).st_uid == os.geteuid() or is_ours_alone(os.fstat(above))


def _empty(directory: int) -> None:
    """Remove what is in this directory, and not in another that has its name by now."""
    fd = reopen(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in os.listdir(fd):
            try:
                os.unlink(name, dir_fd=fd)
            except IsADirectoryError:
                shutil.rmtree(name, ignore_errors=True, dir_fd=fd)
    finally:
        os.close(fd)


def _real_path(fd: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{fd}"))


def unmount_below(path: Path) -> bool:
    """Unmount what is mounted on a directory or in it; whether nothing is any more.

    Raises nothing; a directory that is a link, or is reached by one of others, is left as it is.
    """
    try:
        with _opened(path) as (directory, _):
            return _unmount(_real_path(directory))
    except FileNotFoundError:
        return True
    except OSError as error:
        log.warning("%s: nothing is unmounted there: %s", path, error.strerror)
        return False


def _unmount(path: Path) -> bool:
    for mounted in reversed(mounts_below(path)):
        with contextlib.suppress(PhaulError):
            proc.run(["umount", "--lazy", str(mounted)], timeout_s=_UMOUNT_S)
    return not mounts_below(path)


def mounts_below(path: Path) -> list[Path]:
    """Where something is mounted on a directory or in it, the innermost last."""
    at = os.path.realpath(path)
    points = [mount.point for mount in mounts()]
    return [Path(point) for point in points if point == at or point.startswith(f"{at}/")]
