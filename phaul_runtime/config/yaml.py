"""YAML with the place of every key, so that an error can name file and line.

A file may have come from somewhere else (a batch, a fleet's configuration): its size, its depth and
what its aliases make of it are bounded here, before anything looks at it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from phaul_runtime.errors import ConfigError

Key = tuple[str | int, ...]

# A batch of 20,000 moves, each with all its options, has 7 MiB.
_MOST_BYTES = 8 << 20
_LEVELS = 32
# Values that aliases (`*name`) make besides those that are written.
_MOST_BY_ALIASES = 100_000


class _Loader(yaml.SafeLoader):
    """Composes nothing that is nested too deep."""

    _level = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._level += 1
        if self._level > _LEVELS:
            mark = self.get_mark()
            raise yaml.MarkedYAMLError(problem=_TOO_DEEP, problem_mark=mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self._level -= 1


_TOO_DEEP = f"nested more than {_LEVELS} levels deep"


@dataclass
class Source:
    """A configuration as plain values, and where each of its keys stands (`file:line`)."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, str] = field(default_factory=dict)

    def place(self, key: Key) -> str:
        """Where `key`, or the nearest key above it, stands; empty if nowhere."""
        while key:
            if key in self.places:
                return self.places[key]
            key = key[:-1]
        return ""

    def overlay(self, other: Source) -> Source:
        """This configuration with `other` laid over it, mapping by mapping."""
        return Source(_merge(self.values, other.values), {**self.places, **other.places})


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def read_yaml(path: Path) -> Source:
    """Read one file.

    Raises:
        ConfigError: it cannot be read, is no YAML, or has a key twice.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise ConfigError(f"{path}: {reason}") from error
    if len(data) > _MOST_BYTES:
        raise ConfigError(f"{path}: more than {_MOST_BYTES >> 20} MiB")
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is not None:
            _Aliases().require_few(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise ConfigError(f"{where}: {error.problem or 'no valid YAML'}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from error
    source = Source()
    if node is None:
        return source
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}:{node.start_mark.line + 1}: expected keys and values")
    source.values = _plain(node, (), path, source.places)
    return source


class _Aliases:
    """How many values, and how many levels of them, a node is with its aliases filled in."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, int]] = {}
        self._written = 0

    def require_few(self, node: yaml.Node) -> None:
        """Raise MarkedYAMLError where aliases make too much of a file, or lead into themselves."""
        values, levels = self._measure(node)
        problem = _TOO_DEEP if levels > _LEVELS else ""
        if values - self._written > _MOST_BY_ALIASES:
            problem = f"aliases make more than {_MOST_BY_ALIASES} values"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)

    def _measure(self, node: yaml.Node) -> tuple[int, int]:
        known = self._known.get(id(node))
        if known == (0, 0):
            raise yaml.MarkedYAMLError(
                problem="an alias leads into itself", problem_mark=node.start_mark
            )
        if known is not None:
            return known
        self._known[id(node)] = (0, 0)
        self._written += 1
        below: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            below = [each for pair in node.value for each in pair]
        elif isinstance(node, yaml.SequenceNode):
            below = node.value
        found = [self._measure(each) for each in below]
        values = 1 + sum(each for each, _ in found)
        measured = (min(values, 1 << 40), 1 + max((levels for _, levels in found), default=0))
        self._known[id(node)] = measured
        return measured


def _plain(node: yaml.Node, key: Key, path: Path, places: dict[Key, str]) -> Any:
    places.setdefault(key, f"{path}:{node.start_mark.line + 1}")
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for name_node, value_node in node.value:
            where = f"{path}:{name_node.start_mark.line + 1}"
            if not isinstance(name_node, yaml.ScalarNode):
                raise ConfigError(f"{where}: a key is a word")
            name = str(name_node.value)
            if name in values:
                raise ConfigError(f"{where}: {name} is there twice")
            places[(*key, name)] = where
            values[name] = _plain(value_node, (*key, name), path, places)
        return values
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*key, i), path, places) for i, item in enumerate(node.value)]
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        # The last ones are what PyYAML raises where a tag says what a value is not: !!bool maybe.
        raise ConfigError(f"{places[key]}: {node.value[:80]!r} cannot be read") from error
    finally:
        loader.dispose()
