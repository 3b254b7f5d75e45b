"""A plain process: CRIU by hand, and the Go library within one host."""

from __future__ import annotations

from pathlib import Path

from tests.bench.methods.base import Method, Unavailable
from tests.bench.result import Carried
from tests.e2e.conftest import Dirtier, Hosts, wait_until

STATUS = "/var/tmp/bench.status"
DRIVER = Path("build/bench/phaul-go")
IMAGES = "/run/bench-images"
START_S = 300


class Plain(Method):
    """piggie-dirty by itself."""

    pid: int

    def start(self, observer: str) -> None:
        """See `Method`."""
        argv = ["piggie-dirty", "--status", STATUS, "--detach", *self.workload.flags]
        done = self.hosts.lab.exec("a", [*argv, "--udp", observer], timeout=START_S)
        self.pid = int(done.stdout)

    def dirtier(self, host: str) -> Dirtier:
        """See `Method`."""
        return Dirtier(self.hosts, self.pid, STATUS)

    def clear(self) -> None:
        """See `Method`."""
        for host in ("a", "b"):
            script = f"pgrep -x piggie-dirty | xargs -r kill -9; rm -rf {STATUS} {IMAGES}"
            self.hosts.sh(host, script, check=False)


class Criu(Plain):
    """Stop, copy, restore."""

    key = "criu"
    title = "criu dump, rsync, criu restore"
    script = "criu-checkpoint.sh"

    def move(self) -> Carried:
        """See `Method`."""
        self.push_script(self.script)
        return self.run_script(self.script, str(self.pid), "b", IMAGES, STATUS)


class Namespaced(Plain):
    """The first of a pid namespace, which can have a copy beside it."""

    local = True

    def start(self, observer: str) -> None:
        """See `Method`."""
        words = " ".join(["--status", STATUS, *self.workload.flags, "--udp", observer])
        script = (
            f"rm -f {STATUS}; setsid unshare --pid --fork setsid piggie-dirty {words} "
            "</dev/null >/dev/null 2>&1 &"
        )
        self.hosts.sh("a", script)
        wait_until("its memory is full", lambda: self._found() != "", START_S)
        self.pid = int(self._found())

    def _found(self) -> str:
        return self.hosts.sh("a", f"[ -s {STATUS} ] && pgrep -x piggie-dirty", check=False)

    def dirtier(self, host: str) -> Dirtier:
        """See `Method`; it has another pid after the move."""
        return Dirtier(self.hosts, int(self._found()), STATUS)


class GoPhaul(Namespaced):
    """The Go library, by the driver in tests/bench/go."""

    key = "phaul-go"
    title = "Go library phaul, local"

    @classmethod
    def prepare(cls, hosts: Hosts) -> None:
        """See `Method`."""
        if not DRIVER.exists():
            raise Unavailable(f"make {DRIVER}")
        hosts.lab.push("a", DRIVER, "/var/tmp/phaul-go")

    def move(self) -> Carried:
        """See `Method`."""
        return self.run_mover("/var/tmp/phaul-go", str(self.pid), IMAGES)
