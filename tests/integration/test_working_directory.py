"""Root works in a directory that others write to: what they left there is not run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from phaul_runtime.batch.model import Move
from phaul_runtime.batch.remote_move import MoveRunner
from phaul_runtime.config.model import load_config
from phaul_runtime.pager.client import PagerClient
from phaul_runtime.system.cancel import Cancellation

NOBODY = 65534
# What anything of ours imports, and what any interpreter does.
PLANTED = ("grpc", "json", "socket", "phaul_runtime", "phaul_engines", "sitecustomize", "pycriu")
_PLANT = 'cd "$1"; code=$2; shift 2; for module; do echo "$code" >"$module.py"; done'


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that everybody may write to, with modules of an ordinary user in it."""
    directory = Path(tempfile.mkdtemp(prefix="phaul-cwd-", dir="/var/tmp"))
    try:
        directory.chmod(0o1777)
        code = f'import os; os.close(os.open("{directory}/ran-" + __name__, os.O_CREAT))'
        argv = ["sh", "-euc", _PLANT, "sh", str(directory), code, *PLANTED]
        if os.geteuid() == 0:
            ids = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
            argv = ["setpriv", *ids, "--", *argv]
        subprocess.run(argv, check=True, timeout=60)
        yield directory
    finally:
        shutil.rmtree(directory)


def _ran(place: Path) -> list[str]:
    return sorted(path.name for path in place.glob("ran-*"))


@pytest.fixture
def config() -> Iterator[str]:
    """In a short directory, for the path of a socket."""
    with tempfile.TemporaryDirectory(prefix="phaul-", dir="/var/tmp") as root:
        file = Path(root, "config.yaml")
        file.write_text(f"workdir: {root}/work\nstate_dir: {root}/state\n")
        yield str(file)


def test_of_check_and_the_agent_that_it_starts(place: Path, config: str) -> None:
    program = Path(sys.executable).with_name("phaul-runtime")
    done = subprocess.run(
        [program, "check", "--config", config, "--to", "local:"],
        cwd=place, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert _ran(place) == []
    # It has come as far as the agent's answer.
    assert "local" in done.stdout, done
    assert "no agent" not in done.stderr, done


def test_of_a_pager(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("PYTHONPATH", str(place))
    client = PagerClient.start(tmp_path)
    client.stop()
    assert _ran(place) == []


def test_of_a_batch(place: Path, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("PYTHONPATH", str(place))
    move = Move(name="m", target="1", to="local:", config=config)
    told: list[object] = []
    answer = MoveRunner(load_config()).check(move, told.append, Cancellation(), 120)
    assert _ran(place) == []
    # It was ours that answered.
    assert answer.code is not None, answer
    assert told or answer.report, answer
