"""Opening a transport: whatever fails, nothing is left for `recover`."""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from phaul_runtime.agent.server import Agent
from phaul_runtime.config.model import Config
from phaul_runtime.errors import Cancelled, DestinationUnreachable, PhaulError, Refused
from phaul_runtime.system.cancel import Cancellation
from phaul_runtime.testing.bench import NoCriu
from phaul_runtime.transport import Destination, agent_process, load_transport, service_channel
from tests.processes import open_descriptors

TOKEN = "0123456789abcdef"


def config_of(tmp_path: Path, **transport: Any) -> Config:
    return Config.model_validate(
        {
            "workdir": str(tmp_path / "work"),
            "state_dir": str(tmp_path / "state"),
            "transport": {"connect_timeout_s": 20, "insecure": True, **transport},
        }
    )


def fails(url: str, config: Config, kind: type[PhaulError] = DestinationUnreachable) -> PhaulError:
    """Open a transport, which fails; nothing stays in the working directory, nothing open."""
    destination = Destination.parse(url)
    transport = load_transport(destination)
    before = open_descriptors()
    with pytest.raises(kind) as caught:
        transport.open(destination, config, Cancellation(), TOKEN)
    workdir = Path(config.workdir)
    assert not workdir.exists() or list(workdir.iterdir()) == []
    deadline = time.monotonic() + 20
    # The thread that reads stderr closes its end when it sees the other end closed.
    while open_descriptors() - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert open_descriptors() - before == set()
    return caught.value


def program(tmp_path: Path, text: str, mode: int = 0o755) -> list[str]:
    path = tmp_path / "program"
    path.write_text(text)
    path.chmod(mode)
    return [str(path)]


def test_no_ssh_on_this_host(tmp_path: Path) -> None:
    error = fails("ssh://b", config_of(tmp_path, ssh_command=["no-such-ssh"]), Refused)
    assert "no-such-ssh" in error.message


def test_an_ssh_that_cannot_be_run(tmp_path: Path) -> None:
    command = program(tmp_path, "#!/bin/sh\n", 0o644)
    fails("ssh://b", config_of(tmp_path, ssh_command=command), Refused)


def test_an_ssh_that_says_why_it_fails(tmp_path: Path) -> None:
    command = program(tmp_path, "#!/bin/sh\necho no route to there >&2; exit 255\n")
    error = fails("ssh://b", config_of(tmp_path, ssh_command=command))
    assert error.message == "no route to there"


def test_an_agent_that_does_not_answer(tmp_path: Path) -> None:
    command = program(tmp_path, "#!/bin/sh\nread end\n")
    fails("ssh://b", config_of(tmp_path, ssh_command=command, connect_timeout_s=0.1))


def test_a_cancelled_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = program(tmp_path, "#!/bin/sh\nread end\n")
    monkeypatch.setattr(Cancellation, "check", _cancelled)
    fails("ssh://b", config_of(tmp_path, ssh_command=command), Cancelled)


def _cancelled(_: object) -> None:
    raise Cancelled("by the test")


@pytest.mark.parametrize("url", ["ssh://b", "tcp://127.0.0.1"])
def test_a_directory_that_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    def locks_nothing(_: Path) -> int:
        raise OSError(28, "No space left on device")

    for module in (agent_process, service_channel):
        monkeypatch.setattr(module, "lock_directory", locks_nothing)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(service_channel, "greet", lambda *_: None)
        port = server.getsockname()[1] if url.startswith("tcp") else 22
        fails(f"{url}:{port}", config_of(tmp_path), Refused)


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "work").write_text("")
    config = config_of(tmp_path)
    with pytest.raises(Refused, match="Not a directory"):
        load_transport(Destination.parse("ssh://b")).open(
            Destination.parse("ssh://b"), config, Cancellation(), TOKEN
        )


def test_a_directory_of_somebody_else_stays(tmp_path: Path) -> None:
    theirs = tmp_path / "work" / f"ssh-{TOKEN}"
    theirs.mkdir(parents=True)
    destination = Destination.parse("ssh://b")
    with pytest.raises(Refused, match="File exists"):
        load_transport(destination).open(destination, config_of(tmp_path), Cancellation(), TOKEN)
    assert theirs.is_dir()


def test_no_agent_on_the_port(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        fails(f"tcp://127.0.0.1:{taken.getsockname()[1]}", config_of(tmp_path))


def test_a_socket_s_path_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unix socket's path has 107 bytes at most."""
    far = tmp_path / ("d" * 100)
    far.mkdir()
    fails("local:", config_of(far))
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(service_channel, "greet", lambda *_: None)
        port = server.getsockname()[1]
        fails(f"tcp://127.0.0.1:{port}", config_of(far), Refused)


def test_a_local_agent_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has made the directory by then, and cannot remove it."""
    made = tmp_path / "work" / f"agent-{TOKEN}"
    text = f"#!/bin/sh\nmkdir -p {made}; kill -KILL $$\n"
    monkeypatch.setattr(sys, "executable", program(tmp_path, text)[0])
    fails("local:", config_of(tmp_path))


def test_an_agent_that_cannot_listen_leaves_no_directory(tmp_path: Path) -> None:
    long = tmp_path / ("d" * 100) / "agent"
    agent = Agent(long, tmp_path / "work", tmp_path / "state", NoCriu())
    with pytest.raises(Refused, match="AF_UNIX path too long"):
        agent.start()
    assert not long.exists()
    agent.stop()
