"""The file of moves: a validated model whose errors name file, line and key."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from phaul_runtime.config.model import Section, validated
from phaul_runtime.config.yaml import Key, Source, read_yaml
from phaul_runtime.errors import ConfigError, UsageError
from phaul_runtime.transport.base import Destination

LOCAL = "local:"
_SOURCES = ("local", "ssh")


def _text(value: Any) -> Any:
    """A pid is a number in YAML."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


_Text = Annotated[str, BeforeValidator(_text), Field(min_length=1)]
_Name = Annotated[str, BeforeValidator(_text), Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,79}$")]


class MoveOptions(Section):
    """What may stand in `defaults` too: the options of `phaul-runtime migrate`."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, validate_by_name=True, validate_by_alias=True
    )

    engine: str = Field("process", min_length=1, description="engine of the target")
    from_: str = Field(
        LOCAL, alias="from", description="source host: ssh://[user@]host[:port] or local:"
    )
    to: str = Field("", description="destination, as the source calls it")
    config: str | None = Field(None, description="configuration file at the source")
    files: Literal["refuse", "copy"] | None = None
    restore: Literal["auto", "lazy", "full"] | None = None
    mode: Literal["pre-copy", "post-copy", "hybrid"] | None = None
    max_downtime_ms: int | None = Field(None, gt=0)
    max_iterations: int | None = Field(None, gt=0, le=100)
    tcp_established: bool = False
    ignore: list[str] = Field([], description="checks that do not count")


class Move(MoveOptions):
    """One move.

    Attributes:
        after: moves and groups that have to be done before it.
        group: whose limit and `after` it has too.
    """

    target: _Text
    name: _Name
    after: list[_Name] = Field([])
    group: _Name | None = None

    @property
    def source_host(self) -> str:
        """The host that `limits.per_source` counts it for."""
        return _host(self.from_)

    @property
    def destination_host(self) -> str:
        """The host that `limits.per_destination` counts it for."""
        there = _host(self.to)
        return self.source_host if there == "local" else there


class Limits(Section):
    """How many moves at once."""

    total: int = Field(8, gt=0, description="in all")
    per_source: int = Field(2, gt=0, description="from one host")
    per_destination: int = Field(2, gt=0, description="to one host")


class Group(Section):
    """What moves of one `group` have in common."""

    limit: int | None = Field(None, gt=0, description="how many of them at once")
    after: list[_Name] = Field([])


class Batch(Section):
    """A file of moves."""

    limits: Limits = Limits()
    retries: int = Field(1, ge=0, description="of a move that failed while its source runs on")
    retry_pause_s: float = Field(5, ge=0, description="before each")
    reconnect_s: float = Field(
        600, ge=0, description="for how long a source that does not answer is asked again"
    )
    move_timeout_s: float = Field(21600, gt=0, description="longest time for one attempt")
    stop_after_failures: int | None = Field(None, gt=0, description="then no other move is started")
    order: Literal["balanced", "given", "strict"] = Field(
        "balanced",
        description="balanced: hosts with the most left first; given: as they stand, but one that "
        "has to wait lets others pass; strict: none passes another",
    )
    groups: dict[str, Group] = Field({})
    moves: list[Move] = Field(min_length=1)
    nonce: str = Field("", description="made by `run`: another batch of this id has other attempts")

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary that `from_json` takes."""
        return self.model_dump(mode="json", by_alias=True, exclude_defaults=True)

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Batch:
        """The batch that `to_json` was called of."""
        return cls.model_validate(dict(told))

    @property
    def digest(self) -> str:
        """The same for the same moves, however they are written."""
        told = {name: value for name, value in self.to_json().items() if name != "nonce"}
        text = json.dumps(told, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def attempt_id(batch_id: str, name: str, number: int) -> str:
    """The migration id of attempt `number` (from 1) of a move: it is the same for every caller."""
    return hashlib.sha256(f"{batch_id}\0{name}\0{number}".encode()).hexdigest()[:16]


def load_batch(path: Path) -> Batch:
    """Read a file of moves.

    Raises:
        ConfigError: all that is wrong, a line each.
    """
    source = read_yaml(path)
    values = dict(source.values)
    defaults = values.pop("defaults", None) or {}
    validated(MoveOptions, defaults, source, ("defaults",))
    moves = values.get("moves")
    if isinstance(moves, list):
        values["moves"] = [_filled_in(move, defaults) for move in moves]
    if not moves:
        raise ConfigError(f"{path}: there are no moves")
    batch = validated(Batch, values, source, ())
    wrong = [*_wrong_moves(batch, source), *_unknown_names(batch, source)]
    # Order makes sense only between moves and groups that there are.
    wrong = wrong or list(_wrong_order(batch, source))
    if wrong:
        raise ConfigError(wrong[0], log=wrong[1:])
    return batch


def _filled_in(move: Any, defaults: Mapping[str, Any]) -> Any:
    if not isinstance(move, dict):
        return move
    filled = {**defaults, **move}
    if "target" in filled:
        filled.setdefault("name", filled["target"])
    return filled


def _host(url: str) -> str:
    destination = Destination.parse(url)
    if destination.scheme == "local":
        return "local"
    port = "" if destination.port is None else f":{destination.port}"
    return f"{destination.host}{port}"


def _wrong_moves(batch: Batch, source: Source) -> Iterable[str]:
    def at(*key: str | int) -> str:
        return f"{source.place(('moves', *key))}: moves.{'.'.join(map(str, key))}"

    seen: dict[str, int] = {}
    for number, move in enumerate(batch.moves):
        if move.name in seen:
            first = source.place(("moves", seen[move.name]))
            yield f"{at(number)}: a second move {move.name!r}; the first is at {first}"
        seen.setdefault(move.name, number)
        if move.name in batch.groups:
            yield f"{at(number, 'name')}: {move.name!r} is the name of a group"
        if move.group is not None and move.group not in batch.groups:
            yield f"{at(number, 'group')}: there is no group {move.group!r}{_known(batch.groups)}"
        if move.mode not in (None, "pre-copy") and move.restore == "full":
            yield f"{at(number, 'mode')}: there is no {move.mode} where restore is full"
        for key, url in (("from", move.from_), ("to", move.to)):
            try:
                scheme = Destination.parse(url).scheme if url else ""
            except UsageError as error:
                yield f"{at(number, key)}: {error.message}"
                continue
            if not url:
                yield f"{at(number)}: no destination: to: ssh://root@host"
            elif key == "from" and scheme not in _SOURCES:
                yield f"{at(number, key)}: {url!r}: moves start by ssh:// or local:"


def _known(names: Iterable[str]) -> str:
    return f"; there are {', '.join(sorted(names))}" if names else ""


def _wrong_order(batch: Batch, source: Source) -> Iterable[str]:
    """Circles, and one target in two moves at once."""
    before = predecessors(batch)
    circle = find_circle(before)
    if circle:
        number = next(i for i, move in enumerate(batch.moves) if move.name in circle)
        yield f"{source.place(('moves', number, 'after'))}: after goes in a circle: " + " > ".join(
            circle
        )
        return
    targets: dict[tuple[str, str, str], list[int]] = {}
    for number, move in enumerate(batch.moves):
        targets.setdefault((move.from_, move.engine, move.target), []).append(number)
    for numbers in targets.values():
        for earlier, later in itertools.pairwise(numbers):
            one, other = batch.moves[earlier].name, batch.moves[later].name
            if not (_leads(before, one, other) or _leads(before, other, one)):
                yield (
                    f"{source.place(('moves', later))}: moves.{later}: {other!r} and {one!r} move "
                    "the same target from the same host: one has to be after the other"
                )


def _unknown_names(batch: Batch, source: Source) -> Iterable[str]:
    """Names in `after` that there are not."""
    known = {move.name for move in batch.moves} | set(batch.groups)
    wanted: list[tuple[Key, list[str]]] = [
        (("moves", number, "after"), move.after) for number, move in enumerate(batch.moves)
    ]
    wanted += [(("groups", name, "after"), group.after) for name, group in batch.groups.items()]
    for key, names in wanted:
        for number, name in enumerate(names):
            if name not in known:
                where = f"{source.place((*key, number))}: {'.'.join(map(str, key))}"
                yield f"{where}: there is no move or group {name!r}"


def predecessors(batch: Batch) -> dict[str, set[str]]:
    """For each move, those that have to be done before it; groups are resolved to their moves."""
    members: dict[str, list[str]] = {name: [] for name in batch.groups}
    for move in batch.moves:
        if move.group is not None:
            members[move.group].append(move.name)
    before: dict[str, set[str]] = {}
    for move in batch.moves:
        group = batch.groups[move.group] if move.group is not None else Group()
        names = (*move.after, *group.after)
        before[move.name] = {each for name in names for each in members.get(name, [name])}
    return before


def find_circle(before: Mapping[str, set[str]]) -> list[str]:
    """A circle of moves that wait for each other, its first named again at the end; or empty."""
    done: set[str] = set()
    for start in before:
        path: list[str] = []
        stack = [(start, iter(sorted(before[start])))] if start not in done else []
        path.extend(name for name, _ in stack)
        while stack:
            name, rest = stack[-1]
            following = next((each for each in rest if each not in done), None)
            if following is None:
                done.add(name)
                stack.pop()
                path.pop()
            elif following in path:
                return [*path[path.index(following) :], following]
            else:
                stack.append((following, iter(sorted(before[following]))))
                path.append(following)
    return []


def _leads(before: Mapping[str, set[str]], one: str, other: str) -> bool:
    """Whether `one` is done before `other` begins."""
    seen, waiting = set[str](), [other]
    while waiting:
        name = waiting.pop()
        if name == one:
            return True
        if name not in seen:
            seen.add(name)
            waiting.extend(before[name])
    return False
