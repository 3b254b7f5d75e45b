"""What is fuzzed: the shape that all of it has."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.mutation import Random


class Uncaught(Exception):
    """Something was answered, or left, that must not be."""


class Target:
    """One kind of input.

    Attributes:
        name: as `--only` knows it.
        share: of all messages, relative to the others' shares.

    Args:
        root: a directory of its own.
    """

    name = ""
    share = 1

    def __init__(self, root: Path) -> None:
        self.root = root

    def case(self, rng: Random) -> tuple[int, bool]:
        """Try one input that follows from `rng` alone.

        Returns:
            How many messages it was, and whether it was taken (or refused).

        Raises:
            Exception: a finding.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Give back what it has."""
