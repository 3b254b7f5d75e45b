"""`phaul-runtime config`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from phaul_runtime.cli.outlet import show
from phaul_runtime.config.model import SYSTEM_CONFIG, Config, config_schema, load_config, nearest
from phaul_runtime.engine.interface import engine_names, load_engine
from phaul_runtime.errors import ConfigError, UsageError
from phaul_runtime.transport.base import Destination, load_transport

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


@click.group("config")
def config_group() -> None:
    """Check a configuration, or print its schema."""


@config_group.command("check")
@click.argument("file", required=False, type=click.Path(readable=False, path_type=Path))
def check_file(file: Path | None) -> None:
    """Validate FILE, laid over the system's configuration, engines' options included.

    Without FILE the system's alone. Each error names the file, the line and the key.

    \b
    Exit codes: 0 it is valid; 2 it is not.
    """
    config = load_config(file)
    wrong: list[str] = []
    with _placed(wrong, config, "engine", name=config.engine):
        load_engine(config.engine)
    for name in config.engines:
        with _placed(wrong, config, "engines", name, name=name):
            config.engine_options(name, load_engine(name).options_model)
    if config.transport.to:
        with _placed(wrong, config, "transport", "to"):
            load_transport(Destination.parse(config.transport.to))
    if wrong:
        raise ConfigError(wrong[0], log=wrong[1:])
    show(f"{file or SYSTEM_CONFIG}: ok")


@contextmanager
def _placed(wrong: list[str], config: Config, *key: str, name: str = "") -> Iterator[None]:
    """Collect what is wrong; an error about a name has no place of its own."""
    try:
        yield
    except ConfigError as error:
        wrong += [error.message, *error.log]
    except UsageError as error:
        wrong.append(f"{config.place(*key)}: {error.message}{nearest(name, engine_names())}")


@config_group.command("schema")
def print_schema() -> None:
    """Print the JSON Schema of the configuration, for editors and other checkers."""
    show(json.dumps(full_schema(), indent=2), lines=True)


def full_schema() -> dict[str, Any]:
    """The schema with the options of each engine that is installed."""
    schema = config_schema()
    engines = schema["properties"]["engines"]
    engines["properties"] = {}
    for name in engine_names():
        options = load_engine(name).options_model.model_json_schema()
        # References lead from the root of the whole.
        schema["$defs"].update(options.pop("$defs", {}))
        engines["properties"][name] = {**options, "type": ["object", "null"]}
    engines["additionalProperties"] = False
    return {"$schema": _DIALECT, **schema}
