"""What the shipped lifecycle hooks have in common: which step it is, and how they end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from phaul_runtime.errors import PhaulError, UsageError


def step() -> tuple[str, str]:
    """The event and this host's role in the move, as the environment tells them.

    Raises:
        UsageError: it was not started as a hook.
    """
    event, role = os.environ.get("PHAUL_EVENT", ""), os.environ.get("PHAUL_ROLE", "")
    if not (event and role):
        raise UsageError(
            "PHAUL_EVENT and PHAUL_ROLE are not set",
            hint="it is a hook of phaul-runtime: name it in the hooks: section",
        )
    return event, role


def say(text: str) -> None:
    """Tell the reader of the hook's stderr: the report of a move that it refuses."""
    sys.stderr.write(f"{text}\n")


def end(program: Callable[[], None], name: str) -> int:
    """Run a hook's program; its exit code, and on stderr why it failed."""
    try:
        program()
    except PhaulError as error:
        say(f"{name}: {error}")
        return int(error.exit_code)
    return 0
