"""Bounds on what the other side says: no number and no text of a peer is taken as it comes."""

from __future__ import annotations

from phaul_runtime.errors import DestinationError

# What a client may ask to be waited for, seconds: for a silent client, and for anything else.
LONGEST_LOST_S = 3600.0
LONGEST_S = 86400.0


def bounded(name: str, value: float, least: float, most: float) -> float:
    """A number that the other side says.

    Raises:
        DestinationError: it is none from `least` to `most`.
    """
    if not least <= value <= most:  # no NaN is either
        raise DestinationError(
            f"malformed request: {name} is {value:g}, not from {least:g} to {most:g}"
        )
    return value


def plain_text(name: str, value: str, most: int = 4096) -> str:
    """A text that the other side says and that gets into logs, hooks and names.

    Raises:
        DestinationError: it is too long, or has what cannot be printed.
    """
    if len(value) > most or not value.isprintable():
        raise DestinationError(f"malformed request: {name} is {value[:80]!a}")
    return value
