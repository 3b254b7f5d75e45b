"""The configuration: a validated model whose errors name file, line, key and accepted values.

/etc/phaul-runtime/config.yaml, then the file of --config, then flags: later wins, key by key.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from phaul_runtime.bounds import LONGEST_LOST_S, LONGEST_S
from phaul_runtime.config.peers import Allowed, Rule
from phaul_runtime.config.yaml import Key, Source, read_yaml
from phaul_runtime.cutover.journal import KEPT
from phaul_runtime.errors import ConfigError
from phaul_runtime.hooks.directory import HookDirectory
from phaul_runtime.hooks.lifecycle import EVENTS, Hooks
from phaul_runtime.system.logs import Format, Level

SYSTEM_CONFIG = Path("/etc/phaul-runtime/config.yaml")
_Model = TypeVar("_Model", bound=BaseModel)


class Section(BaseModel):
    """A mapping whose keys are all known, its values of exactly their types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, value: Any) -> Any:
        """A section whose keys are all commented out is null in YAML: its defaults."""
        return {} if value is None else value


_Path = Annotated[str, Field(pattern="^/")]
_TLS = "/etc/phaul-runtime/tls"


_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_SIZE = re.compile(r"([0-9]+) ?(|KiB|MiB|GiB)")


def _bytes(value: Any) -> Any:
    """`10MiB` is the number of its bytes."""
    if not isinstance(value, str):
        return value
    found = _SIZE.fullmatch(value.strip())
    if found is None:
        raise ValueError("input should be a number of bytes, as 65536, 512KiB, 10MiB or 1GiB")
    return int(found[1]) * _UNITS[found[2]]


def _size_schema(at_least: int) -> dict[str, Any]:
    text = {"type": "string", "pattern": f"^{_SIZE.pattern}$"}
    return {"anyOf": [{"type": "integer", "minimum": at_least}, text]}


_Rate = Annotated[int, BeforeValidator(_bytes), Field(ge=1024), WithJsonSchema(_size_schema(1024))]
_Buffer = Annotated[
    int, BeforeValidator(_bytes), Field(ge=64 << 10), WithJsonSchema(_size_schema(64 << 10))
]


class TransportConfig(Section):
    """How to reach the destination."""

    to: str | None = Field(
        None, description="destination: ssh://[user@]host[:port], tls://host[:port] or local:"
    )
    ssh_command: list[str] = Field(["ssh"], min_length=1, description="the ssh program")
    ssh_options: list[str] = Field([], description="further arguments for ssh, as -i and a path")
    agent_command: list[str] = Field(
        ["phaul-runtime"], min_length=1, description="phaul-runtime at the destination"
    )
    connect_timeout_s: float = Field(30, gt=0, description="seconds to wait for the agent")
    ca: _Path = Field(f"{_TLS}/ca.pem", description="certificates of the fleet's CA, for tls://")
    cert: _Path = Field(f"{_TLS}/host.pem", description="this host's certificate")
    key: _Path = Field(f"{_TLS}/host.key", description="its private key")
    insecure: bool = Field(False, description="allow tcp://, in the clear and unauthenticated")
    compression: Literal["none", "zstd"] = Field("none", description="of memory and trees")
    bandwidth_limit: _Rate | None = Field(
        None, description="of memory and trees together, bytes per second, as 10MiB"
    )
    proxy_buffer: _Buffer | None = Field(
        None,
        description="memory for pages on their way, taken from CRIU before the link takes them, "
        "as 256MiB; null: 64MiB with compression or a limit, else CRIU writes to the link itself",
    )


class AllowConfig(Section):
    """What certificates of one name may send to this host; a key that is missing limits nothing."""

    name: str = Field(
        min_length=1, description="of the certificates: their common name, or a pattern as *.lan"
    )
    engines: list[str] | None = Field(None, description="by which it may send")
    targets: list[str] | None = Field(
        None,
        description="names that what it sends may get here, as [web, db-*]; a process has none",
    )
    hooks: bool = Field(
        True, description="also containers with OCI hooks, which run outside of them, as root"
    )


