"""The configuration: what is accepted, and what errors say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from phaul_engines.process.options import ProcessOptions
from pydantic import BaseModel, ValidationError

from phaul_runtime.cli.config_cmd import full_schema
from phaul_runtime.cli.main import cli
from phaul_runtime.config import model as config_module
from phaul_runtime.config.model import Config, load_config
from phaul_runtime.engine import engine_names, load_engine
from phaul_runtime.errors import ConfigError, UsageError

EXAMPLE = Path(__file__).resolve().parents[3] / "config.example.yaml"


@pytest.fixture(autouse=True)
def no_system_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "SYSTEM_CONFIG", tmp_path / "etc.yaml")


def keys(model: type[BaseModel]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        inner = field.annotation
        section = isinstance(inner, type) and issubclass(inner, BaseModel)
        found[name] = keys(inner) if section else None  # type: ignore[arg-type]
    return found


def test_the_example_has_every_key_with_its_default() -> None:
    example = yaml.safe_load(EXAMPLE.read_text())
    loaded = load_config(EXAMPLE)
    assert loaded.model_dump(exclude={"engines"}) == Config().model_dump(exclude={"engines"})
    named = {
        name: dict.fromkeys(value) if isinstance(value, dict) and name != "engines" else None
        for name, value in example.items()
    }
    assert named == keys(Config)
    # crun's are runc's, which the example says.
    assert sorted({*example["engines"], "crun"}) == engine_names()
    for engine, options in example["engines"].items():
        model = load_engine(engine).options_model
        assert loaded.engine_options(engine, model) == model()
        assert options.keys() == model.model_fields.keys()


def test_every_line_of_the_example_has_its_words() -> None:
    for line in EXAMPLE.read_text().splitlines():
        _, colon, rest = line.partition(":")
        if line.startswith("#") or not colon:
            continue
        value, mark, words = rest.partition(" # ")
        section = not value.strip()
        assert section or (mark and words.strip()), line
        # One line, that fits on a screen.
        assert len(line) <= 110, line


def problem(tmp_path: Path, text: str, **overrides: object) -> str:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file, {k.replace("__", "."): v for k, v in overrides.items()})
    assert caught.value.exit_code == 2
    return str(caught.value).replace(str(file), "c.yaml")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("policy:\n  max_downtime: 5\n",
         "c.yaml:2: policy.max_downtime: unknown key; did you mean max_downtime_ms?"),
        ("polcy: {}\n", "c.yaml:1: polcy: unknown key; did you mean policy?"),
        ("zzz: 1\n", "known keys: engine, workdir"),
        ("policy: {max_iterations: true}\n", "c.yaml:1: policy.max_iterations: input should be"),
        ("policy:\n\n  max_iterations: '3'\n", "c.yaml:3: policy.max_iterations"),
        ("policy: {max_iterations: -1}\n", "greater than 0, not -1"),
        ("policy: {max_iterations: 2.5}\n", "not 2.5"),
        ("filesystem:\n  files: maybe\n", "'refuse' or 'copy', not 'maybe'"),
        ("policy: [1]\n", "c.yaml:1: policy:"),
        ("transport: {ssh_command: ssh}\n", "transport.ssh_command: input should be a valid list"),
        ("workdir: run/phaul\n", "c.yaml:1: workdir"),
        ("engine: process\nengine: runc\n", "c.yaml:2: engine is there twice"),
        ("a: b: c\n", "c.yaml:1:5: mapping values are not allowed"),
        ("policy:\n\tname: budget\n", "c.yaml:2:1"),
        (
            "hooks:\n  timeouts: {forzen: 2}\n",
            "c.yaml:2: hooks.timeouts.forzen: unknown key; did you mean frozen?",
        ),
        ("hooks: {timeouts: {frozen: 0}}\n", "hooks.timeouts.frozen: input should be greater"),
        ("- 1\n", "c.yaml:1: expected keys and values"),
        ("transport: {bandwidth_limit: 10MB}\n",
         "c.yaml:1: transport.bandwidth_limit: value error, input should be a number of bytes"),
        ("transport:\n  proxy_buffer: 1KiB\n", "c.yaml:2: transport.proxy_buffer: input should be"),
        ("transport: {bandwidth_limit: -5}\n", "c.yaml:1: transport.bandwidth_limit"),
        ("transport: {bandwidth_limit: 1.5}\n", "c.yaml:1: transport.bandwidth_limit"),
        ("transport: {compression: gzip}\n", "'none' or 'zstd', not 'gzip'"),
        ("transport: {ca: ca.pem}\n", "c.yaml:1: transport.ca"),
        ("agent: {listen: 5}\n", "c.yaml:1: agent.listen"),
        ("restore: full\nmode: post-copy\n",
         "c.yaml:2: mode: input should be 'pre-copy' where restore is full (lazy or auto go with "
         "it), not 'post-copy'"),
        ("mode: postcopy\n", "'pre-copy', 'post-copy' or 'hybrid', not 'postcopy'"),
        ("timeouts: {recover_s: 0}\n", "c.yaml:1: timeouts.recover_s: input should be greater"),
        ("timeouts: {lost_s: 1, heartbeat_s: 2}\n", "lost_s must be larger than heartbeat_s"),
    ],
)  # fmt: skip
def test_errors_name_place_key_and_what_is_accepted(tmp_path: Path, text: str, says: str) -> None:
    assert says in problem(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("65536", 65536), ("'65536'", 65536), ("10MiB", 10 << 20), ("512 KiB", 512 << 10),
     ("2GiB", 2 << 30), ("null", None)],
)  # fmt: skip
def test_sizes_have_units(tmp_path: Path, text: str, size: int | None) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"transport: {{bandwidth_limit: {text}, proxy_buffer: {text}}}\n")
    found = load_config(file).transport
    assert (found.bandwidth_limit, found.proxy_buffer) == (size, size)


def test_all_errors_are_named(tmp_path: Path) -> None:
    said = problem(tmp_path, "engine: 5\npolicy: {nam: budget}\ncriu: {log_level: 9}\n")
    assert all(f"c.yaml:{line}:" in said for line in (1, 2, 3))


def test_flags_win_and_are_blamed(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("policy: {max_iterations: 3, max_downtime_ms: 100}\n")
    config = load_config(file, {"policy.max_iterations": 5})
    assert (config.policy.max_iterations, config.policy.max_downtime_ms) == (5, 100)
    said = problem(tmp_path, "policy: {max_iterations: 3}\n", policy__max_iterations=-5)
    assert "command line: policy.max_iterations" in said


@pytest.mark.parametrize("restore", ["auto", "lazy", "full"])
def test_post_copy_goes_with_every_restore_but_full(tmp_path: Path, restore: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"mode: pre-copy\nrestore: {restore}\n")
    assert load_config(file).mode == "pre-copy"
    if restore == "full":
        said = problem(tmp_path, file.read_text(), mode="hybrid")
        assert said.startswith("command line: mode: ")
        assert len(said.splitlines()) == 1
    else:
        assert load_config(file, {"mode": "hybrid"}).mode == "hybrid"
        assert load_config(file, {"mode": "post-copy"}).timeouts.recover_s == 300


def test_the_system_file_lies_below(tmp_path: Path) -> None:
    (tmp_path / "etc.yaml").write_text("engine: runc\npolicy: {max_iterations: 2}\n")
    file = tmp_path / "c.yaml"
    file.write_text("policy: {max_downtime_ms: 7}\n")
    config = load_config(file)
    assert (config.engine, config.policy.max_iterations) == ("runc", 2)
    assert config.policy.max_downtime_ms == 7


def test_engine_options_have_places_too(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("engines:\n  process:\n    tcp_establishd: true\n    shell_job: perhaps\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file).engine_options("process", ProcessOptions)
    said = str(caught.value)
    assert f"{file}:3: engines.process.tcp_establishd: unknown key" in said
    assert "did you mean tcp_established?" in said
    assert f"{file}:4: engines.process.shell_job" in said


@pytest.mark.parametrize("text", ["", "# nothing\n", "policy:\n", "engines:\n  process:\n"])
def test_empty_means_defaults(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    config = load_config(file)
    assert config.policy == Config().policy
    assert config.engine_options("process", ProcessOptions) == ProcessOptions()


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="directory"):
        load_config(tmp_path)
    (tmp_path / "latin").write_bytes(b"engine: \xff\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "latin")


def test_config_check_names_all_places(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "engine: proces\n"
        "transport:\n"
        "  to: warp://b\n"
        "engines:\n"
        "  runcc: {}\n"
        "  process:\n"
        "    file_lock: true\n"
        "  runc:\n"
        "    mounts: {/srv: elsewhere}\n"
    )
    with pytest.raises(ConfigError) as caught:
        cli.main(["config", "check", str(file)], standalone_mode=False)
    said = [line.strip().replace(str(file), "c.yaml") for line in str(caught.value).splitlines()]
    assert said[0] == "c.yaml:1: engine: unknown engine 'proces'; did you mean process?"
    assert said[1] == "c.yaml:5: engines.runcc: unknown engine 'runcc'; did you mean runc?"
    assert "c.yaml:7: engines.process.file_lock: unknown key; did you mean file_locks?" in said[2]
    assert any("c.yaml:9: engines.runc.mounts" in line for line in said[3:-1])
    assert "c.yaml:3: transport.to: unknown transport 'warp'" in said[-1]


def valid(config: object) -> bool:
    return bool(jsonschema.Draft202012Validator(full_schema()).is_valid(config))


def test_the_schema_takes_what_the_model_takes() -> None:
    jsonschema.Draft202012Validator.check_schema(full_schema())
    example = yaml.safe_load(EXAMPLE.read_text())
    jsonschema.Draft202012Validator(full_schema()).validate(example)
    assert valid({})
    assert valid({"engines": {"process": None}})

    def load(config: dict[str, Any]) -> None:
        found = Config.model_validate(config)
        for name in found.engines:
            found.engine_options(name, load_engine(name).options_model)

    wrongs: list[dict[str, Any]] = [
        {"engin": "runc"},
        {"policy": {"max_downtime": 3}},
        {"policy": {"if_not_converging": "hope"}},
        {"hooks": {"timeouts": {"forzen": 1}}},
        {"engines": {"jail": {}}},
        {"engines": {"process": {"file_lock": True}}},
        {"metrics": {"textfile": "relative.prom"}},
    ]
    for wrong in wrongs:
        assert not valid(wrong), wrong
        with pytest.raises((ValidationError, UsageError)):
            load(wrong)


def every_key(schema: dict[str, Any], root: dict[str, Any], path: str = "") -> Iterator[Any]:
    """Each key of a schema, dotted, with its own schema."""
    for name, found in schema.get("properties", {}).items():
        inner = found
        for each in found.get("anyOf", [found]):
            inner = each if each.get("properties") or "$ref" in each else inner
        if "$ref" in inner:
            inner = root["$defs"][inner["$ref"].rpartition("/")[2]]
        yield f"{path}{name}", found
        yield from every_key(inner, root, f"{path}{name}.")


def test_every_key_is_described() -> None:
    schema = full_schema()
    keys = dict(every_key(schema, schema))
    assert {"transport.to", "hooks.frozen", "engines.docker.volumes"} < keys.keys()
    sections = {key for key in keys if any(other.startswith(f"{key}.") for other in keys)}
    described = {key for key, found in keys.items() if found.get("description")}
    assert keys.keys() - sections - described == set()
