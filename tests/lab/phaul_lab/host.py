"""A host of a laboratory, whatever it is made of: how it is entered, and its state on disk."""

from __future__ import annotations

import abc
import json
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from phaul_lab.image import Image, ssh_key
from phaul_lab.shell import LabError, run

ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2", "c": "10.77.0.3"}
START_S = 30
_SSH_OPTIONS = {
    "StrictHostKeyChecking": "no",
    "UserKnownHostsFile": "/dev/null",
    "LogLevel": "ERROR",
    "BatchMode": "yes",
    "ConnectTimeout": "60",
    "ServerAliveInterval": "30",
}
_KEPT_OPEN = {"ControlMaster": "auto", "ControlPersist": "600"}


class Host(abc.ABC):
    """A host of one laboratory, its state in `directory`."""

    kind: ClassVar[str]

    def __init__(self, name: str, directory: Path, image: Image) -> None:
        self.name = name
        self.dir = directory
        self.image = image

    @property
    def state(self) -> dict[str, Any]:
        """What was written down when it was started; empty if it was not."""
        try:
            state: dict[str, Any] = json.loads((self.dir / "state.json").read_text())
        except (OSError, ValueError):
            return {}
        return state

    @property
    @abc.abstractmethod
    def pid(self) -> int | None:
        """The pid by which this machine knows it; None if it does not run."""

    @abc.abstractmethod
    def wait_up(self) -> None:
        """Wait until its sshd answers."""

    @abc.abstractmethod
    def stop(self) -> None:
        """End it and forget its disk; idempotent."""

    @abc.abstractmethod
    def set_cable(self, up: bool) -> None:
        """Plug or unplug the cable to the other hosts."""

    @abc.abstractmethod
    def way_in(self) -> Mapping[str, str]:
        """What of ssh's configuration leads to its sshd."""

    @abc.abstractmethod
    def log(self) -> str:
        """The end of what it said while it started."""

    # -- the same for all ------------------------------------------------------------------

    def wait_reaches(self, other: str) -> None:
        """Wait until it reaches another host through the cable."""
        ping = ["ping", "-c", "1", "-W", "1", other]
        self.wait(
            f"does not reach host {other}; is the cable cut?",
            lambda: self.exec(ping, check=False).returncode == 0,
            START_S,
        )

    def wait(self, missed: str, condition: Callable[[], bool], seconds: float) -> None:
        """Poll until `condition`; LabError names what was `missed`."""
        deadline = time.monotonic() + seconds
        while not condition():
            # Before the look at the host: while it is being executed it has no command line.
            time.sleep(0.1)
            if self.pid is None:
                raise LabError(f"host {self.name} ended: {self.log()[-300:]}")
            if time.monotonic() > deadline:
                raise LabError(f"host {self.name} {missed}: {self.log()[-300:]}")

    def ssh(self) -> list[str]:
        """The ssh command up to the options; the destination is `root@lab`."""
        argv = ["ssh"]
        options = {**self.ssh_config(), "ControlPath": f"{self.dir}/ssh.sock", **_KEPT_OPEN}
        for name, value in options.items():
            argv += ["-o", f"{name}={value}"]
        return argv

    def ssh_config(self) -> dict[str, str]:
        """What ssh's configuration has to say of it, by option."""
        return {**self.way_in(), "IdentityFile": str(ssh_key()), **_SSH_OPTIONS}

    def hang_up(self) -> None:
        """End the connection that was kept open."""
        if (self.dir / "ssh.sock").exists():
            run([*self.ssh(), "-O", "exit", "root@lab"], check=False, timeout=20)

    def exec_argv(self, argv: Sequence[str], *, tty: bool = False) -> list[str]:
        """The command that runs `argv` there, its arguments unchanged."""
        return [*self.ssh(), *(["-tt"] if tty else []), "root@lab", "--", shlex.join(argv)]

    def exec(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes | None = None,
        timeout: float = 120,
        check: bool = True,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command there to its end."""
        return run(self.exec_argv(argv), stdin=stdin, timeout=timeout, check=check)
