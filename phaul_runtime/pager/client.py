"""The agent's side of a pager: start it, hand over the plan, ask how far it is, wait."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phaul_runtime.errors import DestinationError, PhaulError
from phaul_runtime.pager import CONTROL_SOCKET, RESULT_FILE
from phaul_runtime.system import proc
from phaul_runtime.system.poll import readable

_AGAIN_S = 0.05
_ANSWER_S = 10.0


class PagerClient:
    """A pager in a working directory; connects when first asked, and anew when it must.

    While one is connected the pager waits for its plan and its restore; without, it ends after a
    grace time, unless a restored process needs it.

    Args:
        workdir: CRIU's work directory of the restore.
    """

    def __init__(self, workdir: Path) -> None:
        self.workdir = workdir
        self._socket: socket.socket | None = None

    @classmethod
    def start(
        cls, workdir: Path, *, timeout_s: float = 60.0, extra: Sequence[str] = ()
    ) -> PagerClient:
        """Start a pager, which is best done before the freeze; returns once it listens.

        It is no child of this process and outlives it.

        Args:
            workdir: CRIU's work directory of the restore.
            timeout_s: for the start of the interpreter, mostly.
            extra: more arguments of `python -m phaul_runtime.pager`.

        Raises:
            DestinationError: it does not start.
        """
        argv = proc.interpreter("phaul_runtime.pager", str(workdir), *extra)
        with contextlib.suppress(FileNotFoundError):
            (workdir / RESULT_FILE).unlink()
        try:
            done = proc.run(argv, timeout_s=timeout_s)
        except PhaulError as error:
            raise DestinationError(f"the pager does not start: {error.message}") from error
        if done.returncode:
            raise DestinationError(
                f"the pager does not start (code {done.returncode})",
                log=proc.last_lines(done.stderr),
            )
        client = cls(workdir)
        client.status()
        return client

    def plan(self, path: Path, *, timeout_s: float = _ANSWER_S) -> None:
        """Hand over the plan: from now on CRIU can connect. A new plan replaces the one before.

        Raises:
            DestinationError: the plan is bad, or a restore is under way, or there is no pager.
        """
        self._ask({"do": "plan", "path": str(path)}, timeout_s)

    def verify(self, pids: Mapping[int, int], *, timeout_s: float = _ANSWER_S) -> dict[str, Any]:
        """While CRIU holds the tree: see that every page of the plan can be served, or make it so.

        Args:
            pids: those of this host by those of the images.
            timeout_s: for pages, too, that have to come from the source for that.

        Returns:
            A status, and how many areas were `registered` and pages `overwritten` at last.

        Raises:
            DestinationError: it cannot be: the copy must not run with this pager.
        """
        request = {"do": "verify", "pids": {str(inner): pid for inner, pid in pids.items()}}
        deadline = time.monotonic() + timeout_s
        while True:
            answer = self._ask(request, max(_ANSWER_S, deadline - time.monotonic()))
            if answer.get("verified"):
                return answer
            if "verified" not in answer:
                raise DestinationError("the pager has ended")
            if time.monotonic() >= deadline:
                raise DestinationError(
                    f"{answer['pages_awaited']} pages that the restore has touched have not come "
                    f"within {timeout_s:g} s"
                )
            time.sleep(_AGAIN_S)

    def status(self, *, timeout_s: float = _ANSWER_S) -> dict[str, Any]:
        """How far it is (`Pager.status`); the result once it has ended.

        Raises:
            DestinationError: there is no pager, and no result.
        """
        return self._ask({"do": "status"}, timeout_s)

    def wait(self, timeout_s: float) -> dict[str, Any]:
        """Wait until the last page is in; the result.

        Raises:
            DestinationError: not within the time; or both its processes are gone without a result.
        """
        return self._ask({"do": "wait"}, timeout_s)

    def stop(self, *, timeout_s: float = _ANSWER_S) -> None:
        """End it; without a pager there is nothing to do.

        Raises:
            DestinationError: a restored process still gets its pages from it.
        """
        if (self.workdir / CONTROL_SOCKET).exists():
            self._ask({"do": "stop"}, timeout_s)
        self.close()

    def connected(self) -> bool:
        """Whether the connection stands, which it does as long as the same pager process lives."""
        if self._socket is None:
            return False
        try:
            return not readable(self._socket, within_s=0)
        except OSError:
            return False

    def close(self) -> None:
        """Disconnect; idempotent."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _ask(self, request: Mapping[str, object], timeout_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                answer = self._once(request, deadline)
            except (OSError, ValueError) as error:
                self.close()
                result = self._result()
                if result is not None:
                    return result
                gone = isinstance(error, (FileNotFoundError, ConnectionRefusedError))
                if gone or time.monotonic() >= deadline:
                    raise DestinationError(
                        f"no answer from the pager in {self.workdir}: {error}"
                    ) from error
                # One of the two was killed: the other takes over within moments.
                time.sleep(_AGAIN_S)
                continue
            if answer.get("error"):
                raise DestinationError(f"the pager says: {answer['error']}")
            return answer

    def _once(self, request: Mapping[str, object], deadline: float) -> dict[str, Any]:
        if self._socket is None:
            self._socket = self._connect()
        self._socket.settimeout(max(0.01, deadline - time.monotonic()))
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            data = self._socket.recv(1 << 16)
            if not data:
                raise ConnectionResetError("it closed the connection")
            answer += data
        parsed: dict[str, Any] = json.loads(answer)
        return parsed

    def _connect(self) -> socket.socket:
        # By way of the directory: a socket's own path may have 107 bytes only.
        place = os.open(self.workdir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(f"/proc/self/fd/{place}/{CONTROL_SOCKET}")
        except OSError:
            sock.close()
            raise
        finally:
            os.close(place)
        return sock

    def _result(self) -> dict[str, Any] | None:
        try:
            result: dict[str, Any] = json.loads((self.workdir / RESULT_FILE).read_text())
        except (OSError, ValueError):
            return None
        return result
