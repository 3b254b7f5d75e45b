"""`hook install docker`: what it changes on a host, and that `remove` undoes that and no more."""

from __future__ import annotations

import contextlib
import json
import os
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from phaul_hooks import docker_host as module
from phaul_hooks.docker_host import DockerHost
from phaul_hooks.hostfile import write_whole
from phaul_hooks.jsontext import members, with_member, without_member
from phaul_runtime.errors import Refused

EVENTS = (
    "pre_check", "pre_freeze", "frozen", "post_restore", "committed", "on_rollback", "on_failure",
)  # fmt: skip


class Host:
    """A host's files, below a directory; no dockerd unless one is started."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.json = root / "docker" / "daemon.json"
        self.hooks = root / "phaul" / "hooks"
        self.socket = root / "s"
        self.pid_file = root / "docker.pid"

    @property
    def hook(self) -> DockerHost:
        return DockerHost(self.json, self.hooks, f"unix://{self.socket}", self.pid_file)

    def install(self) -> str:
        return "\n".join(self.hook.install())

    def remove(self) -> str:
        return "\n".join(self.hook.remove())

    def has(self, text: str) -> None:
        self.json.parent.mkdir(exist_ok=True)
        self.json.write_bytes(text.encode())

    def files(self) -> dict[str, bytes | None]:
        """All that there is, with its contents."""
        return {
            str(path.relative_to(self.root)): None if path.is_dir() else path.read_bytes()
            for path in self.root.rglob("*")
        }


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@contextlib.contextmanager
def dockerd(host: Host, **info: Any) -> Iterator[None]:
    """Something that answers as dockerd does when it is asked for its version and what it is."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            version = {"ApiVersion": "1.45", "MinAPIVersion": "1.24"}
            said = json.dumps(info if self.path.endswith("/info") else version).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def address_string(self) -> str:
            return ""

        def log_message(self, *_: object) -> None:
            pass

    with socketserver.ThreadingUnixStreamServer(str(host.socket), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
            host.socket.unlink()


@contextlib.contextmanager
def started_as(host: Host, *argv: str) -> Iterator[None]:
    """A process called dockerd with that command line, and its pid file."""
    process = subprocess.Popen(
        ["dockerd", "-c", "echo; read x", "sh", *argv], executable="/bin/sh",
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()  # it is what it says from here on
    host.pid_file.write_text(f"{process.pid}\n")
    try:
        yield
    finally:
        process.communicate()


def test_a_bare_host_is_made_ready_and_left_as_it_was(host: Host) -> None:
    said = host.install()
    assert host.json.read_text() == '{\n  "experimental": true\n}\n'
    assert "experimental is true now, it was not set" in said
    for event in EVENTS:
        info = (host.hooks / f"{event}.d").stat()
        assert (info.st_mode & 0o7777, info.st_uid) == (0o755, os.getuid())
    readme = (host.hooks / "README").read_text()
    for word in (*EVENTS, "PHAUL_EVENT", "stdin", "exit code", "timeout_s", "TARGET EVENT ROLE"):
        assert word in readme
    assert (host.hooks / ".docker.json").stat().st_mode & 0o777 == 0o600
    assert host.hook.status().installed
    assert "daemon.json was removed" in host.remove()
    assert host.files() == {}
    assert not host.hook.status().installed


def test_whatever_the_umask_is(host: Host) -> None:
    before = os.umask(0o002)
    try:
        host.install()
    finally:
        os.umask(before)
    assert (host.hooks / "committed.d").stat().st_mode & 0o7777 == 0o755
    assert host.hooks.parent.stat().st_mode & 0o7777 == 0o755


KEPT = [
    '{\n  "dns": ["10.0.0.1", "10.0.0.2"],\n  "a": {"b": 1}\n}\n',
    '{\n\t"z": 1,\n\t"a": [\n1, 2]\n}',
    '{"z":1,"a":2}',
    '{"z": 1}',
    '{ "z": "}" }\n',
    "{}",
    "{\n}\n",
    "",
    "\n",
    '{\r\n    "z": "\\u00e9, \\"q\\": {"\r\n}\r\n',
    '{\n  "experimental": false,\n  "z": 1\n}\n',
    '{"a": {"experimental": false}, "experimental" :false}',
    '{"z": 1, "experimental": true}\n',
    '{\n    "experimental": true\n}',
]


@pytest.mark.parametrize("text", KEPT)
def test_a_daemon_json_is_kept_byte_for_byte(host: Host, text: str) -> None:
    host.has(text)
    before = host.files()
    host.install()
    said = json.loads(host.json.read_text())
    assert said["experimental"] is True
    was = json.loads(text) if text.strip() else {}
    assert {**said, "experimental": 0} == {**was, "experimental": 0}
    assert list(was) == [name for name in said if name in was]
    once = host.files()
    assert host.install().startswith("is installed already")
    assert host.files() == once
    host.remove()
    assert host.files() == before
    assert host.remove() == ""


def test_a_new_member_looks_as_the_others() -> None:
    for text, looks in (
        ('{\n    "a": 1\n}', '{\n    "a": 1,\n    "experimental": true\n}'),
        ('{"a": 1}', '{"a": 1, "experimental": true}'),
        ("{}", '{"experimental": true}'),
        ("{\n}", '{\n  "experimental": true\n}'),
        ('{\n\t"a": 1,\n\t"b": 2\n}', '{\n\t"a": 1,\n\t"b": 2,\n\t"experimental": true\n}'),
    ):
        assert with_member(text, "experimental", True) == looks
        assert without_member(looks, "experimental") == text
    assert [each.value for each in members('{"a": [1, {}], "b": "}"}')] == [[1, {}], "}"]
    assert without_member('{"a": 1, "b": 2}', "a") == '{"b": 2}'


def test_mode_owner_and_a_link_are_kept(host: Host, tmp_path: Path) -> None:
    host.has("{}")
    real = tmp_path / "managed.json"
    host.json.rename(real)
    host.json.symlink_to(real)
    real.chmod(0o640)
    if os.getuid() == 0:
        os.chown(real, 0, 65534)
    was = real.stat()
    host.install()
    assert host.json.is_symlink()
    assert json.loads(real.read_text()) == {"experimental": True}
    now = real.stat()
    assert (now.st_mode, now.st_uid, now.st_gid) == (was.st_mode, was.st_uid, was.st_gid)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1,}', "malformed: "),
        ("[]", "malformed: it is no object"),
        ("{} {}", "malformed: Extra data"),
        ('{"experimental": true, "experimental": false}', "experimental is there twice"),
        ('{"experimental": "yes"}', 'experimental is "yes", neither true nor false'),
    ],
)
def test_what_dockerd_would_not_read_is_refused_and_nothing_touched(
    host: Host, text: str, says: str
) -> None:
    host.has(text)
    before = host.files()
    with pytest.raises(Refused, match=r"daemon\.json") as caught:
        host.hook.install()
    assert says in caught.value.message
    assert host.files() == before


