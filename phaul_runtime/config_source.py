"""YAML with the place of every key, so that an error can name file and line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from phaul_runtime.errors import ConfigError

Key = tuple[str | int, ...]


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
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise ConfigError(f"{path}: {reason}") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
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


def _plain(node: yaml.Node, key: Key, path: Path, places: dict[Key, str]) -> Any:
    places.setdefault(key, f"{path}:{node.start_mark.line + 1}")
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for name_node, value_node in node.value:
            where = f"{path}:{name_node.start_mark.line + 1}"
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
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{places[key]}: {node.value!r} cannot be read") from error
    finally:
        loader.dispose()
