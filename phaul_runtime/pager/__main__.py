"""`python -m phaul_runtime.pager WORKDIR`: returns once it listens, and works on by itself."""

from __future__ import annotations

import argparse
import os
import sys

from phaul_runtime.pager.loop import GRACE_S, Pager


def main() -> None:
    """Start a pager in its working directory and leave it behind."""
    parser = argparse.ArgumentParser(prog="phaul_runtime.pager", description=__doc__)
    parser.add_argument("workdir")
    parser.add_argument("--grace", type=float, default=GRACE_S, help="seconds without an owner")
    parser.add_argument("--no-twin", action="store_true", help="for tests: one process only")
    parser.add_argument("--pause", type=int, default=0, help="milliseconds between two pieces")
    options = parser.parse_args()
    try:
        os.chdir(options.workdir)
        pager = Pager(grace_s=options.grace, keep=not options.no_twin, pause_ms=options.pause)
        if os.fork():
            os._exit(0)
    except OSError as error:
        sys.exit(f"the pager cannot start in {options.workdir}: {error}")
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    pager.run()


if __name__ == "__main__":
    main()
