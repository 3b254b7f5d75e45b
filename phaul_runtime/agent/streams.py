"""Streams of requests: one from which nothing comes does not keep the thread that reads it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import grpc

from phaul_runtime.errors import DestinationError

_Part = TypeVar("_Part")


class _Moving(Generic[_Part]):
    """The parts of one stream, and since when the next is waited for."""

    def __init__(self, parts: Iterator[_Part], context: grpc.ServicerContext) -> None:
        self._parts = parts
        self._context: Any = context
        self.waits_since: float | None = None
        self._silent_s = 0.0

    def __iter__(self) -> Iterator[_Part]:
        return self

    def __next__(self) -> _Part:
        self.waits_since = time.monotonic()
        try:
            return next(self._parts)
        except grpc.RpcError as error:
            reason = f"nothing came for {self._silent_s:.0f} s" if self._silent_s else "it broke"
            raise DestinationError(f"a stream has ended too early: {reason}") from error
        finally:
            self.waits_since = None

    def end_if_silent(self, silent_s: float) -> None:
        since = self.waits_since
        if since is not None and time.monotonic() - since > silent_s:
            self._silent_s = silent_s
            self._context.cancel()


class Streams:
    """All that are under way.

    Args:
        silent_s: from one part to the next, at the most.
    """

    def __init__(self, silent_s: float) -> None:
        self.silent_s = silent_s
        self._moving: set[_Moving[Any]] = set()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def moving(
        self, parts: Iterator[_Part], context: grpc.ServicerContext
    ) -> Iterator[Iterator[_Part]]:
        """The same parts; a DestinationError where the client has left, or says nothing more."""
        stream = _Moving(parts, context)
        with self._lock:
            self._moving.add(stream)
        try:
            yield stream
        finally:
            with self._lock:
                self._moving.discard(stream)

    def end_silent(self) -> None:
        """End those from which nothing comes; to be called now and then."""
        with self._lock:
            moving = tuple(self._moving)
        for stream in moving:
            stream.end_if_silent(self.silent_s)
