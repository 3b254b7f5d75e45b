"""CRIU's logs of a failed move, kept where the report says."""

from __future__ import annotations

from pathlib import Path

from phaul_runtime import printable
from phaul_runtime.errors import CriuError


def keep_logs(error: BaseException, directory: Path, here: str) -> bool:
    """Write the logs that an error and its causes carry into `directory`.

    Args:
        error: as raised.
        directory: made if there is anything to keep.
        here: how this host is called in the files' names.

    Returns:
        Whether there was anything.

    Raises:
        OSError: they cannot be written.
    """
    texts: dict[str, str] = {}
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, CriuError) and cause.log_text:
            texts[f"{cause.host or here}-{cause.request or 'criu'}".lower()] = cause.log_text
        cause = cause.__cause__
    if texts:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, text in texts.items():
        (directory / f"{name}.log").write_text(printable.lines(text), encoding="utf-8")
    return bool(texts)
