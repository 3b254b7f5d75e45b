"""`phaul-runtime config`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from phaul_runtime.config import SYSTEM_CONFIG, config_schema, load_config
from phaul_runtime.engine import engine_names, load_engine
from phaul_runtime.transport import Destination, load_transport


@click.group("config")
def config_group() -> None:
    """Check a configuration, or print its schema."""


@config_group.command("check")
@click.argument("file", required=False, type=click.Path(readable=False, path_type=Path))
def check_file(file: Path | None) -> None:
    """Validate FILE (or the system's configuration), engines' options included."""
    config = load_config(file)
    load_engine(config.engine)
    for name in config.engines:
        config.engine_options(name, load_engine(name).options_model)
    if config.transport.to:
        load_transport(Destination.parse(config.transport.to))
    click.echo(f"{file or SYSTEM_CONFIG}: ok")


@config_group.command("schema")
def print_schema() -> None:
    """Print the JSON Schema of the configuration."""
    schema = config_schema()
    engines = {name: load_engine(name).options_model.model_json_schema() for name in engine_names()}
    schema["properties"]["engines"]["properties"] = engines
    click.echo(json.dumps(schema, indent=2))
