"""What the virtual environment of the tests knows besides what pip has installed."""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from pathlib import Path


def know_pycriu() -> None:
    """What phaul-runtime starts does not get PYTHONPATH: let the virtual environment know."""
    found = importlib.util.find_spec("pycriu")
    if found is None or not found.origin or sys.prefix == sys.base_prefix:
        return
    directory = Path(found.origin).parent.parent
    file = Path(sysconfig.get_path("purelib"), "pycriu.pth")
    named = str(directory) in os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if named and not (file.exists() and file.read_text() == f"{directory}\n"):
        new = file.with_name(f".pycriu-{os.getpid()}")
        new.write_text(f"{directory}\n")
        new.replace(file)