def test_it_is_refused_at_removal_too(host: Host) -> None:
    host.install()
    host.has("{")
    before = host.files()
    with pytest.raises(Refused, match="malformed"):
        host.hook.remove()
    assert host.files() == before
    status = host.hook.status()
    assert status.installed
    assert "malformed" in status.lines[0]
    host.json.write_bytes(b"\xff")
    with pytest.raises(Refused, match="not UTF-8"):
        host.hook.remove()


def test_what_was_changed_since_is_left(host: Host) -> None:
    host.has('{"z": 1}')
    host.install()
    host.has('{"z": 1, "experimental": false}')
    assert (
        "daemon.json was changed since: it says experimental: false" in host.hook.status().lines[0]
    )
    assert "says experimental: false: it was changed since, and is left so" in host.remove()
    assert host.json.read_text() == '{"z": 1, "experimental": false}'


def test_what_was_added_since_is_kept(host: Host) -> None:
    host.install()
    host.has('{"experimental": true, "dns": ["10.0.0.1"]}')
    host.remove()
    assert host.json.read_text() == '{"dns": ["10.0.0.1"]}'


def test_installed_again_after_a_change_it_is_put_back_to_that(host: Host) -> None:
    host.has('{"z": 1}')
    host.install()
    host.has('{"z": 1, "experimental": false}')
    assert "it was false" in host.install()
    assert json.loads(host.json.read_text())["experimental"] is True
    host.remove()
    assert host.json.read_text() == '{"z": 1, "experimental": false}'


def test_an_operators_hooks_and_directories_stay(host: Host) -> None:
    own = host.hooks / "committed.d"
    own.mkdir(parents=True)
    host.install()
    script = host.hooks / "pre_freeze.d" / "10-mine"
    script.write_text("")
    said = host.remove()
    assert "pre_freeze.d stays: it is not empty" in said
    assert script.exists()
    assert own.is_dir()  # it was there before
    assert (host.hooks / "README").exists()
    assert not (host.hooks / "on_rollback.d").exists()
    assert not (host.hooks / ".docker.json").exists()
    script.unlink()
    host.install()
    host.remove()
    assert not (host.hooks / "README").exists()


