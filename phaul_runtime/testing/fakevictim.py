"""The fake engine's victim, a program of its own: counts, rewrites its pages and verifies them.

    fakevictim.py DIRECTORY [IMAGE HOLD_S]

It tells of itself in DIRECTORY/status and is asked by a socket, DIRECTORY/control: a line "freeze"
stops it, and it answers with its image; then "die" ends it, and anything else, the end of the
connection too, lets it go on: a dead phaul-runtime leaves no frozen victim.

With IMAGE it is a restored copy: it says "held" on its standard output and does nothing until it
reads "run"; the end of its standard input, or HOLD_S seconds, end it.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import socket
import sys
from pathlib import Path
from typing import Any

PAGES = 64
TICK_S = 0.005
VICTIM, STATUS, CONTROL = "victim.json", "status", "control"


def content(page: int, version: int) -> str:
    """What a page holds."""
    return hashlib.sha256(f"{page} {version}".encode()).hexdigest()


def fresh() -> dict[str, Any]:
    """The memory of a new victim."""
    return {
        "counter": 0,
        "passes": 0,
        "wrong": 0,
        "versions": [0] * PAGES,
        "pages": [content(page, 0) for page in range(PAGES)],
    }


def tick(memory: dict[str, Any]) -> None:
    """Rewrite one page, verify all."""
    page = memory["counter"] % PAGES
    memory["counter"] += 1
    for number, version in enumerate(memory["versions"]):
        if memory["pages"][number] != content(number, version):
            memory["wrong"] += 1
            memory["pages"][number] = content(number, version)
    memory["versions"][page] += 1
    memory["pages"][page] = content(page, memory["versions"][page])
    memory["passes"] += 1


def put(name: str, value: Any) -> None:
    """Write a file in one step."""
    part = Path(f"{name}.part")
    part.write_text(json.dumps(value), encoding="utf-8")
    part.replace(name)


def serve(connection: socket.socket, memory: dict[str, Any]) -> None:
    """One connection to the control socket."""
    with connection, connection.makefile("rw") as lines:
        try:
            if lines.readline() != "freeze\n":
                return
            lines.write(json.dumps(memory) + "\n")
            lines.flush()
            if lines.readline() == "die\n":
                os._exit(0)
        except OSError:
            return


def run(memory: dict[str, Any]) -> None:
    """Live."""
    Path(CONTROL).unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(CONTROL)
        listener.listen()
        asked = select.poll()
        asked.register(listener, select.POLLIN)
        put(VICTIM, {"pid": os.getpid()})
        sys.stdout.write("running\n")
        sys.stdout.flush()
        while True:
            tick(memory)
            put(STATUS, {name: memory[name] for name in ("counter", "passes", "wrong")})
            if asked.poll(TICK_S * 1000):
                serve(listener.accept()[0], memory)


def main(directory: str, image: str = "", hold_s: str = "0") -> None:
    """Start anew, or from an image, held."""
    memory = json.loads(Path(image).read_text(encoding="utf-8")) if image else fresh()
    os.chdir(directory)
    if image:
        sys.stdout.write("held\n")
        sys.stdout.flush()
        verdict = select.poll()
        verdict.register(sys.stdin, select.POLLIN)
        if not verdict.poll(float(hold_s) * 1000) or sys.stdin.readline() != "run\n":
            return
    run(memory)


if __name__ == "__main__":
    main(*sys.argv[1:])
