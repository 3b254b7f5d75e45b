"""`python -m tests.fuzz`: a million mutated messages; --only NAME --case N --seed S repeats one."""

from __future__ import annotations

import argparse
import logging
import random
import sys

from tests.fuzz.run import TARGETS, main


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests.fuzz", description=__doc__)
    names = ", ".join(kind.name for kind in TARGETS)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help=names)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=2700.0, help="at most, about")
    parser.add_argument("--case", type=int, help="only this one; needs --only and --seed")
    return parser.parse_args()


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    logging.getLogger("grpc").setLevel(logging.CRITICAL)
    given = _parsed()
    sys.exit(main(given.only, given.seed, given.messages, given.seconds, given.case))
