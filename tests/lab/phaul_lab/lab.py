"""A laboratory: two hosts and a cable, a third on request."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from phaul_lab.host import ADDRESSES, Host, kvm_works
from phaul_lab.image import SOURCE, Image, cache_dir, ensure_image
from phaul_lab.payload import ensure_payload
from phaul_lab.shell import LabError, locked, run

_PAYLOAD_MARK = "/opt/phaul-runtime/payload"


def default_name() -> str:
    """A name of its own for each checkout, or $PHAUL_LAB."""
    return os.environ.get("PHAUL_LAB") or hashlib.sha256(str(SOURCE).encode()).hexdigest()[:8]


class Lab:
    """The laboratory called `name`.

    Several with different names live side by side: each has its own directory, ports and disks.
    """

    def __init__(self, name: str | None = None) -> None:
        self.name = name or default_name()
        self.dir = cache_dir() / "labs" / self.name
        if len(str(self.dir)) > 70:
            raise LabError(f"{self.dir} is too long a path for unix sockets; set PHAUL_LAB_CACHE")

    def _image(self) -> Image:
        """The image that the running laboratory was made of, else the current one."""
        link = self.dir / "image"
        return Image(link.resolve()) if link.exists() else ensure_image()

    def host(self, name: str) -> Host:
        """One host, running or not."""
        if name not in ADDRESSES:
            raise LabError(f"no host {name!r}: there are {', '.join(ADDRESSES)}")
        return Host(name, self.dir / name, self._image())

    def _running(self, name: str) -> Host:
        host = self.host(name)
        if host.pid is None:
            raise LabError(f"host {name} is not up: make lab")
        return host

    def up(self, names: Sequence[str] = ("a", "b")) -> None:
        """Bring the hosts up with the current wheel on them; what is up stays up."""
        image = ensure_image()
        with locked(cache_dir() / "labs" / f"{self.name}.lock"):
            link = self.dir / "image"
            if link.exists() and link.resolve() != image.dir.resolve():
                self._down()
            if not self.dir.exists() or self.host("a").pid is None:
                self._down()
                self.dir.mkdir(parents=True)
                link.symlink_to(image.dir)
            accel = "kvm" if kvm_works(image) else "tcg"
            hosts = [self.host(name) for name in dict.fromkeys(["a", *names])]
            for host in hosts:
                if host.pid is None:
                    host.start(self._cable(host.name), accel)
                    # Its end of each cable is there before the others plug in: a connection
                    # that is refused at the start is never tried again.
                    host.wait_started()
            for host in hosts:
                host.wait_up()
            for other in hosts[1:]:
                hosts[0].wait_reaches(other.name)
            self._deliver(image, hosts)

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

    def _deliver(self, image: Image, hosts: Sequence[Host]) -> None:
        tar = ensure_payload(image)
        for host in hosts:
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
        """End this laboratory's machines and forget their disks; idempotent."""
        with locked(cache_dir() / "labs" / f"{self.name}.lock"):
            self._down()

    def _down(self) -> None:
        if self.dir.exists():
            for name in ADDRESSES:
                if (self.dir / name).exists():
                    self.host(name).stop()
            shutil.rmtree(self.dir, ignore_errors=True)

    def status(self) -> dict[str, dict[str, object]]:
        """Each host's pid (None: not up), ssh port and address."""
        if not self.dir.exists():
            return {}
        return {
            name: {"pid": self.host(name).pid, "port": self.host(name).port, "address": address}
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
