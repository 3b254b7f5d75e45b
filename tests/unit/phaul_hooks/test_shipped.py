"""The lifecycle hooks that are shipped, as an operator's configuration runs them."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import socket
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from ipaddress import ip_address
from pathlib import Path

import pytest

from phaul_hooks import announce, haproxy, webhook
from phaul_runtime.cutover.states import Role
from phaul_runtime.errors import MigrationFailed, PhaulError, UsageError
from phaul_runtime.hooks.lifecycle import EVENTS, Hooks, Move
from phaul_runtime.system import proc
from phaul_runtime.transport.handshake import Deadline
from tests.namespaces import own_network


def at(event: str, role: Role, *command: str) -> None:
    """Run a command as a hook; a failure of any event is raised."""
    Hooks({event: [list(command)]}).run(event, Move("1f1f", role, "runc", "web", "b"))


@pytest.mark.parametrize("name", ["phaul-announce", "phaul-haproxy", "phaul-webhook"])
def test_each_is_installed_and_explains_itself(name: str) -> None:
    (program,) = Hooks({"frozen": [[name, "--help"]]}).programs("frozen")
    done = proc.run(program.argv, timeout_s=60)
    assert done.returncode == 0
    assert "lifecycle hook of phaul-runtime" in done.stdout.replace("\n", " ")


# -- webhook -----------------------------------------------------------------------------------


class Receiver(HTTPServer):
    """Answers with `codes`, in turn, the last one again and again."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.codes = [204]
        self.got: list[tuple[str, dict[str, str], bytes]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/hook"


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((self.path, dict(self.headers), body))
        codes = self.server.codes
        self.send_response(codes.pop(0) if len(codes) > 1 else codes[0])
        self.send_header("Location", "/elsewhere")
        self.end_headers()
        self.wfile.write(b"some words")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    monkeypatch.setattr(webhook, "_PAUSE_S", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


TOLD = b'{"schema": 1, "id": "1f1f", "event": "committed", "role": "source"}\n'


def test_a_webhook_posts_what_it_is_told(receiver: Receiver) -> None:
    at("committed", Role.SOURCE, "phaul-webhook", receiver.url)
    ((path, headers, body),) = receiver.got
    assert path == "/hook"
    assert headers["Content-Type"] == "application/json"
    assert headers["X-Phaul-Delivery"] == "1f1f-committed-source"
    assert "X-Phaul-Signature" not in headers
    assert json.loads(body) == {
        "schema": 1, "event": "committed", "role": "source", "id": "1f1f", "engine": "runc",
        "target": "web", "peer": "b", "pid": None,
    }  # fmt: skip


@pytest.mark.parametrize("source", ["env", "file"])
def test_it_signs(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setenv("SECRET", "s3cret")
    (tmp_path / "secret").write_text("s3cret\n")
    where = (
        ["--secret-env", "SECRET"] if source == "env" else ["--secret-file", f"{tmp_path}/secret"]
    )
    webhook.run([receiver.url, *where, "--header", "X-Team: ops"], TOLD)
    ((_, headers, body),) = receiver.got
    expected = hmac.new(b"s3cret", body, hashlib.sha256).hexdigest()
    assert headers["X-Phaul-Signature"] == f"sha256={expected}"
    assert headers["X-Team"] == "ops"


@pytest.mark.parametrize("code", [500, 503, 429])
def test_it_tries_again(receiver: Receiver, code: int) -> None:
    receiver.codes = [code, code, 200]
    webhook.run([receiver.url], TOLD)
    assert len(receiver.got) == 3
    assert len({headers["X-Phaul-Delivery"] for _, headers, _ in receiver.got}) == 1


def test_but_not_for_ever(receiver: Receiver) -> None:
    receiver.codes = [503]
    with pytest.raises(MigrationFailed, match="503") as caught:
        webhook.run([receiver.url, "--retries", "1"], TOLD)
    assert caught.value.log == ("some words",)
    assert len(receiver.got) == 2


@pytest.mark.parametrize("code", [301, 307, 400, 404])
def test_what_trying_again_cannot_mend_fails_at_once(receiver: Receiver, code: int) -> None:
    receiver.codes = [code]
    with pytest.raises(MigrationFailed, match=str(code)):
        webhook.run([receiver.url], TOLD)
    assert len(receiver.got) == 1


def test_nobody_there(receiver: Receiver) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/"
        with pytest.raises(MigrationFailed, match="refused"):
            webhook.run([url, "--retries", "1"], TOLD)


def test_its_refusal_calls_a_move_off(receiver: Receiver) -> None:
    receiver.codes = [409]
    with pytest.raises(MigrationFailed, match="phaul-webhook ended with 4") as caught:
        at("pre_freeze", Role.SOURCE, "phaul-webhook", receiver.url)
    assert "409" in caught.value.log[0]
    assert "some words" in caught.value.log[1]


@pytest.mark.parametrize(
    ("argv", "body"),
    [
        (["ftp://x/"], TOLD),
        (["file:///etc/passwd"], TOLD),
        (["http://x/"], b""),
        (["http://x/"], b"[]"),
        (["http://x/", "--secret-env", "NOT_SET"], TOLD),
        (["http://x/", "--secret-file", "/none"], TOLD),
        (["http://x/", "--retries", "-1"], TOLD),
    ],
)
def test_a_webhook_that_makes_no_sense(argv: list[str], body: bytes) -> None:
    with pytest.raises(UsageError):
        webhook.run(argv, body)


# -- haproxy: its documented replies; tests/integration/test_haproxy.py has a real one ---------

STAT = "# pxname,svname,qcur,qmax,scur,smax\napp,a,0,0,{},9\napp,BACKEND,0,0,7,9\n\n"


class Stats:
    """A stats socket that answers each command with `replies`, and remembers them."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.replies: dict[str, str] = {}
        self.heard: list[str] = []
        self.sessions = [0]
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(self.path)
        self._socket.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                channel, _ = self._socket.accept()
            except OSError:
                return
            with channel:
                line = channel.makefile().readline().strip()
                self.heard.append(line)
                reply = self.replies.get(line, "\n")
                if line == "show stat":
                    left = self.sessions.pop(0) if len(self.sessions) > 1 else self.sessions[0]
                    reply = STAT.format(left)
                channel.sendall(reply.encode())

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()


@pytest.fixture
def stats(tmp_path: Path) -> Iterator[Stats]:
    found = Stats(tmp_path / "admin.sock")
    yield found
    found.close()


def test_a_server_is_brought_where_its_copy_is(stats: Stats) -> None:
    command = ["phaul-haproxy", "--socket", stats.path, "app/a"]
    stats.replies["get weight app/a"] = "1 (initial 1)\n\n"
    said = {}
    for event in EVENTS:
        for role in Role:
            stats.heard.clear()
            at(event, role, *command)
            said[event, role.value] = [line.split()[-1] for line in stats.heard]
    asked = {step: words for step, words in said.items() if words}
    assert asked == {
        ("pre_check", "source"): ["app/a"],
        ("pre_check", "destination"): ["app/a"],
        ("pre_freeze", "source"): ["drain"],
        ("committed", "source"): ["maint"],
        ("on_rollback", "source"): ["ready"],
        ("committed", "destination"): ["ready"],
        ("on_rollback", "destination"): ["maint"],
    }


def test_draining_waits_for_sessions(
    stats: Stats, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(haproxy, "_POLL_S", 0.0)
    stats.sessions = [3, 1, 0]
    haproxy.run(["--state", "drain", "--wait", "60", "--socket", stats.path, "app/a"])
    assert stats.heard == ["set server app/a state drain", *["show stat"] * 3]
    assert capsys.readouterr().err == ""
    stats.sessions = [2]
    haproxy.run(["--state", "drain", "--wait", "0.05", "--socket", stats.path, "app/a"])
    assert "2 sessions are left" in capsys.readouterr().err


def test_haproxys_words_are_in_the_error(stats: Stats) -> None:
    stats.replies["set server app/x state drain"] = "No such server.\n\n"
    stats.replies["set server app/y state drain"] = "Permission denied\n\n"
    with pytest.raises(MigrationFailed, match="app/x: No such server") as caught:
        haproxy.run(["--state", "drain", "--socket", stats.path, "app/x"])
    with pytest.raises(MigrationFailed, match="Permission denied") as caught:
        haproxy.run(["--state", "drain", "--socket", stats.path, "app/y"])
    assert "level admin" in caught.value.hint
    stats.replies["get weight app/x"] = "No such backend.\n\n"
    with pytest.raises(MigrationFailed, match="ended with 4") as failed:
        at("pre_check", Role.SOURCE, "phaul-haproxy", "--socket", stats.path, "app/x")
    assert "No such backend" in failed.value.log[0]
    with pytest.raises(MigrationFailed, match="no statistics of app/z"):
        haproxy.HAProxy(stats.path).sessions("app/z")


def test_no_haproxy(tmp_path: Path) -> None:
    with pytest.raises(MigrationFailed, match="No such file"):
        haproxy.run(["--state", "drain", "--socket", str(tmp_path / "none"), "app/a"])
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "silent"))
        silent.listen()
        command = ["--timeout", "0.1", "--socket", str(tmp_path / "silent")]
        with pytest.raises(MigrationFailed, match="timed out"):
            haproxy.run(["--state", "drain", *command, "app/a"])


@pytest.mark.parametrize(
    "argv",
    [
        ["app"],
        ["app/a; shutdown"],
        ["app/a\nset x"],
        ["--socket", "nowhere", "--state", "ready", "app/a"],
    ],
)
def test_a_haproxy_that_makes_no_sense(argv: list[str]) -> None:
    with pytest.raises(UsageError):
        haproxy.run(argv)


def test_a_hook_that_is_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PHAUL_EVENT", raising=False)
    for run, argv in ((haproxy.run, ["app/a"]), (announce.run, ["lo", "10.0.0.1"])):
        with pytest.raises(UsageError, match="PHAUL_EVENT"):
            run(argv)


# -- announce ----------------------------------------------------------------------------------

MAC = bytes.fromhex("525400000001")


def test_an_address_of_ipv4_is_announced_by_arp() -> None:
    request, reply = announce.frames(ip_address("10.0.0.5"), MAC)
    for frame, operation, target in ((request, 1, bytes(6)), (reply, 2, b"\xff" * 6)):
        assert frame[:14] == b"\xff" * 6 + MAC + b"\x08\x06"
        assert frame[14:22] == struct.pack("!HHBBH", 1, 0x800, 6, 4, operation)
        ip = socket.inet_aton("10.0.0.5")
        assert frame[22:] == MAC + ip + target + ip


def test_an_address_of_ipv6_is_advertised() -> None:
    (frame,) = announce.frames(ip_address("fd00::5"), MAC)
    assert frame[:14] == bytes.fromhex("333300000001") + MAC + b"\x86\xdd"
    head, body = frame[14:54], frame[54:]
    address, everyone = (socket.inet_pton(socket.AF_INET6, a) for a in ("fd00::5", "ff02::1"))
    assert head == struct.pack("!IHBB", 6 << 28, 32, 58, 255) + address + everyone
    assert body[:2] == bytes([136, 0])
    assert body[4:] == struct.pack("!I", 0x20000000) + address + b"\x02\x01" + MAC
    # The sum over pseudo-header and message, the checksum included, is all ones.
    total = sum(struct.unpack("!36H", address + everyone + struct.pack("!II", 32, 58) + body))
    assert (total & 0xFFFF) + (total >> 16) == 0xFFFF


@pytest.mark.skipif(os.getuid() != 0, reason="only root may send raw frames")
def test_it_announces_where_the_copy_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    # Nobody else is on this loopback.
    with own_network(), socket.socket(socket.AF_PACKET, socket.SOCK_RAW, _EVERYTHING) as heard:
        heard.bind(("lo", 0))
        for event in EVENTS:
            for role in Role:
                monkeypatch.setenv("PHAUL_EVENT", event)
                monkeypatch.setenv("PHAUL_ROLE", role.value)
                announce.run(["lo", "192.0.2.77", "--count", "1"])
                sent += [(event, role.value)] * _arps(heard, "192.0.2.77")
    assert set(sent) == {("committed", "destination"), ("on_rollback", "source")}


_EVERYTHING = socket.ntohs(3)


def _arps(heard: socket.socket, address: str) -> int:
    """How many announcements of `address` have come since the last call."""
    count = 0
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind(("lo", 0))
        end = bytes(12) + b"\x88\xb5" + os.urandom(16)  # an EtherType for experiments
        raw.send(end)
    deadline = Deadline.within(30)
    while True:
        deadline.limit(heard)  # whatever else comes
        frame = heard.recv(2000)
        if frame == end:
            return count
        count += frame[12:14] == b"\x08\x06" and socket.inet_aton(address) in frame


def test_what_cannot_be_announced() -> None:
    with pytest.raises(PhaulError, match="no-such0"):
        announce.run(["no-such0", "10.0.0.1", "--now"])
    with pytest.raises(UsageError):
        announce.run(["lo", "10.0.0.256", "--now"])