def test_a_readme_of_the_operators_stays_and_an_old_one_is_renewed(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.install()
    newer = tmp_path / "newer.txt"
    newer.write_text("newer")
    with monkeypatch.context() as patch:
        patch.setattr(module, "_README", newer)
        assert "README was written" in host.install()
    readme = host.hooks / "README"
    assert readme.read_text() == "newer"
    readme.unlink()
    assert "README was written" in host.install()
    readme.write_text("mine")
    host.install()
    host.remove()
    assert readme.read_text() == "mine"


def test_something_in_the_place_of_a_directory_is_refused(host: Host) -> None:
    host.hooks.mkdir(parents=True)
    (host.hooks / "committed.d").write_text("")
    before = host.files()
    with pytest.raises(Refused, match=r"committed.d is no directory"):
        host.hook.install()
    assert host.files() == before


def test_a_state_file_that_is_broken_is_refused(host: Host) -> None:
    host.install()
    for text in ("{", "[]", '{"schema": 2}', '{"schema": 1, "colour": "red"}', "{}"):
        (host.hooks / ".docker.json").write_text(text)
        for call in (host.hook.install, host.hook.remove):
            with pytest.raises(Refused, match=r"\.docker\.json is malformed"):
                call()
        assert host.hook.status().installed


@pytest.mark.parametrize("step", range(3))
def test_an_interruption_leaves_whole_files_and_is_made_good(
    host: Host, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Ctrl-C before each of the three files is in its place."""
    host.has('{"z": 1}')
    before = host.files()
    replaced = 0
    real = Path.replace

    def replace(path: Path, to: Path) -> Path:
        nonlocal replaced
        replaced += 1
        if replaced > step:
            raise KeyboardInterrupt
        return real(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            host.hook.install()
    assert host.json.read_text() == '{"z": 1}'
    assert not [name for name in host.files() if "phaul-new" in name]
    if step:
        # It is known what was made already.
        host.remove()
        assert host.files() == before
    host.install()
    assert json.loads(host.json.read_text()) == {"z": 1, "experimental": True}
    host.remove()
    assert host.json.read_text() == '{"z": 1}'


def test_what_a_killed_predecessor_left_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / ".f.phaul-new").write_text("half")
    write_whole(tmp_path / "f", b"whole", mode=0o600)
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o600


def test_a_file_system_that_refuses_is_named(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(path: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(Refused, match=r"cannot change .*: Permission denied"):
        host.hook.install()


def test_a_daemon_that_runs_has_to_be_restarted(host: Host) -> None:
    with dockerd(host, ExperimentalBuild=False, LiveRestoreEnabled=False):
        said = host.install()
        assert "systemctl restart docker" in said
        assert "that ends its containers" in said
        assert "not restarted since" in "".join(host.hook.status().lines)
    with dockerd(host, ExperimentalBuild=False, LiveRestoreEnabled=True):
        assert "live-restore is on" in host.install()
    with dockerd(host, ExperimentalBuild=True):
        assert host.hook.status().lines == ()
        assert host.install() == "is installed already"
        assert "until it is restarted" in host.remove()


def test_no_daemon_is_no_hindrance(host: Host) -> None:
    assert "no dockerd answers at unix://" in host.install()
    assert host.hook.status().lines == (f"no dockerd answers at unix://{host.socket}",)
    host.socket.write_text("not a socket")
    assert host.hook.status().installed


def test_a_daemon_that_has_the_flag_keeps_it(host: Host) -> None:
    """dockerd does not start when an option is both on its command line and in its file."""
    host.has('{"z": 1}')
    for argv in (["--experimental", "-H", "fd://"], ["--experimental=true"]):
        with started_as(host, *argv), dockerd(host, ExperimentalBuild=True):
            assert "is left as it is" in host.install()
            assert host.hook.status().lines == ()
            host.remove()
        assert host.json.read_text() == '{"z": 1}'
    with started_as(host, "-H", "fd://"):
        host.install()
    assert json.loads(host.json.read_text())["experimental"] is True
    host.remove()
    before = {**host.files(), "docker.pid": b""}
    for argv, says in (
        (["--experimental=false"], "was started with --experimental=false"),
        (["--config-file", "/srv/d.json"], "with --config-file /srv/d.json"),
        (["--config-file=/srv/d.json"], "with --config-file /srv/d.json"),
    ):
        with started_as(host, *argv), pytest.raises(Refused, match=says):
            host.hook.install()
    assert {**host.files(), "docker.pid": b""} == before
