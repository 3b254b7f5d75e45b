"""A whole move of the fake engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.wholemove import WholeMove
from tests.namespaces import network  # noqa: F401


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WholeMove]:
    move = WholeMove(tmp_path, monkeypatch)
    yield move
    move.case.clear()
