"""The command line in this process: what a test sees of it, without the start of an interpreter."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from dataclasses import dataclass
from unittest import mock

from phaul_runtime.cli.main import PROGRAM, main
from phaul_runtime.system import logs


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def run(*argv: str) -> Done:
    """`phaul-runtime ARGV`; what it sets up for the process is as before afterwards."""
    # With a binary file below, as the real ones.
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    root = logging.getLogger()
    handlers = list(root.handlers)
    code: object = 0
    try:
        with (
            mock.patch.object(sys, "argv", [PROGRAM, *argv]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                main()
            except SystemExit as ended:
                code = ended.code
    finally:
        root.handlers[:] = handlers
        logs.enter("")
        for name in logs._OURS:
            logging.getLogger(name).setLevel(logging.NOTSET)
    number = code if isinstance(code, int) else int(code is not None)
    return Done(number, *(_text(file) for file in (out, err)))


def _text(file: io.TextIOWrapper) -> str:
    file.seek(0)
    return file.read()