class AgentConfig(Section):
    """This host's agent as a service; see `phaul-runtime agent --listen`."""

    listen: str | None = Field(
        None, description="address and port: tls://0.0.0.0:7007; none: only transports start it"
    )
    ca: _Path = Field(f"{_TLS}/ca.pem", description="certificates of the CA of all clients")
    cert: _Path = Field(f"{_TLS}/host.pem", description="this host's certificate")
    key: _Path = Field(f"{_TLS}/host.key", description="its private key")
    insecure: bool = Field(
        False, description="allow tcp://: a peer that reaches the port is root here"
    )
    allow: list[AllowConfig] | None = Field(
        None,
        description="which certificates may send what; null: those of the CA everything; "
        "docs/transports.md says what that is",
    )

    def allowed(self) -> Allowed:
        """As its user needs it."""
        if self.allow is None:
            return Allowed()
        return Allowed([Rule(**rule.model_dump()) for rule in self.allow])


class PolicyConfig(Section):
    """When to stop iterating."""

    name: Literal["budget", "phaul"] = Field(
        "budget", description="budget: by expected freeze; phaul: the ancestor's constants"
    )
    max_downtime_ms: int = Field(300, gt=0, description="iterate until the expected freeze fits")
    max_iterations: int = Field(8, gt=0, le=100, description="pre-dump rounds at the most")
    if_not_converging: Literal["proceed", "throttle", "abort"] = Field(
        "proceed",
        description="what to do when the budget cannot be met; throttle: first slow the target by "
        "its cgroup's cpu.max",
    )


class FilesystemConfig(Section):
    """What the target has on disks."""

    rootfs: Literal["shared", "rsync"] = Field(
        "rsync",
        description="root file system and mounted directories of a container: shared: the same "
        "storage is mounted on both hosts; rsync: carried over",
    )

    files: Literal["refuse", "copy"] = Field(
        "refuse", description="those that differ at the destination: refuse the move or copy them"
    )


class CriuConfig(Section):
    """CRIU itself."""

    binary: str = Field("criu", min_length=1, description="CRIU's name or path, on both hosts")
    log_level: int = Field(4, ge=0, le=4, description="of CRIU's logs")
    timeout_s: float = Field(3600, gt=0, description="longest wait for any one answer of CRIU")
    page_server: Literal["phaul", "criu"] = Field(
        "phaul",
        description="who receives pages at the destination: the agent, or CRIU's own page server, "
        "which needs CRIU of the same series on both hosts",
    )


class TimeoutsConfig(Section):
    """How long to wait, seconds."""

    call_s: float = Field(60, gt=0, le=LONGEST_S, description="for an ordinary answer of the agent")
    prepare_s: float = Field(300, gt=0, le=LONGEST_S, description="for files and the restore")
    commit_s: float = Field(60, gt=0, le=LONGEST_S, description="how long a commit is repeated")
    heartbeat_s: float = Field(2, gt=0, description="between two signs of life")
    lost_s: float = Field(
        30, gt=0, le=LONGEST_LOST_S, description="a silent client is given up after that"
    )
    same_id_s: float = Field(3600, gt=0, description="for an earlier command with the same --id")
    recover_s: float = Field(
        300,
        gt=0,
        description="post-copy: how long a broken page channel is opened anew before the command "
        "gives up; recover goes on later",
    )

    @model_validator(mode="after")
    def _lost_is_longer(self) -> TimeoutsConfig:
        if self.lost_s <= self.heartbeat_s:
            raise ValueError("lost_s must be larger than heartbeat_s")
        return self


_Event = Literal[
    "pre_check", "pre_freeze", "frozen", "post_restore", "committed", "on_rollback", "on_failure"
]
_Commands = list[Annotated[list[str], Field(min_length=1)]]


