"""`phaul-runtime hook install docker`: a host that can give and take docker containers.

dockerd starts a container from a checkpoint only if it is experimental, which daemon.json says and
a restart makes true. It refuses to start if its command line says so too: then the file is left.
What was changed is remembered, on the disk before it is done, so that `remove` undoes just that,
after a crash in between too. Containers that run notice nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from phaul_hooks.hostfile import write_whole
from phaul_hooks.jsontext import members, with_member, without_member
from phaul_runtime.boundedjson import read_json_file
from phaul_runtime.cutover.journal import sync_directory
from phaul_runtime.errors import Refused
from phaul_runtime.hooks.lifecycle import EVENTS
from phaul_runtime.hosthooks import HostHook, Status

DAEMON_JSON = Path("/etc/docker/daemon.json")
HOOKS = Path("/etc/phaul-runtime/hooks")
SOCKET = "unix:///var/run/docker.sock"
PID_FILE = Path("/var/run/docker.pid")
_README = Path(__file__).with_name("operators.txt")
_STATE = ".docker.json"
_KEY = "experimental"
_SCHEMA = 1
_DIRECTORY_MODE = 0o755
_ASK_S = 5.0


@dataclass
class _Changed:
    """What `install` changed, as it is remembered.

    Attributes:
        ours: daemon.json says experimental because of us.
        before: what it said; None for nothing.
        blank: all that daemon.json had where that was no object; None where there was no file.
        made: directories that were not there.
        readme: the SHA-256 of the README that was written; empty for none.
    """

    ours: bool = False
    before: bool | None = None
    created: bool = False
    blank: str | None = None
    made: list[str] = field(default_factory=list)
    readme: str = ""


@dataclass(frozen=True)
class _Daemon:
    """What a dockerd that runs says of itself."""

    experimental: bool
    live_restore: bool


class DockerHost(HostHook):
    """The host's part in moves of docker containers.

    Args:
        daemon_json: dockerd's configuration.
        hooks: the operator's directory of hooks.
        base_url: where dockerd listens.
        pid_file: dockerd's.
    """

    def __init__(
        self,
        daemon_json: Path = DAEMON_JSON,
        hooks: Path = HOOKS,
        base_url: str = SOCKET,
        pid_file: Path = PID_FILE,
    ) -> None:
        self._link = daemon_json
        # A link stays one: what it leads to is written.
        self._file = daemon_json.resolve()
        self._hooks = hooks
        self._state = hooks / _STATE
        self._readme = hooks / "README"
        self._events = [hooks / f"{event}.d" for event in EVENTS]
        self._base_url = base_url
        self._pid_file = pid_file

    def install(self) -> Sequence[str]:
        """As the interface says."""
        found = self._recall()
        changed = found or _Changed()
        text = self._read()
        now = self._experimental(text)
        flag = self._flag()
        missing = self._missing()
        edit = now is not True and not flag
        readme = _README.read_bytes()
        write_readme = self._may_write_readme(changed, readme)
        if edit:
            changed.ours, changed.before = True, now
            changed.created = text is None
            changed.blank = text if text is not None and not text.strip() else None
        # One like ours is ours: an earlier `remove` left it to the hooks beside it.
        if write_readme or _digest_of(self._readme) == _digest(readme):
            changed.readme = _digest(readme)
        changed.made += [str(path) for path in missing if str(path) not in changed.made]
        with _translated():
            if edit or write_readme or missing or found is None:
                self._make(path for path in missing if path in (*self._hooks.parents, self._hooks))
                self._remember(changed)
                self._make(path for path in missing if not path.is_dir())
            if write_readme:
                write_whole(self._readme, readme)
            if edit:
                write_whole(self._file, _experimental_true(text).encode())
        lines = [f"{path} was made" for path in missing]
        if write_readme:
            lines.append(f"{self._readme} was written")
        if edit:
            was = "was not set" if now is None else "was false"
            lines.append(f"{self._link}: {_KEY} is true now, it {was}")
        elif found is None and flag:
            lines.append(
                f"{self._link} is left as it is: dockerd was started with --experimental, and does "
                "not start if both say it"
            )
        elif found is None:
            lines.append(f"{self._link} says {_KEY} already")
        return (lines or ["is installed already"]) + self._to_do(flag=flag)

    def remove(self) -> Sequence[str]:
        """As the interface says."""
        changed = self._recall()
        if changed is None:
            return []
        lines: list[str] = []
        text = self._read() if changed.ours else None
        now = self._experimental(text)
        with _translated():
            if changed.ours and now is True and text is not None:
                lines.append(self._put_back(changed, text))
            elif changed.ours:
                lines.append(
                    f"{self._link} says {_says(now)}: it was changed since, and is left so"
                )
            lines += self._tidy(changed)
        daemon = self._ask()
        if changed.ours and daemon is not None and daemon.experimental:
            lines.append("dockerd stays experimental until it is restarted")
        return lines

    def status(self) -> Status:
        """As the interface says."""
        try:
            changed = self._recall()
            if changed is None:
                return Status(False)
            now = self._experimental(self._read())
        except Refused as error:
            return Status(self._state.exists(), (error.message,))
        lines = []
        if changed.ours and now is not True:
            lines.append(f"{self._link} was changed since: it says {_says(now)}")
        daemon = self._ask()
        if daemon is None:
            lines.append(f"no dockerd answers at {self._base_url}")
        elif not daemon.experimental:
            lines.append(
                "dockerd was not restarted since: it is not experimental yet"
                if now is True
                else "dockerd is not experimental"
            )
        return Status(True, tuple(lines))

    def _put_back(self, changed: _Changed, text: str) -> str:
        if changed.before is not None:
            write_whole(self._file, with_member(text, _KEY, changed.before).encode())
            return f"{self._link}: {_KEY} is {json.dumps(changed.before)} again"
        rest = without_member(text, _KEY)
        if members(rest):
            write_whole(self._file, rest.encode())
        elif changed.created:
            self._file.unlink()
            sync_directory(self._file.parent)
            return f"{self._link} was removed"
        else:
            blank = rest if changed.blank is None else changed.blank
            write_whole(self._file, blank.encode())
        return f"{self._link}: {_KEY} was taken out"

    def _tidy(self, changed: _Changed) -> Iterator[str]:
        """Remove the README and the directories unless an operator uses them; says what stays."""
        ours = {self._state, self._readme, *self._events}
        used = any(path not in ours for path in self._hooks.iterdir())
        used |= any(any(path.iterdir()) for path in self._events if path.is_dir())
        if not used and _digest_of(self._readme) == changed.readme:
            self._readme.unlink()
        self._state.unlink()
        sync_directory(self._hooks)
        # What is deeper was made later.
        for made in sorted(map(Path, changed.made), key=lambda path: -len(path.parts)):
            try:
                made.rmdir()
                yield f"{made} was removed"
            except FileNotFoundError:
                continue
            except OSError:
                yield f"{made} stays: it is not empty"

    def _to_do(self, *, flag: bool) -> list[str]:
        daemon = self._ask()
        if daemon is None:
            lines = [f"no dockerd answers at {self._base_url}: once started, it is experimental"]
            if not flag:
                lines.append("it must not be started with --experimental too: it refuses both")
            return lines
        if daemon.experimental:
            return []
        lines = ["to do: restart dockerd (systemctl restart docker, or as it was started)"]
        if daemon.live_restore:
            lines.append("containers go on running meanwhile: live-restore is on")
        else:
            lines.append(
                f"that ends its containers, unless {self._link} says live-restore true and dockerd "
                "was told by systemctl reload docker before"
            )
        return lines

    def _ask(self) -> _Daemon | None:
        """What dockerd says of itself; None if none answers."""
        import docker  # noqa: PLC0415 - takes its time, and most commands need it not
        from docker.errors import DockerException  # noqa: PLC0415

        try:
            client = docker.DockerClient(base_url=self._base_url, timeout=_ASK_S)
            with contextlib.closing(client):
                info = client.info()
        # What it takes from requests is an OSError.
        except (DockerException, OSError):
            return None
        return _Daemon(bool(info.get("ExperimentalBuild")), bool(info.get("LiveRestoreEnabled")))

    def _flag(self) -> bool:
        """Whether the dockerd that runs is experimental by its command line.

        Raises:
            Refused: that says something which daemon.json cannot change.
        """
        argv = self._command_line()
        other = _option(argv, "--config-file")
        if other and Path(other) != self._link:
            raise Refused(
                f"dockerd was started with --config-file {other}: it does not read {self._link}",
                hint=f'put "{_KEY}": true into {other} and restart dockerd',
            )
        said = _option(argv, "--experimental")
        if said is not None and said.lower() in ("false", "f", "0"):
            raise Refused(
                "dockerd was started with --experimental=false",
                hint="take the flag away and restart it, then try again",
            )
        return said is not None

    def _command_line(self) -> list[str]:
        """Of the dockerd that runs; empty if none does."""
        try:
            pid = int(self._pid_file.read_text())
            argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except (OSError, ValueError):
            return []
        return argv if Path(argv[0]).name == "dockerd" else []

    def _read(self) -> str | None:
        try:
            return self._file.read_bytes().decode()
        except FileNotFoundError:
            return None
        except UnicodeDecodeError as error:
            raise Refused(f"{self._link} is not UTF-8", hint="mend it, then try again") from error
        except OSError as error:
            raise Refused(f"cannot read {self._link}: {error.strerror}") from error

    def _experimental(self, text: str | None) -> bool | None:
        """What daemon.json says; None for nothing.

        Raises:
            Refused: it is not what dockerd would read.
        """
        # dockerd takes an empty file for an empty object.
        if text is None or not text.strip():
            return None
        try:
            said = {member.name: member.value for member in members(text)}.get(_KEY)
        except ValueError as error:
            raise Refused(
                f"{self._link} is malformed: {error}",
                hint="mend it (dockerd --validate), then try again",
            ) from error
        if said is not None and not isinstance(said, bool):
            raise Refused(f"{self._link}: {_KEY} is {json.dumps(said)}, neither true nor false")
        return said

    def _missing(self) -> list[Path]:
        """The directories that have to be made, the upper first."""
        wanted = [self._hooks, *self._events, self._file.parent]
        found: list[Path] = []
        for path in wanted:
            for place in (*reversed(path.parents), path):
                if place.is_dir() or place in found:
                    continue
                if os.path.lexists(place):
                    raise Refused(f"{place} is no directory", hint="move it away, then try again")
                found.append(place)
        return found

    def _make(self, directories: Iterator[Path]) -> None:
        for path in directories:
            path.mkdir()
            # Whatever the umask is: what others can write to is not run.
            path.chmod(_DIRECTORY_MODE)
            sync_directory(path.parent)

    def _may_write_readme(self, changed: _Changed, new: bytes) -> bool:
        """Whether there is none, or an older one of ours."""
        there = _digest_of(self._readme)
        return not there or (there == changed.readme and there != _digest(new))

    def _recall(self) -> _Changed | None:
        try:
            said: Any = read_json_file(self._state)
            if said.pop("schema") != _SCHEMA:
                raise ValueError("another version wrote it")
            return _Changed(**said)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise Refused(f"cannot read {self._state}: {error.strerror}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise Refused(
                f"{self._state} is malformed: {error}",
                hint=f"it says what hook install changed; once that is undone by hand, remove it: "
                f"{_KEY} in {self._link}, directories in {self._hooks}",
            ) from error

    def _remember(self, changed: _Changed) -> None:
        said = json.dumps({"schema": _SCHEMA, **asdict(changed)}, indent=2) + "\n"
        write_whole(self._state, said.encode(), mode=0o600)


def _says(experimental: bool | None) -> str:
    if experimental is None:
        return f"nothing of {_KEY}"
    return f"{_KEY}: {json.dumps(experimental)}"


def _experimental_true(text: str | None) -> str:
    if text is None or not text.strip():
        return f'{{\n  "{_KEY}": true\n}}\n'
    return with_member(text, _KEY, True)


def _option(argv: Sequence[str], name: str) -> str | None:
    """What follows an option, after a = or as the next argument; None if it is not there."""
    for index, arg in enumerate(argv):
        option, equals, value = arg.partition("=")
        if option == name:
            return value if equals else "".join(argv[index + 1 : index + 2])
    return None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest_of(path: Path) -> str:
    """Of a file; empty if there is none."""
    try:
        return _digest(path.read_bytes())
    except OSError:
        return "unreadable" if os.path.lexists(path) else ""


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Refused(
            f"cannot change {error.filename}: {error.strerror}", hint="mend it and try again"
        ) from error
