"""The laboratory's image is needed here, its hosts are not."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.namespaces import network  # noqa: F401

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "lab"))


@pytest.fixture
def root() -> Iterator[Path]:
    """A directory with a short name, for sockets: their paths have 107 bytes at the most."""
    with tempfile.TemporaryDirectory(prefix="phaul-") as found:
        yield Path(found)
