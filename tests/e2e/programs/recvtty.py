"""Takes a container's terminal at a console socket and counts what it says.

recvtty.py SOCKET OUT
"""

from __future__ import annotations

import os
import socket
import sys


def main(path: str, out: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        connection, _ = listener.accept()
        _, fds, _, _ = socket.recv_fds(connection, 4096, 1)
    with open(out, "wb", buffering=0) as log:  # noqa: PTH123
        while data := os.read(fds[0], 4096):
            log.write(data)


if __name__ == "__main__":
    main(*sys.argv[1:])
