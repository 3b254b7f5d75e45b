"""A third party's transport: that of docs/transports.md, installed as a package beside this one."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from importlib import metadata
from pathlib import Path

import pytest

from phaul_runtime.agent.server import Agent
from phaul_runtime.config.model import Config, TransportConfig
from phaul_runtime.criu.session import Criu
from phaul_runtime.errors import DestinationUnreachable
from phaul_runtime.source.session import Session
from phaul_runtime.system.cancel import Cancellation
from phaul_runtime.transport import Destination
from tests.integration.serving import ID, exactly, open_migration, wait

DOCS = Path(__file__).resolve().parents[2] / "docs" / "transports.md"


@pytest.fixture
def installed(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The example as `pip install` would leave it."""
    site = root / "site"
    info = site / "my_transport-1.dist-info"
    info.mkdir(parents=True)
    text = DOCS.read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    named = re.search(r"```ini\n\[options.entry_points\]\n(.*?) =\n    (.*?)\n```", text, re.DOTALL)
    assert code is not None
    assert named is not None
    (site / "my_transport.py").write_text(code[1])
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-transport\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{named[1]}]\n{named[2]}\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(sys.modules, "my_transport", raising=False)
    assert "dir" in metadata.entry_points(group="phaul_runtime.transports").names
    return site


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_it_reaches_an_agent(root: Path, installed: Path, compression: str) -> None:
    workdir = root / "w"
    agent = Agent(workdir / "hand", workdir, root / "s", Criu("no-such-criu"))
    agent.start()
    config = Config(
        workdir=str(workdir),
        transport=TransportConfig.model_validate({"compression": compression}),
    )
    destination = Destination.parse("dir://hand")
    try:
        with Session(config, destination, ID, Cancellation(), lambda *_: None) as session:
            session.agent.hello()
            open_migration(session.agent)
            ours = session.open_memory()
            migration = agent.service.find(ID)
            wait(lambda: migration.memory.socket)
            assert migration.memory.socket is not None
            thread = threading.Thread(target=ours.sendall, args=(b"page" * (1 << 20),))
            thread.start()
            assert exactly(migration.memory.socket, 4 << 20) == b"page" * (1 << 20)
            thread.join()
            assert session.agent.abort()
            assert (session.link_bytes is None) == (compression == "none")
    finally:
        agent.stop()
    with (
        pytest.raises(DestinationUnreachable, match="no agent has its sockets there"),
        Session(config, destination, ID, Cancellation(), lambda *_: None),
    ):
        pass


def test_the_command_knows_it(root: Path, installed: Path) -> None:
    file = root / "config.yaml"
    file.write_text("transport: {to: 'dir://hand'}\n")
    for path, code in (([str(installed)], 0), ([], 2)):
        script = (
            f"import sys; sys.path[:0] = {path}; from phaul_runtime.cli.main import main; main()"
        )
        argv = [sys.executable, "-c", script, "config", "check", str(file)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == code, done.stderr
    assert "unknown transport 'dir'" in done.stderr
