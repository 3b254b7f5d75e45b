"""DBOS tells by logging, with a handler of its own for stderr: here its warnings are events."""

from __future__ import annotations

import logging

from phaul_runtime.events import Listener, Warned, nobody

_LINE = 300


class _Handler(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.listener: Listener = nobody

    def emit(self, record: logging.LogRecord) -> None:
        """Tell a warning; the traceback goes to debug logs only."""
        self.listener(Warned(record.getMessage().splitlines()[0][:_LINE]))


_handler = _Handler()


def quiet(listener: Listener | None = None) -> None:
    """From now on DBOS prints nothing; what it warns of goes to `listener`, if one is given."""
    logger = logging.getLogger("dbos")
    # It adds its own handler only to a logger without any.
    if _handler not in logger.handlers:
        logger.addHandler(_handler)
        logger.propagate = False
    if listener is not None:
        _handler.listener = listener
