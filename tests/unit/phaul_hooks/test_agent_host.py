"""`hook install agent`: the unit, its configuration, and what is left alone."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from phaul_hooks import agent_host
from phaul_hooks.agent_host import UNIT, AgentHost
from phaul_runtime.agent.service import _SETTLE_S, Service, notify
from phaul_runtime.config import model as config_module
from phaul_runtime.config.model import AgentConfig, load_config
from phaul_runtime.errors import Refused
from phaul_runtime.hosthooks import host_hook_names, load_host_hook


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "systemd").mkdir()
    monkeypatch.setattr(agent_host, "SYSTEMD", tmp_path / "systemd" / "system")
    monkeypatch.setattr(agent_host, "CONFIG", tmp_path / "phaul-runtime" / "agent.yaml")
    monkeypatch.setattr(config_module, "SYSTEM_CONFIG", tmp_path / "none.yaml")
    return tmp_path


def test_it_is_found_and_is_installed_once(host: Path) -> None:
    assert "agent" in host_hook_names()
    hook = load_host_hook("agent")
    assert not hook.status().installed
    assert any("systemctl enable --now" in line for line in hook.install())
    assert hook.install() == []
    assert hook.status().installed
    assert any("not enabled" in line for line in hook.status().lines)
    unit = (host / "systemd/system" / UNIT).read_text()
    assert "@" not in unit
    assert "\nKillMode=process\n" in unit
    assert "\nType=notify\n" in unit
    hook.remove()
    assert not hook.status().installed
    assert hook.remove() == []
    assert not list(host.rglob("*.*"))


def test_its_configuration_is_what_the_command_reads(host: Path) -> None:
    AgentHost().install()
    found = load_config(agent_host.CONFIG)
    assert found.agent == AgentConfig(listen="tls://0.0.0.0:7007")
    # It loads that file, and nobody else does.
    assert (
        f"--config {Path('/etc/phaul-runtime/agent.yaml')}"
        in (host / "systemd/system" / UNIT).read_text()
    )
    with pytest.raises(Refused, match=r"ca\.pem"):
        Service(found.agent, host / "w", host / "s", None, None)  # type: ignore[arg-type]


def test_what_an_operator_changed_stays(host: Path) -> None:
    AgentHost().install()
    agent_host.CONFIG.write_text("agent: {listen: 'tls://10.0.0.1:7007'}\n")
    AgentHost().remove()
    assert "10.0.0.1" in agent_host.CONFIG.read_text()
    AgentHost().install()
    assert "10.0.0.1" in agent_host.CONFIG.read_text()
    unit = host / "systemd/system" / UNIT
    unit.write_text("[Service]\nExecStart=/bin/true\n")
    with pytest.raises(Refused, match="made by somebody else"):
        AgentHost().install()
    assert AgentHost().remove() == []
    assert not AgentHost().status().installed
    assert unit.exists()


def test_an_older_unit_is_renewed_and_an_enabled_one_not_removed(host: Path) -> None:
    AgentHost().install()
    unit = host / "systemd/system" / UNIT
    unit.write_text(unit.read_text() + "# older\n")
    assert any("another version" in line for line in AgentHost().status().lines)
    assert any("renewed" in line for line in AgentHost().install())
    wants = unit.parent / "multi-user.target.wants"
    wants.mkdir()
    (wants / UNIT).symlink_to(unit)
    assert AgentHost().status().lines == []
    with pytest.raises(Refused, match="is enabled"):
        AgentHost().remove()
    assert unit.exists()


def test_without_systemd_nothing_is_made(host: Path) -> None:
    (host / "systemd").rmdir()
    with pytest.raises(Refused, match="no systemd"):
        AgentHost().install()
    assert list(host.iterdir()) == []


def test_systemd_understands_the_unit(host: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here")
    AgentHost().install()
    unit = host / "systemd/system" / UNIT
    text = unit.read_text()
    program = text.partition("ExecStart=")[2].split()[0]
    unit.write_text(text.replace(program, "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{unit.parent}:"}, check=False,
    )  # fmt: skip
    # Of other units of this machine it may have much to say.
    assert UNIT not in done.stderr, done.stderr
    # It is given longer than it takes.
    assert int(text.partition("TimeoutStopSec=")[2].split()[0]) > _SETTLE_S + 10


def test_systemd_is_told(host: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(host / "n"))
        told.settimeout(10)
        notify("READY=1", {"NOTIFY_SOCKET": str(host / "n")})
        assert told.recv(100) == b"READY=1"
    notify("READY=1", {"NOTIFY_SOCKET": str(host / "gone")})
    notify("READY=1", {})
