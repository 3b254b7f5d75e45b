"""What a command prints: no full disk, closed pipe or dead terminal ends what it is about.

All that a command prints comes by here, and here what is of others in it is made harmless.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys

import click

from phaul_runtime import printable

_STANDARD = (0, 1, 2)


def show(text: str, *, lines: bool = False) -> None:
    """Print what a command is for on stdout: a line, or with `lines` more than one.

    Raises:
        OSError: stdout cannot be written.
    """
    click.echo(printable.lines(text) if lines else printable.one_line(text))


def echo(text: str) -> None:
    """Print a line on stdout; if that fails, say so once on stderr, and print nothing more.

    A pipe that nobody reads any more (`| head`) is no failure.
    """
    try:
        show(text)
    except OSError as error:
        _give_up(sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            tell(f"phaul-runtime: warning: stdout cannot be written: {error.strerror}")


def tell(text: str) -> None:
    """Print a line, or an error's lines, on stderr, if it can be written."""
    try:
        click.echo(printable.lines(text), err=True)
    except OSError:
        _give_up(sys.stderr.fileno())


def flush() -> None:
    """Before the interpreter ends: what cannot be written any more is given up.

    It would end with an error of its own otherwise, exit code 120.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            try:
                stream.flush()
            except (OSError, ValueError):
                with contextlib.suppress(OSError, ValueError):
                    _give_up(stream.fileno())


def _give_up(fd: int) -> None:
    """What is in Python's buffer still, and what comes, goes nowhere."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nowhere, fd)
        os.close(nowhere)


def open_standard() -> None:
    """Have something at descriptors 0 to 2: what is opened next would get those numbers."""
    for fd in _STANDARD:
        try:
            os.fstat(fd)
        except OSError:
            with contextlib.suppress(OSError):
                # The lowest that is free is this one.
                os.open(os.devnull, os.O_RDWR)
    # What the terminal's character set lacks is an escape, too.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
