"""What CRIU does to the connections of a dumped tree on the source host, undone.

In the host's network namespace CRIU drops the packets of each dumped TCP connection by a pair of
iptables rules (all but its own, which carry the mark 0xc114), and leaves them after a successful
dump: until the address has moved too, they keep this host's kernel from resetting the connection.
During a dump the sockets are in repair mode, in which nothing is sent; a CRIU that is killed leaves
them there.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import itertools
import os
import shlex
import socket
from collections.abc import Iterable, Iterator, Sequence

from phaul_runtime import proc
from phaul_runtime.errors import PhaulError

_MARK = "0xc114"
_WITHIN_S = 10.0
_SYS_PIDFD_GETFD = 438  # the same on every architecture
_TCP_REPAIR = 19  # linux/tcp.h

Connection = tuple[str, int, str, int]


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


def leave_repair(pids: Iterable[int]) -> None:
    """Take the TCP sockets of these processes, which run on here, out of repair mode."""
    for pid in pids:
        try:
            handle = os.pidfd_open(pid)
        except OSError:
            continue
        try:
            for number in _sockets(pid):
                _leave_repair(handle, number)
        finally:
            os.close(handle)


def _sockets(pid: int) -> Iterator[int]:
    home = f"/proc/{pid}/fd"
    try:
        for name in os.listdir(home):
            if os.readlink(f"{home}/{name}").startswith("socket:"):
                yield int(name)
    except OSError:
        return  # it ended meanwhile


def _leave_repair(handle: int, number: int) -> None:
    # The C library has no wrapper for it yet.
    fd = ctypes.CDLL(None, use_errno=True).syscall(_SYS_PIDFD_GETFD, handle, number, 0)
    if fd < 0:
        return
    with socket.socket(fileno=fd) as found, contextlib.suppress(OSError):
        # Raises for what is no TCP socket.
        if found.getsockopt(socket.IPPROTO_TCP, _TCP_REPAIR):
            found.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 0)


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
