"""Runs on a host of the laboratory: starts the real command line, stops it, breaks things.

One JSON object a line on stdin, one answer a line on stdout. The command line runs in a forked
child with everything imported, which saves the emulated host seconds each time; where a test asks
for it, the child stops at a moment of its migration until it is told to go on.

    {"do": "run", "argv": [...], "stop_at": "prepared",
     "sabotage": "acknowledge-early"}                      {"pid": 7}
    {"do": "await", "seconds": 60}                         {"stopped": true} | {"code": 0, ...}
    {"do": "go"}
    {"do": "when", "glob": "...", "bytes": 1, "then": {...}}
    {"do": "kill", "what": "cli" | "ssh" | "criu" | "runc" | "agent" | "pager" | ...,
     "seconds": 60}
    {"do": "fill" | "unfill", "directory": "..."}
    {"do": "clock", "seconds": 3600}
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from phaul_runtime import events
from phaul_runtime.cli import main as cli
from phaul_runtime.cli import migrate_cmd
from phaul_runtime.cli.views import JsonView, View
from phaul_runtime.cutover import cutover
from phaul_runtime.cutover.states import State
from phaul_runtime.errors import ChannelError
from phaul_runtime.memory import image_dirs
from phaul_runtime.rpc import client

POLL_S = 0.002
DIES_WITHIN_S = 30
FILLER = ".filler"
# As the kernel names them, in 15 characters.
BY_NAME = ("criu", "runc", "crun", "containerd-shim")
EVENTS: dict[str, Callable[[events.Event], bool]] = {
    "opened": lambda e: isinstance(e, events.IterationStarted) and e.number == 1,
    "between": lambda e: isinstance(e, events.IterationDone) and e.number == 1,
    "prepared": lambda e: isinstance(e, events.Prepared),
    "committed": lambda e: isinstance(e, events.Committed),
    # The copy runs, and some of its pages are here still.
    "serving": lambda e: isinstance(e, events.Serving) and e.missing > 0,
}


def acknowledge_early() -> None:
    """Break the order: the source is given up before the destination has prepared anything."""

    def prepare(self: cutover.CutOver, _images_dir: Path, _identity: object = None) -> int:
        self.journal.enter(State.PREPARED)
        self.journal.enter(State.COMMITTING)
        return 0

    setattr(cutover.CutOver, "prepare", prepare)  # noqa: B010


def commit_early() -> None:
    """Break the order: the destination runs while the source can still go back."""
    in_order = client.RemoteAgent.prepare

    def prepare(self: client.RemoteAgent, images_dir: Path) -> Any:
        in_order(self, images_dir)
        self.commit()
        raise ChannelError("and then the answer was lost")

    setattr(client.RemoteAgent, "prepare", prepare)  # noqa: B010


SABOTAGE = {"acknowledge-early": acknowledge_early, "commit-early": commit_early}


class Child:
    """One run of the command line."""

    def __init__(self, argv: list[str], stop_at: str, sabotage: str) -> None:
        told, self._tell = os.pipe()
        self._hear, say = os.pipe()
        self.out = f"/tmp/stagehand-{time.monotonic_ns()}"
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._tell)
            os.close(self._hear)
            try:
                SABOTAGE.get(sabotage, bool)()
                self._perform(argv, stop_at, told, say)
            finally:
                os._exit(99)
        os.close(told)
        os.close(say)

    def _perform(self, argv: list[str], stop_at: str, told: int, say: int) -> None:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        for number, name in ((1, "out"), (2, "err")):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open(f"{self.out}.{name}", flags, 0o600), number)

        def stop() -> None:
            os.write(say, b"s")
            if not os.read(told, 1):
                os._exit(98)  # the test is gone

        if stop_at in EVENTS:
            stopping = Stopping(EVENTS[stop_at], stop)
            setattr(migrate_cmd, "move_view", lambda _output: stopping)  # noqa: B010
        elif stop_at == "committing":
            commit = client.RemoteAgent.commit

            def stopped(self: client.RemoteAgent) -> cutover.Running:
                stop()
                return commit(self)

            setattr(client.RemoteAgent, "commit", stopped)  # noqa: B010
        elif stop_at == "copy":

            def half(directory: Path) -> list[Path]:
                return [Late(path, stop) if n == 3 else path
                        for n, path in enumerate(image_dirs.image_files(directory))]  # fmt: skip

            setattr(client, "image_files", half)  # noqa: B010
        sys.argv = ["phaul-runtime", *argv]
        code: Any = 1
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(code or 0))

    def wait(self, seconds: float) -> dict[str, Any]:
        """Until it stops at its moment or ends."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if select.select([self._hear], [], [], 0.01)[0] and os.read(self._hear, 1):
                return {"stopped": True}
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return {"code": os.waitstatus_to_exitcode(status), **self._said()}
        return {"late": True, **self._said()}

    def _said(self) -> dict[str, str]:
        said = {}
        for name in ("out", "err"):
            path = Path(f"{self.out}.{name}")
            said[name] = path.read_text() if path.exists() else ""
        return said

    def go(self) -> None:
        """Go on."""
        os.write(self._tell, b"g")


