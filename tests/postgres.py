"""A PostgreSQL of the test's own."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

SERVER_USER = "postgres"


def programs() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if found:
        return found[-1].parent
    there = shutil.which("initdb")
    return Path(there).parent if there else None


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A cluster on a unix socket; nothing listens on the network."""
    where = programs()
    if where is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    # Its path has to fit into a socket's address.
    with tempfile.TemporaryDirectory(prefix="phaul-pg-", dir="/tmp") as text:
        directory = Path(text)
        as_user: list[str | Path] = []
        if os.geteuid() == 0:
            as_user = ["runuser", "-u", SERVER_USER, "--"]
            shutil.chown(directory, SERVER_USER)
        data = directory / "data"
        subprocess.run(
            [*as_user, where / "initdb", "-D", data, "-A", "trust", "-U", "phaul", "--no-sync"],
            check=True, capture_output=True, timeout=120, cwd="/",
        )  # fmt: skip
        settings = f"-c listen_addresses='' -k {directory} -c fsync=off"
        control = [*as_user, where / "pg_ctl", "-D", data, "-w", "-t", "60"]
        log = directory / "log"
        # Not into a pipe, which the server would hold.
        subprocess.run(
            [*control, "-l", log, "-o", settings, "start"],
            check=True, stdout=subprocess.DEVNULL, timeout=120, cwd="/",
        )  # fmt: skip
        try:
            yield f"postgresql://phaul@/postgres?host={directory}"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], check=False,
                           capture_output=True, timeout=120, cwd="/")  # fmt: skip
