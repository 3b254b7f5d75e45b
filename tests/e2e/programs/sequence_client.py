"""Writes numbers into a redis list over one connection, until SIGTERM; never connects twice.

    sequence_client.py ADDRESS STATUS

STATUS is JSON: the connection's port here, how many writes were acknowledged, the longest wait in
ms, all waits above a second in their order, and what ended it. That is "stopped" after SIGTERM, and
the number is exact then.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
from pathlib import Path

EVERY_S = 0.02
LONG_S = 1.0


def main(address: str, status: Path) -> None:
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stop.append(number))
    connection = socket.create_connection((address, 6379), timeout=60)
    port = connection.getsockname()[1]
    reader = connection.makefile("rb")
    acknowledged, worst, ended, told = 0, 0.0, "", 0.0
    long: list[int] = []
    while not ended:
        begun = time.monotonic()
        try:
            number = str(acknowledged + 1).encode()
            connection.sendall(
                b"*3\r\n$5\r\nRPUSH\r\n$3\r\nseq\r\n$%d\r\n%s\r\n" % (len(number), number)
            )
            answer = reader.readline().strip()
            if answer != b":" + number:
                ended = f"answer {answer!r} to {number!r}"
            else:
                acknowledged += 1
        except OSError as error:
            ended = repr(error)
        waited = time.monotonic() - begun
        worst = max(worst, waited)
        if waited > LONG_S:
            long.append(round(waited * 1000))
        if stop:
            ended = ended or "stopped"
        if ended or time.monotonic() - told > 0.1:
            told = time.monotonic()
            text = {
                "port": port,
                "acknowledged": acknowledged,
                "worst_ms": round(worst * 1000),
                "long_ms": long,
                "ended": ended,
            }
            part = status.with_suffix(".part")
            part.write_text(json.dumps(text))
            part.replace(status)
        time.sleep(EVERY_S)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
