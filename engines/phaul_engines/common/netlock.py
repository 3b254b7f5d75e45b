"""CRIU's network lock on the source host, after a move or an attempt at one.

In the host's network namespace CRIU drops the packets of each dumped TCP connection (all but its
own, which carry the mark 0xc114), and goes on to do so after a successful dump: until the address
has moved too, that keeps this host's kernel from resetting the connection. As its configuration
says (`network-lock`), it does so by a pair of iptables rules for each connection, or by a table of
nftables for each dump, `inet CRIU-ID`, with the connections in two sets. A network namespace of a
container's own is locked as a whole: by a chain CRIU of iptables, or by such a table.
"""

from __future__ import annotations

import ipaddress
import itertools
import shlex
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phaul_runtime.boundedjson import read_json
from phaul_runtime.errors import PhaulError
from phaul_runtime.system import proc

_MARK = "0xc114"
_WITHIN_S = 10.0
_JUMPS = 8
_HEAD = struct.Struct("<III")
_COMMON_MAGIC, _INVENTORY_MAGIC = 0x54564319, 0x58313116
_TABLE = "CRIU-"
# CRIU's buffer for `inet CRIU-` and the id of its run: the rest of that is cut off.
_TABLE_CHARACTERS = 31 - len("inet ")

Connection = tuple[str, int, str, int]
_Ends = frozenset[tuple[str, int]]


def table_of(images_dir: Path) -> str:
    """The name that the table of a dump has, if CRIU locks by nftables; empty if it is not known.

    Args:
        images_dir: with the complete images of that dump.
    """
    from google.protobuf.message import DecodeError  # noqa: PLC0415 - as pycriu
    from pycriu.images import inventory_pb2  # noqa: PLC0415 - pycriu may be missing: checks say so

    try:
        data = (images_dir / "inventory.img").read_bytes()
        common, magic, size = _HEAD.unpack_from(data)
        if (common, magic) != (_COMMON_MAGIC, _INVENTORY_MAGIC):
            return ""
        body = data[_HEAD.size : _HEAD.size + size]
        run = str(inventory_pb2.inventory_entry.FromString(body).dump_criu_run_id)
    except (OSError, struct.error, DecodeError, AttributeError):
        return ""
    return f"{_TABLE}{run}"[:_TABLE_CHARACTERS] if run else ""


def release_namespace(path: str) -> None:
    """Remove CRIU's lock from a network namespace: all that drops everything.

    Args:
        path: of the namespace; nothing is done without one.
    """
    if not path:
        return
    enter = ["nsenter", f"--net={path}"]
    for program in ("iptables", "ip6tables"):
        inside = [*enter, program, "-w", "5"]
        for chain in ("INPUT", "OUTPUT"):
            # One jump a lock; there may be several, left by dumps that were killed.
            for _ in range(_JUMPS):
                if _code([*inside, "-D", chain, "-j", "CRIU"]) != 0:
                    break
        _quietly([*inside, "-F", "CRIU"])
        _quietly([*inside, "-X", "CRIU"])
    for table in _tables(enter):
        _quietly([*enter, *_delete_table(table)])


def release(
    connections: Sequence[Connection], *, table: str = "", all_of_them: bool = False
) -> list[str]:
    """Remove the locks of connections within this host; returns warnings about the others.

    Args:
        connections: of the tree that has moved: local address and port, remote address and port.
        table: the dump's, as `table_of` says; empty if that is not known.
        all_of_them: the tree runs on here: nothing may drop its packets.
    """
    ours = {_ends(connection) for connection in connections}
    goes = {ends for ends in ours if all_of_them or _within_this_host(ends)}
    kept = [*_release_rules(ours, goes), *_release_tables(ours, goes, table)]
    if not kept:
        return []
    return [
        "CRIU's network lock stays until the connections' address has moved; then: "
        + " && ".join(kept)
    ]


# -- iptables ----------------------------------------------------------------------------------


def _release_rules(ours: set[_Ends], goes: set[_Ends]) -> Iterator[str]:
    """Remove rules; the commands that remove those which stay."""
    if not ours:
        return
    for program in ("iptables", "ip6tables"):
        for rule in _rules(program):
            ends = _ends_of_rule(rule)
            command = [program, "-D", *rule[1:]]
            if ends in goes:
                _quietly(command)
            elif ends in ours:
                yield shlex.join(command)


def _rules(program: str) -> Iterable[list[str]]:
    text = _quietly([f"{program}-save", "-t", "filter"])
    for line in text.splitlines():
        words = shlex.split(line)
        if words[:1] == ["-A"] and _MARK in words and words[-1] == "DROP":
            yield words


def _ends_of_rule(rule: list[str]) -> _Ends:
    values = dict(itertools.pairwise(rule))
    return frozenset(
        (values.get(address, "").partition("/")[0], int(values.get(port, 0)))
        for address, port in (("-s", "--sport"), ("-d", "--dport"))
    )


# -- nftables ----------------------------------------------------------------------------------


@dataclass
class _Table:
    """A table of CRIU's: the sets with their elements."""

    name: str
    sets: list[tuple[str, list[Any]]] = field(default_factory=list)


def _release_tables(ours: set[_Ends], goes: set[_Ends], known: str) -> Iterator[str]:
    """Remove elements, and tables that have none then; the commands that remove what stays."""
    for name in _tables([]):
        table = _read(name)
        drops = [
            (of_set, element, frozenset((tuple(element[:2]), tuple(element[2:]))))
            for of_set, elements in table.sets
            for element in elements
        ]
        if name != known and not any(ends in ours for _, _, ends in drops):
            continue  # another dump's
        left = [(of_set, element) for of_set, element, ends in drops if ends not in goes]
        if not left:
            _quietly(_delete_table(name))
            continue
        for of_set, element, ends in drops:
            if ends in goes:
                one = f"{{ {' . '.join(map(str, element))} }}"
                _quietly(["nft", "delete", "element", "inet", name, of_set, one])
        yield shlex.join(_delete_table(name))


def _tables(enter: Sequence[str]) -> list[str]:
    """The names of CRIU's tables in a network namespace."""
    found = _json([*enter, "nft", "-j", "list", "tables", "inet"])
    names = [str(entry["table"]["name"]) for entry in found if "table" in entry]
    return [name for name in names if name.startswith(_TABLE)]


def _read(name: str) -> _Table:
    table = _Table(name)
    for entry in _json(["nft", "-j", "list", "table", "inet", name]):
        if "set" in entry:
            elements = [element["concat"] for element in entry["set"].get("elem", [])]
            table.sets.append((str(entry["set"]["name"]), elements))
    return table


def _delete_table(name: str) -> list[str]:
    return ["nft", "delete", "table", "inet", name]


def _json(argv: list[str]) -> list[dict[str, Any]]:
    """What nft lists; empty on a host without it."""
    try:
        found: list[dict[str, Any]] = read_json(_quietly(argv) or "{}").get("nftables", [])
    except ValueError:
        return []
    return found


# -- both --------------------------------------------------------------------------------------


def _ends(connection: Connection) -> _Ends:
    return frozenset((connection[:2], connection[2:]))


def _within_this_host(ends: _Ends) -> bool:
    return all(ipaddress.ip_address(address).is_loopback for address, _ in ends)


def _quietly(argv: list[str]) -> str:
    try:
        return proc.run(argv, timeout_s=_WITHIN_S).stdout
    except PhaulError:
        return ""  # a host without the program has no such locks


def _code(argv: list[str]) -> int:
    try:
        return proc.run(argv, timeout_s=_WITHIN_S).returncode
    except PhaulError:
        return 1
