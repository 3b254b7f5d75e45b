"""What a check finds."""

from __future__ import annotations

from dataclasses import dataclass

OK = "ok"
WARNING = "warning"
REFUSED = "refused"


@dataclass(frozen=True)
class Finding:
    """What one preflight check found; `check` is the name that `--ignore` takes."""

    check: str
    level: str
    text: str
    hint: str = ""
