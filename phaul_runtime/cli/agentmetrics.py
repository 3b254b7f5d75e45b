"""What counts an agent's migrations; an agent without metrics loads nothing of it."""

from __future__ import annotations

import dataclasses
import logging
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from phaul_runtime.errors import PhaulError
from phaul_runtime.hooks.lifecycle import Hooks

if TYPE_CHECKING:
    from phaul_runtime.config.model import Config
    from phaul_runtime.source.metrics import Metrics

log = logging.getLogger(__name__)


def agent_hooks(config: Config) -> Hooks:
    """The hooks of an agent's host, with what counts its migrations; metrics never stop an agent.

    The page over HTTP is served from a thread, which also loads what it takes: starting is quick.
    """
    hooks = config.hooks.hooks()
    settings = config.metrics
    if not (settings.textfile or settings.listen):
        return hooks
    from phaul_runtime.source import metrics  # noqa: PLC0415 - only where it is configured

    kept = metrics.Metrics(Path(settings.textfile) if settings.textfile else None)
    if settings.listen:
        threading.Thread(
            target=_serve, args=(kept, settings.listen), name="metrics", daemon=True
        ).start()
    return dataclasses.replace(hooks, observe=metrics.observe(kept, _warn))


def _serve(kept: Metrics, listen: str) -> None:
    from phaul_runtime.source import metrics  # noqa: PLC0415

    try:
        metrics.require()
        metrics.serve(kept, listen)
    except PhaulError as error:
        _warn(error.message)


def _warn(text: str) -> None:
    log.warning("%s", text)
