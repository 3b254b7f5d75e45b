"""A piggie-dirty without libraries: hosts of two suites have other builds of those."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

PIGGIE = Path(__file__).resolve().parents[2] / "piggie"


@pytest.fixture(scope="session")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, to be pushed to both hosts."""
    built = tmp_path_factory.mktemp("piggie") / "piggie-portable"
    argv = ["gcc", "-O2", "-std=gnu11", "-static", "-Wl,--build-id", "-o", str(built), "dirty.c"]
    subprocess.run(argv, cwd=PIGGIE, check=True)
    return built
