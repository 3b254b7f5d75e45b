"""Programs of this project without the start of an interpreter each: forks of one that has it all.

    python forkserver.py serve SOCKET                      imports, then forks for whoever asks
    python -I -S forkserver.py SOCKET MODULE ARGV...       as `python -m MODULE ARGV...`
    python -I -S forkserver.py SOCKET FILE.py ARGV...      as `python FILE.py ARGV...`

The second and third stand for the program that they ask for: environment, directory and the first
three files are handed on, SIGINT and SIGTERM too, its end is theirs, and if they are killed, so is
the program.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

TYPE_CHECKING = False  # typing takes its time to be imported, too
if TYPE_CHECKING:
    from typing import Any

_PASSED_ON = (signal.SIGINT, signal.SIGTERM)
_IMPORTED = (
    "dbos",
    "phaul_runtime.batch.run",
    "phaul_runtime.cli.batch_cmd",
    "phaul_runtime.cli.migrate_cmd",
    "phaul_runtime.cli.recover_cmd",
)
# Pauses that tests need not wait for: module, name, seconds.
_PACES = (("phaul_runtime.batch.flow", "_ASK_PAUSE_S", 0.2),)


def ask(path: str, program: list[str]) -> None:
    """Stand for a program."""
    server = socket.socket(socket.AF_UNIX)
    server.connect(path)
    socket.send_fds(server, [b"!"], [0, 1, 2])
    directory = os.getcwd()  # noqa: PTH109 - pathlib takes longer to import than all of this
    told = {"program": program, "environment": dict(os.environ), "directory": directory}
    server.sendall(json.dumps(told).encode() + b"\n")
    answers = server.makefile("rb")
    pid = int(answers.readline())
    for passed in _PASSED_ON:
        signal.signal(passed, lambda number, _: os.kill(pid, number))
    for fd in (0, 1, 2):
        os.close(fd)
    status = int(answers.readline())
    if os.WIFSIGNALED(status):
        ended_by = os.WTERMSIG(status)
        if ended_by != signal.SIGKILL:
            signal.signal(ended_by, signal.SIG_DFL)
        os.kill(os.getpid(), ended_by)
    os._exit(os.waitstatus_to_exitcode(status))


def serve(path: str) -> None:
    """Fork for whoever asks, until stdin ends; returns in each fork, ready to run its program."""
    import gc
    import importlib
    import selectors

    for name in _IMPORTED:
        importlib.import_module(name)
    for name, constant, seconds in _PACES:
        module = importlib.import_module(name)
        if not hasattr(module, constant):
            sys.exit(f"{name} has no {constant} any more")
        setattr(module, constant, seconds)
    if len(os.listdir("/proc/self/task")) > 1:
        sys.exit("an import has started threads, which a fork would not have")
    gc.freeze()  # what is shared by all forks stays so
    children: dict[int, socket.socket] = {}
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(100)
    print("serves", flush=True)
    selector = selectors.DefaultSelector()
    for fd in (0, wake_read, listener.fileno()):
        selector.register(fd, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fd == 0:
                for pid in children:
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            elif key.fd == listener.fileno():
                client, _ = listener.accept()
                taken = _take(client)
                if taken is None:
                    client.close()
                    continue
                fds, told = taken
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    selector.close()
                    for channel in (client, listener, *children.values()):
                        channel.close()
                    os.close(wake_read)
                    os.close(wake_write)
                    _become(fds, told)
                    return
                for fd in fds:
                    os.close(fd)
                children[pid] = client
                _tell(client, pid)
                selector.register(client, selectors.EVENT_READ, pid)
            elif key.data is not None:  # its client has gone
                os.kill(key.data, signal.SIGKILL)
                selector.unregister(key.fileobj)
            else:
                os.read(wake_read, 1 << 16)
        for pid in list(children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                client = children.pop(pid)
                if client in (key.fileobj for key in selector.get_map().values()):
                    selector.unregister(client)
                _tell(client, status)
                client.close()


def _take(client: socket.socket) -> tuple[list[int], dict[str, Any]] | None:
    client.settimeout(60)
    try:
        _, fds, _, _ = socket.recv_fds(client, 1, 3)
        with client.makefile("rb") as lines:
            return list(fds), json.loads(lines.readline())
    except (OSError, ValueError):
        return None


def _tell(client: socket.socket, number: int) -> None:
    try:
        client.sendall(f"{number}\n".encode())
    except OSError:
        return  # killed


def _become(fds: list[int], told: dict[str, Any]) -> None:
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    os.setsid()
    os.environ.clear()
    os.environ.update(told["environment"])
    os.chdir(str(told["directory"]))
    sys.argv = list(told["program"])


def _run() -> None:
    """Run the program, and end as an interpreter ends, but for taking its modules apart."""
    import atexit
    import runpy
    import threading
    import traceback

    code: object = 0
    try:
        if sys.argv[0].endswith(".py"):
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:  # noqa: BLE001 - as an interpreter does
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] != "serve":
        ask(sys.argv[1], sys.argv[2:])
    serve(sys.argv[2])
    _run()
