"""`phaul-haproxy`: a lifecycle hook that takes a server out of HAProxy, and in again.

Each host names its own server. Before the freeze the source's is drained; once the destination's
copy runs its server is ready, and the source's in maintenance; after a failure it is as before.
By HAProxy's runtime API, over its stats socket, which has to be of level admin.
"""

from __future__ import annotations

import argparse
import csv
import re
import socket
import sys
import time
from collections.abc import Sequence

from phaul_hooks.program import end, say, step
from phaul_runtime.errors import MigrationFailed, UsageError

SOCKET = "/run/haproxy/admin.sock"
STATES = ("drain", "ready", "maint")
_STATE_AT = {
    ("pre_freeze", "source"): "drain",
    ("committed", "source"): "maint",
    ("on_rollback", "source"): "ready",
    ("committed", "destination"): "ready",
    ("on_rollback", "destination"): "maint",
}
# A name may not end the command and begin another.
_SERVER = re.compile(r"[A-Za-z0-9_.:-]+/[A-Za-z0-9_.:-]+")
_REPLY_LIMIT = 16 << 20
_POLL_S = 0.2


class HAProxy:
    """One HAProxy, by its stats socket.

    Args:
        address: path of a unix socket, or HOST:PORT.
        timeout_s: longest time for one command.
    """

    def __init__(self, address: str, timeout_s: float = 5.0) -> None:
        self.address = address
        self._timeout_s = timeout_s

    def command(self, line: str) -> str:
        """Send one command; returns the reply without the blank line at its end.

        Raises:
            MigrationFailed: it cannot be reached, or does not answer in time.
        """
        deadline = time.monotonic() + self._timeout_s
        said = bytearray()
        try:
            with self._connect() as channel:
                channel.sendall(line.encode() + b"\n")
                while len(said) < _REPLY_LIMIT:
                    channel.settimeout(max(0.001, deadline - time.monotonic()))
                    data = channel.recv(1 << 16)
                    if not data:
                        break
                    said += data
        except OSError as error:
            raise MigrationFailed(
                f"HAProxy at {self.address}: {error.strerror or error}",
                hint="is it the stats socket of its configuration? (--socket)",
            ) from error
        return said.decode(errors="replace").strip()

    def _connect(self) -> socket.socket:
        if "/" not in self.address:
            host, _, port = self.address.rpartition(":")
            if not (host and port.isdigit()):
                raise UsageError(f"{self.address!r} is neither a path nor HOST:PORT")
            return socket.create_connection((host.strip("[]"), int(port)), self._timeout_s)
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            channel.settimeout(self._timeout_s)
            channel.connect(self.address)
        except OSError:
            channel.close()
            raise
        return channel

    def set_state(self, server: str, state: str) -> None:
        """Bring a server to `drain`, `ready` or `maint`; idempotent.

        Raises:
            MigrationFailed: HAProxy does not do it; the message has its words.
        """
        reply = self.command(f"set server {server} state {state}")
        if reply:
            hint = "give its socket `level admin`" if "ermission" in reply else ""
            raise MigrationFailed(f"HAProxy at {self.address}: {server}: {reply}", hint=hint)

    def require(self, server: str) -> None:
        """Raise MigrationFailed if there is no such server."""
        reply = self.command(f"get weight {server}")
        if "(initial" not in reply:
            raise MigrationFailed(f"HAProxy at {self.address}: {server}: {reply}")

    def sessions(self, server: str) -> int:
        """How many sessions a server has now.

        Raises:
            MigrationFailed: the statistics have no such server.
        """
        backend, _, name = server.partition("/")
        for row in csv.DictReader(self.command("show stat").lstrip("# ").splitlines()):
            if (row.get("pxname"), row.get("svname")) == (backend, name):
                return int(row.get("scur") or 0)
        raise MigrationFailed(f"HAProxy at {self.address}: no statistics of {server}")


def wait_drained(proxies: Sequence[HAProxy], servers: Sequence[str], wait_s: float) -> int:
    """Wait until no session is left, `wait_s` seconds at the most; returns how many are."""
    deadline = time.monotonic() + wait_s
    while True:
        left = sum(proxy.sessions(server) for proxy in proxies for server in servers)
        if not left or time.monotonic() >= deadline:
            return left
        time.sleep(_POLL_S)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="phaul-haproxy",
        description="A lifecycle hook of phaul-runtime: drain this host's server of HAProxy before "
        "the freeze, and have the right one ready after the move.",
    )
    parser.add_argument("servers", nargs="+", metavar="BACKEND/SERVER", help="this host's")
    parser.add_argument(
        "--socket",
        action="append",
        metavar="PATH|HOST:PORT",
        help=f"HAProxy's stats socket; repeatable (default: {SOCKET})",
    )
    parser.add_argument(
        "--wait",
        type=float,
        default=0.0,
        metavar="S",
        help="seconds to wait for the end of sessions once it is drained (default: 0)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=5.0,
        metavar="S",
        help="longest time for one command of HAProxy (default: 5)",
    )
    parser.add_argument("--state", choices=STATES, help="set this, whatever the event is")
    return parser


def run(argv: Sequence[str]) -> None:
    """The hook.

    Raises:
        PhaulError: HAProxy does not do its part.
    """
    given = _parser().parse_args(argv)
    for server in given.servers:
        if not _SERVER.fullmatch(server):
            raise UsageError(f"{server!r} is no BACKEND/SERVER")
    proxies = [HAProxy(address, given.timeout) for address in given.socket or [SOCKET]]
    event, role = ("", "") if given.state else step()
    state = given.state or _STATE_AT.get((event, role))
    for proxy in proxies:
        for server in given.servers:
            if event == "pre_check":
                proxy.require(server)
            elif state:
                proxy.set_state(server, state)
    if state == "drain" and given.wait > 0:
        left = wait_drained(proxies, given.servers, given.wait)
        if left:
            say(f"phaul-haproxy: {left} sessions are left after {given.wait:g} s; going on")


def main() -> None:
    """Run the command and end with its exit code."""
    sys.exit(end(lambda: run(sys.argv[1:]), "phaul-haproxy"))
