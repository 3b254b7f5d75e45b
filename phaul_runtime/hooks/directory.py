"""An operator's directories of hooks: `<directory>/<event>.d`, as libvirt's are.

What lies there runs as root. So it runs only if root alone can have put it there: each file, and
each directory above it, belongs to root and is writable by nobody else.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path

from phaul_runtime.system import proc

_ROOT = 0
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
# Editors' and package managers' copies.
_LEFTOVERS = ("*~", "*.bak", "*.dpkg-*", "*.rpm*")


class Effect(Enum):
    """What becomes of a program when its event comes."""

    RUNS = "runs"
    SKIPPED = "skipped"
    FAILS = "fails"


@dataclass(frozen=True)
class Program:
    """One program of an event.

    Attributes:
        argv: the command; of a file in a directory, its path alone.
        effect: what becomes of it.
        wrong: why it does not run, one line.
        hint: what to do about that.
        listed: it comes from a directory, not from the configuration.
    """

    argv: Sequence[str]
    effect: Effect = Effect.RUNS
    wrong: str = ""
    hint: str = ""
    listed: bool = False


def configured(command: Sequence[str]) -> Program:
    """A command of the configuration: on PATH, or one that came with phaul-runtime."""
    if proc.find(command[0]) is None:
        beside = shutil.which(command[0], path=str(Path(sys.executable).parent))
        if beside is not None:
            return Program([beside, *command[1:]])
        return Program(
            command,
            Effect.FAILS,
            f"cannot start {command[0]}: no such program",
            hint=f"install {command[0]} or put it on PATH",
        )
    return Program(command)


@dataclass(frozen=True)
class HookDirectory:
    """The directory of this host.

    Args:
        path: it need not exist.
        owner: who besides root may own what lies there: root is who runs it.
    """

    path: Path
    owner: int = _ROOT

    def programs(self, event: str) -> list[Program]:
        """What lies in the directory of `event`, in the order in which it runs: C's, by name."""
        directory = self.path / f"{event}.d"
        try:
            names = sorted(os.listdir(directory), key=os.fsencode)
        except FileNotFoundError:
            return []
        except OSError as error:
            return [_failing(directory, f"cannot read {directory}: {error.strerror}")]
        if wrong := self._not_ours_alone(directory):
            return [_failing(directory, *wrong)]
        return [
            program
            for name in names
            if not _is_leftover(name) and (program := self._program(directory / name))
        ]

    def _program(self, path: Path) -> Program | None:
        try:
            mode = path.stat().st_mode
        except OSError as error:
            # A link to nowhere, mostly.
            return Program(
                [str(path)], Effect.SKIPPED, f"cannot be read: {error.strerror}", listed=True
            )
        if stat.S_ISDIR(mode):
            return None
        if not stat.S_ISREG(mode):
            return Program([str(path)], Effect.SKIPPED, "is no file", listed=True)
        # By the mode's bits: root may "execute" what has any of them.
        if not mode & (stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH):
            return Program(
                [str(path)],
                Effect.SKIPPED,
                "is not executable",
                hint=f"chmod +x {path}",
                listed=True,
            )
        if wrong := self._not_ours_alone(path):
            return _failing(path, *wrong)
        if wrong := _no_interpreter(path):
            return _failing(path, *wrong)
        return Program([str(path)], listed=True)

    def _not_ours_alone(self, path: Path) -> tuple[str, str] | None:
        """Why somebody else than root might have put `path` there, and how to mend it."""
        for place in _chain(path):
            try:
                info = place.stat()
            except OSError as error:
                return f"cannot read {place}: {error.strerror}", ""
            if info.st_uid not in (_ROOT, self.owner):
                return f"{place} belongs to uid {info.st_uid}, not to root", f"chown root {place}"
            # In a directory above, the sticky bit keeps others from what is not theirs (/tmp).
            sticky = place != path and info.st_mode & stat.S_ISVTX
            if info.st_mode & _OTHERS_WRITE and not sticky:
                return f"{place} is writable by others than root", f"chmod go-w {place}"
        return None


def _failing(path: Path, wrong: str, hint: str = "") -> Program:
    return Program([str(path)], Effect.FAILS, wrong, hint, listed=True)


def _is_leftover(name: str) -> bool:
    return name.startswith(".") or any(fnmatchcase(name, pattern) for pattern in _LEFTOVERS)


def _chain(path: Path) -> Iterator[Path]:
    """`path` and all directories above it, as it is written and as links lead."""
    yield path
    yield from dict.fromkeys((*path.parents, *path.resolve().parents))


def _no_interpreter(path: Path) -> tuple[str, str] | None:
    """A script whose first line names a program that is not there: the kernel says as little."""
    try:
        with path.open("rb") as file:
            first = file.readline(256)
    except OSError as error:
        return f"cannot read {path}: {error.strerror}", ""
    words = first[2:].split() if first.startswith(b"#!") else []
    if words and not os.access(words[0], os.X_OK):
        interpreter = os.fsdecode(words[0])
        return f"the interpreter of {path} is missing: {interpreter}", f"install {interpreter}"
    return None
