"""Every key of the configuration on its own: another value arrives, a wrong one is named."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from phaul_runtime.cli.config_cmd import full_schema
from phaul_runtime.config import model as config_module
from phaul_runtime.config.model import load_config
from phaul_runtime.engine import load_engine
from phaul_runtime.errors import ConfigError

SCHEMA = full_schema()
# For keys whose values have a form.
TEXTS = ("/x", "/x.prom", "127.0.0.1:1", "unix:///x", "x", "rsync")
EXAMPLE = Path(__file__).resolve().parents[3] / "config.example.yaml"


def leaves(found: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any]]:
    """The keys that hold values, with their schemas."""
    for name, each in found["properties"].items():
        target = SCHEMA["$defs"][each["$ref"].rpartition("/")[2]] if "$ref" in each else each
        if target.get("properties"):
            yield from leaves(target, (*path, name))
        else:
            yield (*path, name), each


KEYS = dict(leaves(SCHEMA))


def other(found: dict[str, Any], default: Any = None) -> Any:
    """A value that is accepted and is not the default."""
    default = found.get("default", default)
    if "$ref" in found:
        target = SCHEMA["$defs"][found["$ref"].rpartition("/")[2]]
        return {name: other(each) for name, each in target["properties"].items()}
    if "anyOf" in found:
        return other(next(e for e in found["anyOf"] if e.get("type") != "null"), default)
    if "enum" in found:
        return next(value for value in found["enum"] if value != default)
    match found["type"]:
        case "boolean":
            return not default
        case "integer" | "number":
            limits = (found.get("maximum", 1e9), found.get("exclusiveMaximum", 1e9))
            least = found.get("minimum", 1)
            return default + 1 if default is not None and default + 1 <= min(limits) else least
        case "array":
            return [*(default or []), other(found["items"])]
        case "object":
            name = found.get("propertyNames", {})
            key = other(name | {"type": "string"}) if name else "/x"
            patterns = found.get("patternProperties", {}).values()
            return {key: other(found.get("additionalProperties") or next(iter(patterns)))}
        case _:
            pattern = found.get("pattern", "")
            return next(t for t in TEXTS if t != default and re.search(pattern, t))


def wrong(found: dict[str, Any]) -> Any:
    """A value that no key takes."""
    return 5 if found.get("type") == "object" else {"no": ["such", "thing"]}


def written(path: tuple[str, ...], value: Any, file: Path) -> Path:
    nested = value
    for name in reversed(path):
        nested = {name: nested}
    file.write_text(yaml.safe_dump(nested, default_flow_style=False))
    return file


def load(file: Path, path: tuple[str, ...]) -> Any:
    """What the model has at `path`."""
    config = load_config(file)
    if path[0] == "engines":
        engine, *rest = path[1:]
        found = config.engine_options(engine, load_engine(engine).options_model).model_dump()
    else:
        rest, found = list(path), config.model_dump()
    for name in rest:
        found = found[name]
    return found


@pytest.fixture(autouse=True)
def no_system_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "SYSTEM_CONFIG", tmp_path / "etc.yaml")


@pytest.mark.parametrize("path", KEYS, ids=".".join)
def test_another_value_arrives(path: tuple[str, ...], tmp_path: Path) -> None:
    value = other(KEYS[path])
    file = tmp_path / "config.yaml"
    file.write_text("")
    assert load(file, path) != value
    assert load(written(path, value, file), path) == value
    # From the system's file too, and what lies over it wins.
    written(path, value, tmp_path / "etc.yaml")
    file.write_text("")
    assert load(file, path) == value
    default = KEYS[path].get("default")
    if not isinstance(default, dict):  # mappings are laid over each other key by key
        assert load(written(path, default, file), path) == default


@pytest.mark.parametrize("path", KEYS, ids=".".join)
def test_a_wrong_value_is_named_with_its_line(path: tuple[str, ...], tmp_path: Path) -> None:
    file = written(path, wrong(KEYS[path]), tmp_path / "config.yaml")
    with pytest.raises(ConfigError) as caught:
        load(file, path)
    assert f"{file}:{len(path)}: {'.'.join(path)}" in str(caught.value)


@pytest.mark.parametrize("path", KEYS, ids=".".join)
def test_a_misspelt_key_is_told_the_right_one(path: tuple[str, ...], tmp_path: Path) -> None:
    misspelt = (*path[:-1], f"{path[-1]}x")
    file = written(misspelt, other(KEYS[path]), tmp_path / "config.yaml")
    with pytest.raises(ConfigError) as caught:
        load(file, path)
    said = str(caught.value)
    assert f"{file}:{len(path)}: {'.'.join(misspelt)}: unknown key" in said
    assert f"did you mean {path[-1]}?" in said


def test_these_are_the_keys_of_the_example() -> None:
    def named(found: dict[str, Any], depth: int, path: tuple[str, ...] = ()) -> Iterator[Any]:
        for name, value in found.items():
            if isinstance(value, dict) and value and depth:
                yield from named(value, depth - 1, (*path, name))
            else:
                yield (*path, name)

    example = yaml.safe_load(EXAMPLE.read_text())
    engines = {("engines", *path) for path in named(example.pop("engines"), 1)}
    # crun's are runc's, which the example says.
    crun = {("engines", "crun", path[2]) for path in engines if path[1] == "runc"}
    assert {*named(example, 1), *engines, *crun} == set(KEYS)