class HooksConfig(Section):
    """Programs of this host, run at steps of a move; docs/hooks.md has the events."""

    pre_check: _Commands = Field([], description="on both hosts, before the checks; may refuse")
    pre_freeze: _Commands = Field([], description="at the source, before it freezes; may refuse")
    frozen: _Commands = Field([], description="on both hosts, once it stands still; may refuse")
    post_restore: _Commands = Field(
        [], description="at the destination, rebuilt and held; may refuse"
    )
    committed: _Commands = Field([], description="on both hosts, once the destination's copy runs")
    on_rollback: _Commands = Field([], description="on both hosts, when the source's runs on")
    on_failure: _Commands = Field([], description="on both hosts, however the move failed; last")
    directory: str = Field(
        "/etc/phaul-runtime/hooks",
        pattern="^/",
        description="has <event>.d directories, whose executables run after the lists",
    )
    timeout_s: float = Field(30, gt=0, description="longest time for one program, seconds")
    timeouts: dict[_Event, Annotated[float, Field(gt=0)]] = Field(
        {}, description="the same for events that have their own, by name"
    )

    def hooks(self) -> Hooks:
        """As they are run."""
        commands = self.model_dump(include=set(EVENTS))
        directory = HookDirectory(Path(self.directory))
        timeouts = {str(event): seconds for event, seconds in self.timeouts.items()}
        return Hooks(commands, self.timeout_s, directory, timeouts)


class LoggingConfig(Section):
    """Log records on stderr."""

    level: Level | None = Field(
        None,
        description="what is this or worse; none: an agent's warnings, and of a command nothing "
        "beside what it shows",
    )
    format: Format = Field("auto", description="auto: journal under systemd, else text")


class MetricsConfig(Section):
    """Numbers for Prometheus; docs/operations.md has them."""

    textfile: str | None = Field(
        None, pattern=r"^/.*\.prom$", description="file for node_exporter's textfile collector"
    )
    listen: str | None = Field(
        None, pattern=r"^.+:\d+$", description="address and port at which the agent serves them"
    )


class ChecksConfig(Section):
    """Preflight."""

    ignore: list[str] = Field([], description="names of checks that do not count")


class BatchConfig(Section):
    """`phaul-runtime batch`."""

    store: str = Field(
        "",
        description="where batches are kept: a directory (empty: batches in state_dir) or "
        "postgresql://...",
    )


class Config(Section):
    """The whole configuration."""

    engine: str = Field("process", min_length=1, description="engine of the target")
    workdir: str = Field(
        "/run/phaul", pattern="^/", description="private directory for images; best on tmpfs"
    )
    state_dir: str = Field(
        "/var/lib/phaul-runtime", pattern="^/", description="journals of migrations; not on tmpfs"
    )
    history: int = Field(KEPT, ge=1, description="how many settled migrations are remembered")
    log_dir: str = Field(
        "/var/log/phaul-runtime", pattern="^/", description="CRIU's logs of failed moves"
    )
    restore: Literal["auto", "lazy", "full"] = Field(
        "auto",
        description="lazy: the copy runs before its memory is in place, and a pager at the "
        "destination fills in the rest; auto: lazy where it can be, from 16 MiB",
    )
    mode: Literal["pre-copy", "post-copy", "hybrid"] = Field(
        "pre-copy",
        description="post-copy, hybrid (some rounds of pre-copy first): the copy runs there before "
        "all of its memory has come; the source's stays frozen and serves it; if either host dies "
        "before the last page, the process is lost",
    )
    transport: TransportConfig = TransportConfig()
    agent: AgentConfig = AgentConfig()
    policy: PolicyConfig = PolicyConfig()
    filesystem: FilesystemConfig = FilesystemConfig()
    criu: CriuConfig = CriuConfig()
    timeouts: TimeoutsConfig = TimeoutsConfig()
    checks: ChecksConfig = ChecksConfig()
    hooks: HooksConfig = HooksConfig()
    batch: BatchConfig = BatchConfig()
    logging: LoggingConfig = LoggingConfig()
    metrics: MetricsConfig = MetricsConfig()
    engines: dict[str, dict[str, Any] | None] = Field({}, description="options of each engine")

    _source: Source = PrivateAttr(default_factory=Source)

    @field_validator("mode")
    @classmethod
    def _memory_follows(cls, mode: str, info: ValidationInfo) -> str:
        """A full restore waits for all of the memory, post-copy for none of it."""
        if mode != "pre-copy" and info.data.get("restore") == "full":
            raise PydanticCustomError(
                "mode", "input should be 'pre-copy' where restore is full (lazy or auto go with it)"
            )
        return mode

    def place(self, *key: str) -> str:
        """`FILE:LINE: dotted.key`, for an error about a value; without the place if it has none."""
        where = self._source.place(key)
        return f"{where}: {'.'.join(key)}" if where else ".".join(key)

    def engine_options(self, name: str, model: type[_Model]) -> _Model:
        """The options of engine `name`, validated by its own model.

        Raises:
            ConfigError: as for any other key.
        """
        return validated(model, self.engines.get(name) or {}, self._source, ("engines", name))


