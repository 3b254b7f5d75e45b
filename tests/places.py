"""Places with short names."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def root() -> Iterator[Path]:
    """A directory with a short name, for sockets: their paths have 107 bytes at the most."""
    with tempfile.TemporaryDirectory(prefix="phaul-") as found:
        yield Path(found)
