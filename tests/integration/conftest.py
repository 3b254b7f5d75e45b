"""Programs that are started often."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.namespaces import network  # noqa: F401
from tests.places import root  # noqa: F401

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def python() -> Iterator[list[str]]:
    """Starts a module or a file, as Python does, but for the seconds of its imports."""
    with tempfile.TemporaryDirectory(prefix="phaul-") as directory:
        path = str(Path(directory, "programs"))
        argv = [sys.executable, str(TESTS / "forkserver.py"), path]
        pipe = subprocess.PIPE
        with subprocess.Popen(argv, stdin=pipe, stdout=pipe, cwd=TESTS.parent) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == b"serves\n"
            yield [sys.executable, "-I", "-S", str(TESTS / "forkclient.py"), path]
