"""A host with a kernel of its own: an emulated machine (QEMU)."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phaul_lab.host import ADDRESSES, START_S, Host
from phaul_lab.image import Image, cache_dir, recipe
from phaul_lab.shell import LabError, run

BOOT_S = 240


def free_port() -> int:
    """A TCP port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def kvm_works(image: Image) -> bool:
    """Whether an ordinary kernel boots on /dev/kvm, proven by a boot; remembered until reboot."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    verdict = cache_dir() / f"kvm-{boot}-{image.dir.name}"
    if not verdict.exists():
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run(
                [
                    "qemu-system-x86_64",
                    "-accel",
                    "kvm",
                    "-cpu",
                    "host",
                    "-m",
                    "512",
                    "-display",
                    "none",
                    "-no-reboot",
                    "-serial",
                    "stdio",
                    "-monitor",
                    "none",
                    "-kernel",
                    str(image.kernel),
                    "-initrd",
                    str(image.initrd),
                    "-append",
                    "console=ttyS0 panic=-1 root=/dev/null break=top",
                ],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=15,
                check=False,
            )
            verdict.write_text("yes" if b"(initramfs)" in done.stdout else "no")
        if not verdict.exists():
            verdict.write_text("no")
    return verdict.read_text() == "yes"


class EmulatedHost(Host):
    """A host that QEMU emulates, or virtualises where KVM works."""

    kind = "emulated"

    # -- the machine -----------------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        """The pid of QEMU, if that runs and is ours."""
        pid = self.state.get("pid")
        if not isinstance(pid, int):
            return None
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return None
        return pid if str(self.dir).encode() in command else None

    @property
    def port(self) -> int:
        """The port on loopback that leads to its sshd."""
        return int(self.state.get("port", 0))

    def start(self, hub: Sequence[str], accel: str) -> None:
        """Start the machine with a fresh disk; does not wait for it."""
        shutil.rmtree(self.dir, ignore_errors=True)
        self.dir.mkdir(parents=True)
        settings = recipe()["emulated"]
        disk = self.dir / "disk.qcow2"
        run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", self.image.base, disk])
        port = free_port()
        # Translated code is kept by virtual address: at random addresses each exec is translated
        # anew, and a page of a program that has run a few hundred times takes the emulator
        # milliseconds to clear once it is freed (qemu 7.2: 32 us for each piece of code in it).
        append = (
            "console=ttyS0 quiet norandmaps mitigations=off net.ifnames=0 root=/dev/vda rw "
            f"init=/sbin/labinit lab.host={self.name} lab.addr={ADDRESSES[self.name]}/24"
        )
        argv = [
            "qemu-system-x86_64",
            "-accel",
            accel,
            "-machine",
            "q35",
            "-cpu",
            "host" if accel == "kvm" else settings["cpu"],
            "-smp",
            settings["processors"],
            "-m",
            os.environ.get("PHAUL_LAB_MEMORY") or settings["memory_mib"],
            "-display",
            "none",
            "-serial",
            f"file:{self.dir}/console.log",
            "-qmp",
            f"unix:{self.dir}/qmp.sock,server=on,wait=off",
            "-kernel",
            str(self.image.kernel),
            "-initrd",
            str(self.image.initrd),
            "-append",
            append,
            "-drive",
            f"file={disk},if=virtio,cache=unsafe",
            "-netdev",
            f"user,id=u0,hostfwd=tcp:127.0.0.1:{port}-:22",
            "-device",
            "virtio-net-pci,netdev=u0",
            *hub,
            "-device",
            f"virtio-net-pci,netdev=l0,id=cable,mac=52:54:00:77:00:0{ord(self.name) - 96}",
        ]
        with (self.dir / "qemu.log").open("wb") as log:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        (self.dir / "state.json").write_text(json.dumps({"pid": process.pid, "port": port}))

    def wait_started(self) -> None:
        """Wait until its machine has all its devices: the monitor answers only then."""

        def answers() -> bool:
            try:
                self._monitor()
            except OSError:
                return False
            return True

        self.wait("did not start", answers, START_S)

    def wait_up(self) -> None:
        """Wait until its sshd answers."""
        self.wait(
            f"did not come up; see {self.dir}/console.log",
            lambda: self._banner() and self.exec(["true"], check=False, timeout=90).returncode == 0,
            BOOT_S,
        )

    def _banner(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=2) as probe:
                probe.settimeout(5)
                return probe.recv(4).startswith(b"SSH")
        except OSError:
            return False

    def stop(self) -> None:
        """End the machine and forget its disk; idempotent."""
        self.hang_up()
        pid = self.pid
        if pid is not None:
            os.kill(pid, signal.SIGTERM)
            deadline = time.monotonic() + 15
            while self.pid is not None and time.monotonic() < deadline:
                # It may be our own child: reap it.
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
                time.sleep(0.1)
            if self.pid is not None:
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.dir, ignore_errors=True)

    def way_in(self) -> Mapping[str, str]:
        """By a port on loopback."""
        return {"HostName": "127.0.0.1", "Port": str(self.port)}

    def log(self) -> str:
        """What QEMU said."""
        return (self.dir / "qemu.log").read_text(errors="replace").strip()

    # -- the cable -------------------------------------------------------------------------

    def set_cable(self, up: bool) -> None:
        """Plug or unplug the cable to the other hosts."""
        self._monitor({"execute": "set_link", "arguments": {"name": "cable", "up": up}})

    def _monitor(self, *commands: dict[str, Any]) -> None:
        """Give commands to the machine's monitor (QMP)."""
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.settimeout(10)
            monitor.connect(str(self.dir / "qmp.sock"))
            stream = monitor.makefile("rw")
            stream.readline()
            for command in ({"execute": "qmp_capabilities"}, *commands):
                stream.write(json.dumps(command) + "\n")
                stream.flush()
                while "return" not in (answer := json.loads(stream.readline())):
                    if "error" in answer:
                        raise LabError(f"the monitor of host {self.name} says {answer['error']}")
