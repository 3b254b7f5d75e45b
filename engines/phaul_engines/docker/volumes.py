"""Volumes that a container has left behind: whether a move may write to them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

# Beside `_data`, where docker's local driver keeps its own notes; out of the container's sight.
MARK = ".phaul-runtime-moved"


def mark_moved(paths: Iterable[Path]) -> None:
    """The contents of these (`.../_data`) live on elsewhere: a move back may overwrite them."""
    for path in paths:
        with contextlib.suppress(OSError):
            (path.parent / MARK).touch()


def unmark(path: Path) -> None:
    """A container of this host has it again."""
    with contextlib.suppress(OSError):
        (path.parent / MARK).unlink(missing_ok=True)


def may_be_overwritten(path: Path) -> bool:
    """Whether nothing in it is lost: it is empty, or what it held has moved away."""
    try:
        return (path.parent / MARK).exists() or not any(path.iterdir())
    except OSError:
        return True  # not there, or not on this host: docker would say so
