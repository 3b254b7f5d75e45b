"""A laboratory: two hosts and a cable, a third on request."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phaul_lab.emulated import EmulatedHost, kvm_works
from phaul_lab.host import ADDRESSES, Host
from phaul_lab.image import DEFAULT_SUITE, SOURCE, Image, cache_dir, ensure_image
from phaul_lab.native import OUTSIDE, NativeHost, enter_namespace
from phaul_lab.payload import ensure_payload
from phaul_lab.shell import LabError, locked, run

_PAYLOAD_MARK = "/opt/phaul-runtime/payload"
# CRIU 4.1.1 of trixie cannot dump inet sockets on a kernel as new as that of some machines.
NATIVE_SUITE = "forky"
# What emulated hosts call the loopback of the machine that they run on.
_EMULATED_OUTSIDE = "10.0.2.2"


def checkout_name() -> str:
    """What the names of this checkout's laboratories begin with, or $PHAUL_LAB."""
    return os.environ.get("PHAUL_LAB") or hashlib.sha256(str(SOURCE).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Kind:
    """What a laboratory is made of.

    `suites`: of each host that has another than `suite`.
    """

    native: bool = False
    suite: str = ""
    suites: Mapping[str, str] | None = None

    def suite_of(self, host: str) -> str:
        """The suite of software of a host."""
        default = self.suite or (NATIVE_SUITE if self.native else DEFAULT_SUITE)
        return (self.suites or {}).get(host, default)

    @property
    def name(self) -> str:
        """Its name, one for each kind in a checkout; short, since sockets lie below it."""
        pair = [self.suite_of("a"), self.suite_of("b")]
        initials = "".join(suite[0] for suite in dict.fromkeys(pair))
        if len(set(pair)) > 1:
            initials = "".join(suite[0] for suite in pair)
        return f"{checkout_name()}-{'native' if self.native else 'emulated'}-{initials}"


EMULATED = Kind()
NATIVE = Kind(native=True)


def checkouts_labs() -> list[Lab]:
    """Those of this checkout that there are."""
    found = sorted((cache_dir() / "labs").glob(f"{checkout_name()}*/"))
    return [Lab(directory.name) for directory in found]


class Lab:
    """The laboratory called `name`.

    Several with different names live side by side: each has its own directory, ports and disks.
    """

    def __init__(self, name: str | None = None) -> None:
        self.name = name or EMULATED.name
        self.dir = cache_dir() / "labs" / self.name
        if len(str(self.dir)) > 70:
            raise LabError(f"{self.dir} is too long a path for unix sockets; set PHAUL_LAB_CACHE")

    @property
    def _made_of(self) -> dict[str, Any]:
        """`native`, and the directory of each host's image."""
        try:
            found: dict[str, Any] = json.loads((self.dir / "lab.json").read_text())
        except (OSError, ValueError):
            return {"native": False, "images": {}}
        return found

    @property
    def native(self) -> bool:
        """Whether its hosts are of namespaces."""
        return bool(self._made_of["native"])

    def host(self, name: str) -> Host:
        """One host, running or not."""
        made_of = self._made_of
        if name not in ADDRESSES:
            raise LabError(f"no host {name!r}: there are {', '.join(ADDRESSES)}")
        kind = NativeHost if made_of["native"] else EmulatedHost
        return kind(name, self.dir / name, Image(Path(made_of["images"].get(name, "/nowhere"))))

    def _running(self, name: str) -> Host:
        host = self.host(name)
        if host.pid is None:
            raise LabError(f"host {name} is not up: make lab")
        return host

    def up(
        self, names: Sequence[str] = ("a", "b"), kind: Kind = EMULATED, *, tied: bool = False
    ) -> None:
        """Bring the hosts up with the current wheel on them; what is up stays up.

        :param tied: whether native hosts end with this process.
        """
        images = {name: ensure_image(kind.suite_of(name)) for name in dict.fromkeys(["a", *names])}
        with locked(cache_dir() / "labs" / f"{self.name}.lock"):
            made_of = self._made_of
            now = {name: str(image.dir) for name, image in images.items()}
            same = made_of["native"] == kind.native and all(
                made_of["images"].get(name, image) == image for name, image in now.items()
            )
            if not same or self.host("a").pid is None:
                self._down()
                made_of["images"] = {}
            self.dir.mkdir(parents=True, exist_ok=True)
            now = {**made_of["images"], **now}
            (self.dir / "lab.json").write_text(json.dumps({"native": kind.native, "images": now}))
            hosts = [self.host(name) for name in images]
            self._start(hosts, tied=tied)
            for host in hosts:
                host.wait_up()
            for other in hosts[1:]:
                hosts[0].wait_reaches(other.name)
            self._deliver(hosts)

    def _start(self, hosts: Sequence[Host], *, tied: bool) -> None:
        """Start those that do not run; host a is the first."""
        for host in hosts:
            if host.pid is not None:
                continue
            if isinstance(host, NativeHost):
                host.stop()  # what a kill left of it
                hub = hosts[0] if host.name != "a" else None
                assert hub is None or isinstance(hub, NativeHost)
                host.start(hub, tied=tied)
            elif isinstance(host, EmulatedHost):
                accel = "kvm" if kvm_works(host.image) else "tcg"
                host.start(self._cable(host.name), accel)
                # Its end of each cable is there before the others plug in: a connection
                # that is refused at the start is never tried again.
                host.wait_started()

    def _cable(self, name: str) -> list[str]:
        """QEMU's options for a host's end of the cable: host a has the hub."""
        if name != "a":
            return ["-netdev", f"stream,id=l0,addr.type=unix,addr.path={self.dir}/cable-{name}"]
        options = ["-netdev", "hubport,id=l0,hubid=1"]
        for other in ADDRESSES.keys() - {"a"}:
            path = f"addr.type=unix,addr.path={self.dir}/cable-{other}"
            options += ["-netdev", f"stream,id=s{other},server=on,{path}"]
            options += ["-netdev", f"hubport,id=h{other},hubid=1,netdev=s{other}"]
        return options

    def _deliver(self, hosts: Sequence[Host]) -> None:
        for host in hosts:
            tar = ensure_payload(host.image)
            had = host.exec(["cat", _PAYLOAD_MARK], check=False).stdout.decode()
            if had == tar.stem:
                continue
            script = (
                "rm -rf /opt/phaul-runtime/phaul && tar -C / -xf - && "
                "echo /opt/phaul-runtime/phaul > "
                "$(echo /opt/phaul-runtime/lib/python3*/site-packages)/phaul.pth && "
                f"printf %s {tar.stem} > {_PAYLOAD_MARK}"
            )
            host.exec(["sh", "-c", script], stdin=tar.read_bytes(), timeout=300)

    def down(self) -> None:
        """End this laboratory's hosts and forget their disks; idempotent."""
        lock = cache_dir() / "labs" / f"{self.name}.lock"
        with locked(lock):
            self._down()
            lock.unlink(missing_ok=True)

    def _down(self) -> None:
        if self.dir.exists():
            for name in ADDRESSES:
                if (self.dir / name).exists():
                    self.host(name).stop()
            shutil.rmtree(self.dir, ignore_errors=True)

    def status(self) -> dict[str, dict[str, object]]:
        """Each host's pid (None: not up), kind, suite and address."""
        if not self.dir.exists():
            return {}
        return {
            name: {
                "pid": self.host(name).pid,
                "kind": self.host(name).kind,
                "suite": self.host(name).image.suite,
                "address": address,
            }
            for name, address in ADDRESSES.items()
            if (self.dir / name).exists()
        }

    def exec_argv(self, name: str, argv: Sequence[str], *, tty: bool = False) -> list[str]:
        """The local command that runs `argv` on a host, arguments unchanged."""
        return self._running(name).exec_argv(argv, tty=tty)

    def exec(
        self,
        name: str,
        argv: Sequence[str],
        *,
        stdin: str | None = None,
        timeout: float = 120,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host to its end, as text."""
        done = self._running(name).exec(
            argv, stdin=None if stdin is None else stdin.encode(), timeout=timeout, check=check
        )
        return subprocess.CompletedProcess(
            done.args,
            done.returncode,
            done.stdout.decode(errors="replace"),
            done.stderr.decode(errors="replace"),
        )

    def push(self, name: str, file: Path, target: str) -> None:
        """Copy a file to a host, its mode included."""
        mode = f"{file.stat().st_mode & 0o7777:o}"
        self._running(name).exec(
            ["sh", "-c", 'cat > "$1" && chmod "$2" "$1"', "sh", target, mode],
            stdin=file.read_bytes(),
            timeout=600,
        )

    def cut(self, name: str = "a") -> None:
        """Unplug a host's cable to the others."""
        self._running(name).set_cable(False)

    def mend(self, name: str = "a") -> None:
        """Plug it in again."""
        self._running(name).set_cable(True)

    # -- outside of the hosts --------------------------------------------------------------

    @property
    def outside(self) -> str:
        """The address by which the hosts reach a socket of `outside_socket`."""
        return OUTSIDE if self.native else _EMULATED_OUTSIDE

    def outside_socket(self, kind: socket.SocketKind) -> socket.socket:
        """A socket outside of the hosts, bound to a free port, that they can send to."""
        if not self.native:
            found = socket.socket(socket.AF_INET, kind)
            found.bind(("127.0.0.1", 0))
            return found
        host = self._running("a")
        assert isinstance(host, NativeHost)
        with enter_namespace(host.keeper):
            found = socket.socket(socket.AF_INET, kind)
        found.bind((OUTSIDE, 0))
        return found


def pycriu_dir() -> Path:
    """A directory that holds the real pycriu of the image and nothing else, for sys.path."""
    image = ensure_image()
    target = image.dir / "pycriu"
    if not target.exists():
        part = image.dir / f".pycriu-{os.getpid()}"
        part.mkdir()
        run(["cp", "-r", image.root / "usr/lib/python3/dist-packages/pycriu", part])
        part.rename(target)
    return target
