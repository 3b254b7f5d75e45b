"""Statistics that CRIU leaves in its images."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError

from phaul_runtime.errors import MigrationFailed

# criu/include/magic.h: IMG_SERVICE_MAGIC, STATS_MAGIC; then the size of one protobuf message.
_HEAD = struct.Struct("<III")
_SERVICE_MAGIC = 0x55105940
_STATS_MAGIC = 0x57093306


@dataclass(frozen=True)
class DumpStats:
    """What a dump or a pre-dump measured; times in seconds.

    `frozen_s` is how long the tree stood still, `memdump_s` the collecting of pages in it,
    `memwrite_s` their writing (for a pre-dump after the tree runs again).
    """

    pages_scanned: int = 0
    pages_written: int = 0
    pages_skipped: int = 0
    freezing_s: float = 0.0
    frozen_s: float = 0.0
    memdump_s: float = 0.0
    memwrite_s: float = 0.0


def read_dump_stats(images_dir: str | Path) -> DumpStats:
    """Read `stats-dump` of an images directory.

    Raises:
        MigrationFailed: the file is missing or is no statistics image.
    """
    from pycriu.images import stats_pb2  # noqa: PLC0415 - pycriu may be missing: checks say so

    path = Path(images_dir) / "stats-dump"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise MigrationFailed(f"CRIU left no statistics: {path}: {error.strerror}") from error
    if len(data) < _HEAD.size:
        raise MigrationFailed(f"{path} is cut short")
    service, magic, size = _HEAD.unpack_from(data)
    body = data[_HEAD.size : _HEAD.size + size]
    if (service, magic) != (_SERVICE_MAGIC, _STATS_MAGIC) or len(body) != size:
        raise MigrationFailed(f"{path} is not a statistics image of CRIU")
    try:
        dump = stats_pb2.stats_entry.FromString(body).dump
    except DecodeError as error:
        raise MigrationFailed(f"{path} is malformed: {error}") from error
    return DumpStats(
        pages_scanned=dump.pages_scanned,
        pages_written=dump.pages_written,
        pages_skipped=dump.pages_skipped_parent,
        freezing_s=dump.freezing_time / 1e6,
        frozen_s=dump.frozen_time / 1e6,
        memdump_s=dump.memdump_time / 1e6,
        memwrite_s=dump.memwrite_time / 1e6,
    )
