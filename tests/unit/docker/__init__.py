"""What docker 26.1.5 says of containers that were started with many options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NAMES = ["rich", "bridge", "host", "none"]


def document(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(__file__).parent / f"{name}.json").read_text())
    return found