def load_config(path: Path | None = None, overrides: Mapping[str, object] | None = None) -> Config:
    """Load the configuration.

    Args:
        path: the file of --config; it must exist.
        overrides: values from flags, by dotted key as `policy.max_downtime_ms`.

    Raises:
        ConfigError: all that is wrong, a line each.
    """
    source = Source()
    if SYSTEM_CONFIG.exists():
        source = source.overlay(read_yaml(SYSTEM_CONFIG))
    if path is not None:
        source = source.overlay(read_yaml(path))
    for dotted, value in (overrides or {}).items():
        source = source.overlay(_flag(dotted, value))
    config = validated(Config, source.values, source, ())
    config._source = source
    return config


def _flag(dotted: str, value: object) -> Source:
    keys = dotted.split(".")
    nested: Any = value
    for key in reversed(keys):
        nested = {key: nested}
    return Source(nested, {tuple(keys): "command line"})


def validated(model: type[_Model], values: Any, source: Source, prefix: Key) -> _Model:
    """A model of `values`, which stand in `source` under the key `prefix`.

    Raises:
        ConfigError: all that is wrong, a line each.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [_explain(model, problem, source, prefix) for problem in error.errors()]
        raise ConfigError(lines[0], log=lines[1:]) from error


def _explain(model: type[BaseModel], problem: Any, source: Source, prefix: Key) -> str:
    # A union adds the names of its members to the location: only what stands in the file counts.
    inner = tuple(part for part in problem["loc"])
    key = (*prefix, *inner)
    exact = problem["type"] in ("missing", "extra_forbidden")
    while inner and key not in source.places and not exact:
        inner = inner[:-1]
        key = (*prefix, *inner)
    place = source.place(key)
    dotted = ".".join(str(part) for part in key)
    where = f"{place}: {dotted}" if place else dotted
    if problem["loc"][-1:] == ("[key]",) and problem["type"] == "literal_error":
        # A mapping whose keys are names of something, as hooks.timeouts.
        known = re.findall(r"'([^']+)'", problem["ctx"]["expected"])
        return f"{where}: unknown key{_guess(str(inner[-1]), known)}"
    if problem["type"] == "extra_forbidden":
        known = _keys_at(model, inner[:-1])
        return f"{where}: unknown key{_guess(str(inner[-1]), known)}"
    got = problem.get("input")
    text = problem["msg"][:1].lower() + problem["msg"][1:]
    if isinstance(got, (dict, BaseModel)):
        return f"{where}: {text}"
    return f"{where}: {text}, not {got!r}"


def nearest(name: str, known: Sequence[str]) -> str:
    """What to add to a message about an unknown name; empty if none of those known is like it."""
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def _guess(name: str, known: list[str]) -> str:
    return nearest(name, known) or f"; known keys: {', '.join(known)}"


def _keys_at(model: type[BaseModel], key: tuple[Any, ...]) -> list[str]:
    for part in key:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(str(part))
        inner: Any = field.annotation if field else None
        if get_args(inner):  # of a list: its items
            inner = get_args(inner)[0]
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        model = inner
    return [field.alias or name for name, field in model.model_fields.items()]


def config_schema() -> dict[str, Any]:
    """The configuration's JSON Schema, without the engines' options."""
    return Config.model_json_schema()
