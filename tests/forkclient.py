"""Stands for a program that a `forkserver.py` runs, as its user would have started it.

    python -I -S forkclient.py SOCKET MODULE ARGV...       as `python -m MODULE ARGV...`
    python -I -S forkclient.py SOCKET FILE.py ARGV...      as `python FILE.py ARGV...`

Environment, directory and the first three files are handed on, SIGINT and SIGTERM too, its end is
theirs, and if it is killed, so is the program. Only what every interpreter has in it is imported:
with json, socket and signal it would take three times as long.
"""

import _signal  # type: ignore[import-not-found]
import _socket
import os
import sys


def ask(path: str, program: list[str]) -> None:
    """Run a program there; does not return."""
    server = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    server.connect(path)
    files = b"".join(number.to_bytes(4, sys.byteorder) for number in (0, 1, 2))
    server.sendmsg([b"!"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, files)])
    environment = [b"%b=%b" % pair for pair in os.environb.items()]
    argv = [b"%d" % len(program), *map(os.fsencode, program)]
    told = [os.fsencode(os.getcwd()), *argv, *environment]  # noqa: PTH109 - pathlib is slow
    data = b"\0".join(told)
    server.sendall(b"%d\n%b" % (len(data), data))
    pid = _number(server)
    for passed in (_signal.SIGINT, _signal.SIGTERM):
        _signal.signal(passed, lambda number, _: os.kill(pid, number))
    for fd in (0, 1, 2):
        os.close(fd)
    status = _number(server)
    if os.WIFSIGNALED(status):
        ended_by = os.WTERMSIG(status)
        if ended_by != _signal.SIGKILL:
            _signal.signal(ended_by, _signal.SIG_DFL)
        os.kill(os.getpid(), ended_by)
    os._exit(os.waitstatus_to_exitcode(status))


def _number(server: _socket.socket) -> int:
    """The next line."""
    line = b""
    while not line.endswith(b"\n"):
        byte = server.recv(1)
        if not byte:
            os._exit(70)
        line += byte
    return int(line)


if __name__ == "__main__":
    ask(sys.argv[1], sys.argv[2:])
