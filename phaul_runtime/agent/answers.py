"""What is the same for each call to an agent: who may, for how long, and what an error becomes."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

import grpc

from phaul_runtime import __version__
from phaul_runtime.bounds import LONGEST_S
from phaul_runtime.errors import PhaulError, Refused
from phaul_runtime.rpc.codec import to_wire
from phaul_runtime.rpc.protocol import PROTOCOL, VERSION_KEY
from phaul_runtime.system import logs

log = logging.getLogger(__name__)

# Of one call: two deadlines of the client's at the most, and more than no deadline.
_LONGEST_CALL_S = 3 * LONGEST_S

_Reply = TypeVar("_Reply", bound=Any)


def answers(
    reply: Callable[..., _Reply],
) -> Callable[[Callable[..., _Reply | None]], Callable[..., _Reply]]:
    """Turn a handler's exceptions into its reply's `error`: an agent does not die of a request."""

    def decorate(handler: Callable[..., _Reply | None]) -> Callable[..., _Reply]:
        @functools.wraps(handler)
        def answer(*args: Any) -> _Reply:
            service, request, context = args
            service.heard = time.monotonic()
            logs.enter(getattr(request, "id", ""))
            try:
                _require_protocol(context)
                _require_deadline(context)
                with service.turnstile.passing(service.who(context).account):
                    return handler(service, request, context) or reply()
            except PhaulError as error:
                return reply(error=to_wire(error))
            except Exception as error:
                log.exception("%s failed", handler.__name__)
                return reply(error=to_wire(error))

        return answer

    return decorate


def _require_protocol(context: grpc.ServicerContext) -> None:
    """Refuse a client that speaks another version, whatever it asks for."""
    told = dict(context.invocation_metadata())
    spoken = told.get(VERSION_KEY, "none")
    if spoken != str(PROTOCOL):
        raise Refused(
            f"phaul-runtime {__version__} speaks protocol {PROTOCOL}, the client speaks {spoken!r}",
            hint="install the same version on both hosts",
        )


def _require_deadline(context: grpc.ServicerContext) -> None:
    """Refuse a call that may last for ever: it would keep its worker."""
    left = context.time_remaining()
    if left is None or left > _LONGEST_CALL_S:
        raise Refused("malformed request: a call without a deadline")
