"""What a client asks for and sends, held against what it may."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from phaul_runtime.boundedjson import read_json
from phaul_runtime.bounds import LONGEST_LOST_S, LONGEST_S, bounded, plain_text
from phaul_runtime.criu.page_format import OTHER_RECEIVER, PageFormat, unknown_format
from phaul_runtime.cutover.journal import checked_id
from phaul_runtime.engine.interface import Engine
from phaul_runtime.errors import DestinationError
from phaul_runtime.rpc import phaul_pb2 as pb

_IMAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.(img|json)")


def checked_json(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object sent by the other side.

    Raises:
        DestinationError: it is none.
    """
    try:
        value = read_json(data or b"{}")
    except ValueError as error:
        raise DestinationError(f"malformed {what}: {error}") from error
    if not isinstance(value, dict):
        raise DestinationError(f"malformed {what}")
    return value


def facts_of(request: pb.OpenRequest, engine: Engine) -> dict[str, Any]:
    """What an Open asks for, as the journal keeps it; without its manifest.

    Raises:
        PhaulError: the request is malformed.
    """
    checked_id(request.id)
    options = checked_json(request.options, "options")
    engine.options_model.model_validate(options)
    restore = "lazy" if request.post_copy else request.restore or "auto"
    if restore not in ("auto", "lazy", "full"):
        raise DestinationError(f"malformed request: restore {restore[:40]!a}")
    return {
        "engine": request.engine,
        "target": plain_text("target", request.target),
        "peer": plain_text("source", request.source),
        "lost_s": bounded("lost_s", request.lost_s, 0.1, LONGEST_LOST_S),
        # Two deadlines of the client's, and more than none.
        "hold_s": bounded("commit_s", request.commit_s, 0.1, 2 * LONGEST_S),
        "options": options,
        "log_level": min(4, request.criu_log_level),
        "restore": restore,
        "post_copy": request.post_copy,
        "page_server": _page_server(request),
        "page_format": request.page_format,
    }


def _page_server(request: pb.OpenRequest) -> str:
    """Who receives pages: `criu`, or `phaul` unless it is said."""
    asked = request.page_server or "phaul"
    if asked not in ("phaul", "criu"):
        raise DestinationError(f"malformed request: page_server {asked[:40]!r}")
    if asked == "phaul" and PageFormat.of_number(request.page_format) is None:
        raise DestinationError(unknown_format("at the source"), hint=OTHER_RECEIVER)
    return asked


def write_images(images_dir: Path, parts: Iterable[pb.ImagePart]) -> None:
    """Write images by name into `images_dir`, mode 0600; names that lead elsewhere are refused."""
    for part in parts:
        if not _IMAGE_NAME.fullmatch(part.name):
            raise DestinationError(f"malformed image name {part.name[:80]!r}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        flags |= os.O_APPEND if part.more else os.O_TRUNC
        try:
            with os.fdopen(os.open(images_dir / part.name, flags, 0o600), "wb") as file:
                file.write(part.data)
        except OSError as error:
            raise DestinationError(f"cannot write {part.name}: {error.strerror}") from error
