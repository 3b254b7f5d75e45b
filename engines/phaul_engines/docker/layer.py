"""A container's writable layer, and what a runtime that is killed in a restore does to it.

While runc restores, the container's root file system is mounted in runc's own directory, too
(criu-root). If runc is killed, docker has another runc remove that directory, with all that is in
it: the layer loses its files, and hides those of the image (seen with runc 1.1.15). That matters
where the source's copy may be dead already.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from phaul_runtime.errors import DestinationError, MigrationFailed, PhaulError
from phaul_runtime.memory.image_dirs import remove_tree, unmount_below
from phaul_runtime.system import proc

_WITHIN_S = 600.0
# Beside the layer: on its file system, and removed with the container.
_KEPT = "phaul-kept"
_PART = "phaul-kept.part"


def let_go(runtime_directory: Path) -> None:
    """Unmount what runc needs no more once all is restored, and would do itself at its end.

    Raises:
        MigrationFailed: it stays mounted.
    """
    if not unmount_below(runtime_directory):
        raise MigrationFailed(f"something stays mounted in {runtime_directory}")


class Layer:
    """A writable layer that nothing runs on, and a copy of it whose files are links to its own.

    Until the container runs, files in it are removed and replaced, never written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kept = path.with_name(_KEPT)

    def secure(self) -> None:
        """Make the copy, once; from then on put back what was there then.

        Raises:
            DestinationError: it cannot be done.
        """
        try:
            if not self._kept.exists():
                part = self.path.with_name(_PART)
                remove_tree(part)
                _link(self.path, part)
                part.rename(self._kept)
                return
            for entry in self.path.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
            _link(self._kept, self.path)
        except OSError as error:
            raise DestinationError(f"cannot keep {self.path}: {error.strerror}") from error

    def forget(self) -> None:
        """Remove the copy; idempotent."""
        for name in (_KEPT, _PART):
            remove_tree(self.path.with_name(name))


def _link(path: Path, copy: Path) -> None:
    """With everything: owners, attributes, and the devices that hide files of the image."""
    argv = ["cp", "--archive", "--link", "--no-target-directory", "--", str(path), str(copy)]
    try:
        done = proc.run(argv, timeout_s=_WITHIN_S)
    except PhaulError as error:
        raise DestinationError(f"cannot keep {path}: {error.message}") from error
    if done.returncode != 0:
        raise DestinationError(f"cannot keep {path}: {done.stderr.strip()}")
