"""JSON that somebody else wrote: a peer, a container's owner, an editor of a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

LEVELS = 64
"""How deep arrays and objects may lie in each other."""
MOST_BYTES = 16 << 20
"""Of a file; a container's specification has some KiB."""


def read_json(data: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, in one line: also what only Python takes for JSON (NaN, Infinity), a
            number of thousands of digits, and what is nested deeper than `LEVELS`.
    """
    try:
        value = json.loads(data, parse_constant=_no_number)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    waiting = [value]
    for _ in range(LEVELS):
        waiting = [each for one in waiting for each in _within(one)]
        if not waiting:
            return value
    raise ValueError(_TOO_DEEP)


def read_json_file(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: see `read_json`; or it is larger than `MOST_BYTES`.
    """
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES >> 20} MiB")
    return read_json(data)


_TOO_DEEP = f"it is nested more than {LEVELS} levels deep"


def _within(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return []
    return [each for each in value if isinstance(each, dict | list)]


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
