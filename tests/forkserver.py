"""Programs of this project without the start of an interpreter each: forks of one that has it all.

`python forkserver.py SOCKET` imports, then forks for each `forkclient.py` that asks, until its
stdin ends.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
import traceback
from dataclasses import dataclass

_IMPORTED = (
    "dbos",
    "phaul_runtime.batch.run",
    "phaul_runtime.cli.batch_cmd",
    "phaul_runtime.cli.migrate_cmd",
    "phaul_runtime.cli.recover_cmd",
)
# Pauses that tests need not wait for: module, name, seconds.
_PACES = (("phaul_runtime.batch.flow", "_ASK_PAUSE_S", 0.2),)


@dataclass(frozen=True)
class Asked:
    """What a client wants.

    Attributes:
        files: descriptors for stdin, stdout and stderr.
        directory: where the program runs.
        program: a module or a file, and its arguments.
        environment: of the program.
    """

    files: list[int]
    directory: str
    program: list[str]
    environment: dict[str, str]


def serve(path: str) -> None:
    """Fork for whoever asks, until stdin ends; returns in each fork, ready to run its program."""
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
                asked = _take(client)
                if asked is None:
                    client.close()
                    continue
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    selector.close()
                    for channel in (client, listener, *children.values()):
                        channel.close()
                    os.close(wake_read)
                    os.close(wake_write)
                    _become(asked)
                    return
                for fd in asked.files:
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


def _take(client: socket.socket) -> Asked | None:
    client.settimeout(60)
    try:
        _, fds, _, _ = socket.recv_fds(client, 1, 3)
        with client.makefile("rb") as stream:
            size = int(stream.readline())
            data = stream.read(size)
    except (OSError, ValueError):
        return None
    if len(data) < size:
        return None  # killed
    directory, count, *rest = map(os.fsdecode, data.split(b"\0"))
    program, variables = rest[: int(count)], rest[int(count) :]
    return Asked(list(fds), directory, program, dict(each.split("=", 1) for each in variables))


def _tell(client: socket.socket, number: int) -> None:
    try:
        client.sendall(f"{number}\n".encode())
    except OSError:
        return  # killed


def _become(asked: Asked) -> None:
    for number, fd in enumerate(asked.files):
        os.dup2(fd, number)
        os.close(fd)
    os.setsid()
    os.environ.clear()
    os.environ.update(asked.environment)
    os.chdir(asked.directory)
    sys.argv = asked.program


def _run() -> None:
    """Run the program, and end as an interpreter ends, but for taking its modules apart."""
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
    serve(sys.argv[1])
    _run()
