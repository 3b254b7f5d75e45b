"""What an agent says on pager.socket: a line of JSON each way.

::

    {"do": "plan", "path": "..."}   take a plan, listen for CRIU
    {"do": "verify", "pids": {}}    in the hold: see that every page can be served (`verify`);
                                    the pids of this host by those of the images
    {"do": "status"}                how far it is
    {"do": "wait"}                  answered when the last page is in
    {"do": "stop"}                  end, unless a restored process needs it

An answer has `error`, or what `Pager.status` says. That to `verify` has `verified` too: ask again
until it is true; `pages_awaited` of the source keep it from being so, or there is more to do.
A connection that ends without an answer was cut by the death of one of the two processes: connect
again and ask again, all requests may be repeated.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from typing import Any, Protocol

from phaul_runtime.boundedjson import read_json
from phaul_runtime.errors import PhaulError
from phaul_runtime.pager import CONTROL_SOCKET
from phaul_runtime.pager.criu_socket import accept, listen
from phaul_runtime.pager.poller import Poller
from phaul_runtime.pager.verify import Verified

# Twenty bytes for each process of a tree.
_MOST = 1 << 22
_READ = 1 << 16
_RESULT = 8 << 10
# What comes of a line that is something else than a request, and of one that cannot be met.
_NO_REQUEST = (
    PhaulError, OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
)  # fmt: skip


class Asked(Protocol):
    """What the requests are about: `loop.Pager`."""

    def plan(self, path: str) -> str:
        """Take a plan; what is wrong with it, or nothing."""

    def verify(self, pids: Mapping[int, int]) -> Verified:
        """See that all that is planned can be served."""

    def stop(self) -> str:
        """End; why not, or nothing."""

    def status(self) -> dict[str, object]:
        """How far it is."""


class Control:
    """The listening socket and the connected clients."""

    name = CONTROL_SOCKET

    def __init__(self, pager: Asked, poller: Poller) -> None:
        self._pager = pager
        self._poller = poller
        self.listener = listen(CONTROL_SOCKET)
        self._clients: dict[int, bytearray] = {}
        self._waiting: set[int] = set()

    @property
    def owned(self) -> bool:
        """Somebody is connected."""
        return bool(self._clients)

    def forget(self) -> set[int]:
        """After a change of process nothing is known of who is connected; returns what is."""
        self._clients.clear()
        self._waiting.clear()
        return {self.listener}

    def accept(self, fd: int) -> None:
        """Take one more client."""
        client = accept(fd)
        if client >= 0:
            self._clients[client] = bytearray()
            self._poller.watch(client, self._hear)

    def reserve_result(self, name: str) -> None:
        """Have room for the result while there is some: the images may fill the file system."""
        with contextlib.suppress(OSError):
            fd = os.open(f"{name}.new", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, _RESULT)
            finally:
                os.close(fd)

    def leave_result(self, name: str, result: str) -> None:
        """Write the result, all of it or none."""
        data = result.encode() + b"\n"
        with contextlib.suppress(OSError):
            fd = os.open(f"{name}.new", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if os.pwrite(fd, data, 0) != len(data):
                    return
                os.ftruncate(fd, len(data))
            finally:
                os.close(fd)
            os.replace(f"{name}.new", name)  # noqa: PTH105 - relative to the current directory

    def tell_waiting(self, result: str) -> None:
        """Answer those who wait for the last page."""
        answer = json.loads(result) if result else self._pager.status()
        for client in self._waiting:
            self._send(client, answer)

    def _hear(self, fd: int) -> None:
        kept = self._clients[fd]
        try:
            data = os.read(fd, _READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        kept += data
        if not data or len(kept) > _MOST:
            del self._clients[fd]
            self._waiting.discard(fd)
            self._poller.close(fd)
            return
        *lines, rest = kept.split(b"\n")
        self._clients[fd] = bytearray(rest)
        for line in lines:
            answer = self._answer(fd, bytes(line))
            if answer is not None:
                self._send(fd, answer)

    def _answer(self, fd: int, line: bytes) -> dict[str, Any] | None:
        try:
            asked = read_json(line)
            what = asked["do"]
            if what == "wait":
                self._waiting.add(fd)
                return None
            error = ""
            if what == "verify":
                return self._verify(asked["pids"])
            if what == "plan":
                error = self._pager.plan(str(asked["path"]))
            elif what == "stop":
                error = self._pager.stop()
            elif what != "status":
                error = f"unknown request {what!r}"
        except _NO_REQUEST as failure:
            error = str(failure)
        return {"error": error} if error else self._pager.status()

    def _verify(self, pids: Mapping[str, Any]) -> dict[str, Any]:
        found = self._pager.verify({int(inner): int(pid) for inner, pid in pids.items()})
        return {
            **self._pager.status(),
            "verified": not found.pending,
            "pages_awaited": len(found.wants),
            "registered": found.registered,
            "overwritten": found.overwritten,
        }

    def _send(self, fd: int, answer: dict[str, Any]) -> None:
        # One that does not read its answers loses them.
        with contextlib.suppress(OSError):
            os.write(fd, json.dumps(answer).encode() + b"\n")
