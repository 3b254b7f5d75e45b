"""Change one member of a JSON object, and no other byte of its text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from phaul_runtime.boundedjson import read_json

_SPACE = " \t\r\n"
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Member:
    """One member of the outermost object; its key, value and end are places in the text."""

    name: str
    value: Any
    key_at: int
    value_at: int
    end: int


def members(text: str) -> list[Member]:
    """The members of the object that `text` is, in their order.

    Raises:
        ValueError: it is no JSON, no object, or names one of them twice; the message says where.
    """
    if not isinstance(read_json(text), dict):
        raise ValueError("it is no object")
    found: list[Member] = []
    # From here on it is known to be well formed.
    at = _skip(text, text.index("{") + 1)
    while text[at] != "}":
        name, end = _DECODER.raw_decode(text, at)
        value_at = _skip(text, _skip(text, end) + 1)
        value, value_end = _DECODER.raw_decode(text, value_at)
        if name in {member.name for member in found}:
            raise ValueError(f"{name} is there twice")
        found.append(Member(name, value, at, value_at, value_end))
        at = _skip(text, value_end)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return found


def with_member(text: str, name: str, value: Any) -> str:
    """The text with that member set: in its place, or as the last, in the style of the others."""
    found = members(text)
    said = json.dumps(value)
    for member in found:
        if member.name == name:
            return text[: member.value_at] + said + text[member.end :]
    opened = text.index("{") + 1
    new = f"{json.dumps(name)}: {said}"
    if not found:
        lead = "\n  " if "\n" in text[opened:].rpartition("}")[0] else ""
        return text[:opened] + lead + new + text[opened:]
    last = found[-1]
    # What stands between the last key and what is before it: a new line and its indentation.
    before = text.rindex(",", 0, last.key_at) + 1 if len(found) > 1 else opened
    lead = text[before : last.key_at]
    if len(found) == 1 and not lead and ": " in text[last.key_at : last.value_at]:
        lead = " "
    return f"{text[: last.end]},{lead}{new}{text[last.end :]}"


def without_member(text: str, name: str) -> str:
    """The text without that member, and without the comma that it brought."""
    found = members(text)
    for index, member in enumerate(found):
        if member.name != name:
            continue
        if index:
            return text[: found[index - 1].end] + text[member.end :]
        if len(found) > 1:
            return text[: member.key_at] + text[found[1].key_at :]
        return text[: text.index("{") + 1] + text[member.end :]
    return text


def _skip(text: str, at: int) -> int:
    while text[at] in _SPACE:
        at += 1
    return at
