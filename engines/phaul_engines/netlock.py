"""CRIU's network lock on the source host, after a move or an attempt at one.

In the host's network namespace CRIU drops the packets of each dumped TCP connection by a pair of
iptables rules (all but its own, which carry the mark 0xc114), and leaves them after a successful
dump: until the address has moved too, they keep this host's kernel from resetting the connection.
"""

from __future__ import annotations

import ipaddress
import itertools
import shlex
from collections.abc import Iterable, Sequence

from phaul_runtime import proc
from phaul_runtime.errors import PhaulError

_MARK = "0xc114"
_WITHIN_S = 10.0
_JUMPS = 8

Connection = tuple[str, int, str, int]


def release_namespace(path: str) -> None:
    """Remove CRIU's lock from a network namespace: a chain of its own, which drops everything.

    Args:
        path: of the namespace; nothing is done without one.
    """
    if not path:
        return
    for program in ("iptables", "ip6tables"):
        inside = ["nsenter", f"--net={path}", program, "-w", "5"]
        for chain in ("INPUT", "OUTPUT"):
            # One jump a lock; there may be several, left by dumps that were killed.
            for _ in range(_JUMPS):
                if _code([*inside, "-D", chain, "-j", "CRIU"]) != 0:
                    break
        _quietly([*inside, "-F", "CRIU"])
        _quietly([*inside, "-X", "CRIU"])


def release(connections: Sequence[Connection], *, all_of_them: bool = False) -> list[str]:
    """Remove the rules of connections within this host; returns warnings about the others.

    Args:
        connections: of the tree that has moved: local address and port, remote address and port.
        all_of_them: the tree runs on here: nothing may drop its packets.
    """
    if not connections:
        return []
    ports = {(local, remote) for _, local, _, remote in connections}
    inside = {(c[1], c[3]) for c in connections if ipaddress.ip_address(c[0]).is_loopback}
    kept = []
    for program in ("iptables", "ip6tables"):
        for rule in _rules(program):
            pair = _ports(rule)
            either = {pair, pair[::-1]}
            if not either & ports:
                continue
            command = [program, "-D", *rule[1:]]
            if all_of_them or either & inside:
                _quietly(command)
            else:
                kept.append(shlex.join(command))
    if not kept:
        return []
    return [
        "CRIU's network lock stays until the connections' address has moved; then: "
        + " && ".join(kept)
    ]


def _rules(program: str) -> Iterable[list[str]]:
    text = _quietly([f"{program}-save", "-t", "filter"])
    for line in text.splitlines():
        words = shlex.split(line)
        if words[:1] == ["-A"] and _MARK in words and words[-1] == "DROP":
            yield words


def _ports(rule: list[str]) -> tuple[int, int]:
    values = dict(itertools.pairwise(rule))
    return int(values.get("--sport", 0)), int(values.get("--dport", 0))


def _quietly(argv: list[str]) -> str:
    try:
        return proc.run(argv, timeout_s=_WITHIN_S).stdout
    except PhaulError:
        return ""  # a host without iptables has no such rules


def _code(argv: list[str]) -> int:
    try:
        return proc.run(argv, timeout_s=_WITHIN_S).returncode
    except PhaulError:
        return 1
