"""`phaul-haproxy` against a real HAProxy."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from phaul_hooks.haproxy import HAProxy, run

from phaul_runtime.cutover.states import Role
from phaul_runtime.errors import MigrationFailed
from phaul_runtime.hooks.lifecycle import Hooks, Move

pytestmark = pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed")

CONFIG = """
global
  stats socket {dir}/admin.sock level admin
  stats socket {dir}/user.sock level user
defaults
  mode tcp
  timeout connect 1s
  timeout client 10s
  timeout server 10s
backend app
  server a 127.0.0.1:1
  server b 127.0.0.1:1 disabled
"""


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[HAProxy]:
    (tmp_path / "haproxy.cfg").write_text(CONFIG.format(dir=tmp_path))
    argv = ["haproxy", "-q", "-f", str(tmp_path / "haproxy.cfg"), "-db"]
    with subprocess.Popen(argv) as process:
        try:
            deadline = time.monotonic() + 60
            while not (tmp_path / "user.sock").exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            yield HAProxy(str(tmp_path / "admin.sock"))
        finally:
            process.terminate()


def states(proxy: HAProxy) -> list[str]:
    rows = [line.split(",") for line in proxy.command("show stat").splitlines()]
    column = rows[0].index("status")
    return [row[column].split()[0] for row in rows if row[0] == "app" and row[1] in "ab"]


def test_a_move_from_a_to_b_and_one_that_fails(proxy: HAProxy) -> None:
    def at(event: str, role: Role) -> list[str]:
        server = "app/a" if role is Role.SOURCE else "app/b"
        command = ["phaul-haproxy", "--socket", proxy.address, "--wait", "5", server]
        Hooks({event: [command]}).run(event, Move("1f", role, "runc", "web", "b"))
        return states(proxy)

    before = ["no", "MAINT"]  # "no check": it is up
    assert states(proxy) == before
    assert at("pre_check", Role.SOURCE) == at("pre_check", Role.DESTINATION) == before
    assert at("pre_freeze", Role.SOURCE) == ["DRAIN", "MAINT"]
    assert at("on_rollback", Role.SOURCE) == before
    assert at("on_rollback", Role.DESTINATION) == before
    assert at("pre_freeze", Role.SOURCE) == ["DRAIN", "MAINT"]
    assert at("committed", Role.DESTINATION) == ["DRAIN", "no"]
    assert at("committed", Role.SOURCE) == ["MAINT", "no"]
    assert at("committed", Role.SOURCE) == ["MAINT", "no"]


@pytest.mark.parametrize(
    ("server", "socket", "says"),
    [
        ("app/c", "admin", "No such server"),
        ("other/a", "admin", "No such backend"),
        ("app/a", "user", "Permission denied"),
    ],
)
def test_what_it_refuses(proxy: HAProxy, server: str, socket: str, says: str) -> None:
    address = proxy.address.replace("admin", socket)
    with pytest.raises(MigrationFailed, match=says):
        run(["--state", "drain", "--socket", address, server])
    assert states(proxy) == ["no", "MAINT"]


def test_a_server_that_it_does_not_have_is_seen_before_the_move(proxy: HAProxy) -> None:
    proxy.require("app/b")
    for server in ("app/c", "other/a"):
        with pytest.raises(MigrationFailed, match="No such"):
            proxy.require(server)
