"""A host of namespaces on this machine's own kernel: up in about a second, at native speed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from phaul_lab.host import ADDRESSES, START_S, Host
from phaul_lab.image import HERE
from phaul_lab.machine import cgroup_root
from phaul_lab.shell import LabError, run

# The address, in the network that all cables end in, where tests listen for what hosts send.
OUTSIDE = "10.77.0.254"
SCRIPT = HERE / "native-host"
_CLONE_NEWNET = 0x40000000


@contextmanager
def enter_namespace(pid: int | None) -> Iterator[None]:
    """Be in the network of a process meanwhile, with the calling thread alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    own, there = (
        os.open(f"/proc/{which}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        for which in ("thread-self", pid)
    )
    try:
        _set_namespace(libc, there)
        try:
            yield
        finally:
            _set_namespace(libc, own)
    finally:
        os.close(own)
        os.close(there)


def _set_namespace(libc: ctypes.CDLL, descriptor: int) -> None:
    if libc.setns(descriptor, _CLONE_NEWNET) != 0:
        raise LabError(f"setns: {os.strerror(ctypes.get_errno())}")


class NativeHost(Host):
    """A host of namespaces (mount, pid, net, uts, ipc, cgroup) over the image's root file system.

    The script `native-host` keeps it: the keeper runs outside, in the network that the cables end
    in. Mounts and links lie in namespaces that end with their processes; all processes lie in one
    cgroup of this machine, by which they are found and ended whatever became of the keeper.
    """

    kind = "native"

    @property
    def group(self) -> Path:
        """Its cgroup."""
        root = cgroup_root()
        if root is None:
            raise LabError("no cgroup2 is mounted on this machine: no native hosts")
        return root / f"phaul-lab.{self.dir.parent.name}.{self.name}"

    @property
    def keeper(self) -> int | None:
        """The pid of its keeper."""
        return self._told("keeper.pid")

    @property
    def pid(self) -> int | None:
        """The pid, out here, of its pid 1."""
        return self._told("init.pid")

    def _told(self, file: str) -> int | None:
        """A pid that its keeper wrote down, if that process is still this host's."""
        try:
            pid = int((self.dir / file).read_text())
            groups = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8")
        except (OSError, ValueError):
            return None
        return pid if f"/{self.group.name}/" in groups else None

    def start(self, hub: NativeHost | None, *, tied: bool) -> None:
        """Start it on a fresh disk; returns once its pid 1 is there.

        :param hub: the host in whose keeper's network all cables end; None: it is this one.
        :param tied: whether it ends with the process that starts it.
        """
        shutil.rmtree(self.dir, ignore_errors=True)
        self.dir.mkdir(parents=True)
        there = ["unshare", "--net"]
        if hub is not None:
            there = ["nsenter", f"--net=/proc/{hub.keeper}/ns/net"]
        argv = [
            *(["setpriv", "--pdeathsig", "TERM"] if tied else []),
            *[*there, "unshare", "--mount", "--propagation", "private"],
            *["sh", SCRIPT, self.dir, self.group, self.name, f"{ADDRESSES[self.name]}/24"],
            *[self.image.root, "" if hub else f"{OUTSIDE}/24"],
        ]
        with (self.dir / "host.log").open("wb") as log:
            process = subprocess.Popen(
                [str(word) for word in argv],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + START_S
        while self.pid is None:
            if process.poll() is not None or time.monotonic() > deadline:
                raise LabError(f"host {self.name} did not start: {self.log()[-300:]}")
            time.sleep(0.02)

    def wait_up(self) -> None:
        """Wait until its sshd answers."""
        true = ["true"]
        self.wait("did not come up", lambda: self.exec(true, check=False).returncode == 0, START_S)

    def stop(self) -> None:
        """End everything that is in it and put away what is left; idempotent."""
        self.hang_up()
        deadline = time.monotonic() + START_S
        while self.group.exists():
            with contextlib.suppress(OSError):
                (self.group / "cgroup.kill").write_text("1")
            for directory, _, _ in os.walk(self.group, topdown=False):
                with contextlib.suppress(OSError):
                    Path(directory).rmdir()
            if time.monotonic() > deadline:
                raise LabError(f"host {self.name} does not end: see {self.group}")
            time.sleep(0.02)
        for made in self._old_groups():
            for directory, _, _ in os.walk(made, topdown=False):
                with contextlib.suppress(OSError):
                    Path(directory).rmdir()
        shutil.rmtree(self.dir, ignore_errors=True)

    def _old_groups(self) -> list[str]:
        """Its groups in hierarchies of cgroup v1, which its keeper puts away if it lives to."""
        try:
            return (self.dir / "groups").read_text(encoding="utf-8").splitlines()
        except OSError:
            return []

    def way_in(self) -> Mapping[str, str]:
        """By its own loopback, entered from here."""
        return {"ProxyCommand": f"nsenter --mount --net --target {self.pid} nc 127.0.0.1 22"}

    def log(self) -> str:
        """What its keeper and its init said."""
        return (self.dir / "host.log").read_text(errors="replace").strip()

    def set_cable(self, up: bool) -> None:
        """Plug or unplug the cable to the other hosts."""
        link = ["ip", "link", "set", f"cable-{self.name}", "up" if up else "down"]
        run(["nsenter", f"--net=/proc/{self.keeper}/ns/net", *link])