class Stopping(View):
    """A view that stops the migration at an event; a second time it lets it pass."""

    def __init__(self, at: Callable[[events.Event], bool], stop: Callable[[], None]) -> None:
        self._inner = JsonView()
        self._at = at
        self._stop = stop
        self._stopped = False

    def __call__(self, event: events.Event) -> None:
        self._inner(event)
        if not self._stopped and self._at(event):
            self._stopped = True
            self._stop()

    def report(self, report: Any) -> None:
        self._inner.report(report)


class Late(type(Path())):  # type: ignore[misc]
    """A path whose contents are read only once the test says so."""

    def __new__(cls, path: Path, stop: Callable[[], None]) -> Late:
        self: Late = super().__new__(cls, path)
        self.stop = stop
        return self

    def __init__(self, path: Path, stop: Callable[[], None]) -> None:
        super().__init__(*([path] if sys.version_info >= (3, 12) else []))

    def open(self, *args: Any, **kwargs: Any) -> Any:
        self.stop()
        return super().open(*args, **kwargs)


def processes() -> Iterator[tuple[int, str, str, int]]:
    """Pid, name, command line and parent of each."""
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            stat = Path("/proc", entry, "stat").read_text(errors="replace")
            line = Path("/proc", entry, "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        name = stat[stat.index("(") + 1 : stat.rindex(")")]
        yield int(entry), name, line, int(stat[stat.rindex(")") + 2 :].split()[1])


def victims(what: str, child: Child | None) -> list[int]:
    cli_pid = child.pid if child else 0
    if what == "cli":
        return [cli_pid] if cli_pid else []
    found = []
    for pid, name, line, parent in processes():
        if (
            (what in BY_NAME and name == what)
            or (what == "ssh" and name == "ssh" and parent == cli_pid)
            or (what in ("pager", "pagers") and "phaul_runtime.pager" in line)
            or (what == "agent" and "agent --sockets" in line and name.startswith("phaul"))
        ):
            found.append(pid)
    return found[:1] if what == "pager" else found


def kill(what: str, child: Child | None) -> list[int]:
    """Kill them and wait until they are dead: a process that is killed works on for a moment."""
    found = {}
    for pid in victims(what, child):
        with contextlib.suppress(ProcessLookupError):
            found[pid] = os.pidfd_open(pid)
    for fd in found.values():
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
    for fd in found.values():
        select.select([fd], [], [], DIES_WITHIN_S)
        os.close(fd)
    return list(found)


def kill_within(seconds: float, what: str, child: Child | None) -> list[int]:
    """The same, as soon as there are any: on a quick host they live for a tenth of a second."""
    deadline = time.monotonic() + seconds
    while not (killed := kill(what, child)) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return killed


def fill(directory: str) -> int:
    """Leave no byte free."""
    path = Path(directory, FILLER)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    size, step = 0, 1 << 30
    while step >= 4096:
        try:
            os.posix_fallocate(fd, size, step)
            size += step
        except OSError:
            step //= 2
    os.close(fd)
    return size


def when(order: dict[str, Any]) -> list[str]:
    """Poll until a file matches and is large enough."""
    deadline = time.monotonic() + order.get("seconds", 180)
    while time.monotonic() < deadline:
        for path in glob.glob(order["glob"]):  # noqa: PTH207 - an absolute pattern
            try:
                if os.stat(path).st_size >= order.get("bytes", 0):
                    return [path]
            except OSError:
                continue
        time.sleep(POLL_S)
    return []


def act(order: dict[str, Any], child: Child | None) -> dict[str, Any]:
    what = order["do"]
    if what == "await":
        return child.wait(order["seconds"]) if child else {"late": True}
    if what == "go":
        if child:
            child.go()
    elif what == "when":
        found = when(order)
        then = act(order["then"], child) if found and order.get("then") else {}
        return {"found": found, **then}
    elif what == "kill":
        return {"killed": kill_within(order.get("seconds", 0), order["what"], child)}
    elif what == "alive":
        return {"pids": victims(order["what"], child)}
    elif what == "fill":
        return {"bytes": fill(order["directory"])}
    elif what == "unfill":
        Path(order["directory"], FILLER).unlink(missing_ok=True)
    elif what == "clock":
        time.clock_settime(time.CLOCK_REALTIME, time.time() + order["seconds"])
    return {}


def main() -> None:
    child: Child | None = None
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "run":
            child = Child(order["argv"], order.get("stop_at", ""), order.get("sabotage", ""))
            answer: dict[str, Any] = {"pid": child.pid}
        else:
            answer = act(order, child)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
