"""Writes numbers into a redis list over one connection for ever; never connects twice.

    sequence_client.py ADDRESS STATUS

STATUS is JSON: how many were acknowledged, the longest wait in ms, and what ended it.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from pathlib import Path

EVERY_S = 0.02


def main(address: str, status: Path) -> None:
    connection = socket.create_connection((address, 6379), timeout=60)
    reader = connection.makefile("rb")
    acknowledged, worst, ended, told = 0, 0.0, "", 0.0
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
        worst = max(worst, time.monotonic() - begun)
        if ended or time.monotonic() - told > 0.1:
            told = time.monotonic()
            text = {"acknowledged": acknowledged, "worst_ms": round(worst * 1000), "ended": ended}
            part = status.with_suffix(".part")
            part.write_text(json.dumps(text))
            part.replace(status)
        time.sleep(EVERY_S)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
