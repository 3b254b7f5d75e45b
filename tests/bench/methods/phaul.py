"""phaul-runtime, as a user types it."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from tests.bench.methods.base import MOVE_S, NAME, Unavailable, failure
from tests.bench.methods.bundle import Bundle
from tests.bench.methods.engine import OfDocker
from tests.bench.methods.plain import Namespaced, Plain
from tests.bench.result import Carried
from tests.e2e.conftest import Hosts, wait_until

PAGE = 4096
_AGENT = "/var/tmp/bench-agent.pid"


def parse_report(report: dict[str, Any]) -> Carried:
    """What the report says."""
    late = int(report.get("post_copy", {}).get("pages", 0))
    final = int(report["final_pages_written"]) or late
    rounds = report["iterations"]
    first = rounds[0] if rounds else None
    return Carried(
        pages=final + int(report["final_pages_skipped"]),
        final_pages=final,
        bytes=int(report["bytes_transferred"]),
        steps={name.removesuffix("_ms"): ms for name, ms in report["freeze"].items()},
        dumped_pages=final + sum(int(each["pages_written"]) for each in rounds),
        rounds=len(rounds),
        downtime_ms=report["downtime_ms"],
        lazy_complete_ms=report.get("lazy_complete_ms"),
        first_round_mib_s=first and first["bytes"] / 2**20 / (first["duration_ms"] / 1000),
    )


_knows: dict[str, bool] = {}


def knows_restore(hosts: Hosts) -> bool:
    """Whether the installed version has the key `restore`; asked once, hosts are slow."""
    name = hosts.lab.name
    if name not in _knows:
        path = "/var/tmp/bench-probe.yaml"
        script = f"echo 'restore: lazy' > {path}; phaul-runtime config check {path}"
        _knows[name] = hosts.lab.exec("a", ["sh", "-c", script], check=False).returncode == 0
    return _knows[name]


class _Phaul:
    """The command, with a configuration of its own."""

    key: ClassVar[str]
    policy = "budget"
    restore = "full"
    engine = "process"
    flags: ClassVar[tuple[str, ...]] = ()
    more = ""

    @classmethod
    def _path(cls) -> str:
        return f"/var/tmp/bench-{cls.key}.yaml"

    @classmethod
    def configure(cls, hosts: Hosts) -> None:
        """Lay the configuration on a, as far as the version there knows it."""
        text = f"policy:\n  name: {cls.policy}\n{cls.more}"
        if knows_restore(hosts):
            text += f"restore: {cls.restore}\n"
        elif cls.restore != "full":
            raise Unavailable(f"this phaul-runtime has no `restore: {cls.restore}`")
        hosts.sh("a", 'printf %s "$1" > "$2"', text, cls._path())

    def migrate(self, hosts: Hosts, target: str, to: str = "ssh://root@b") -> Carried:
        """`phaul-runtime migrate`."""
        argv = ["phaul-runtime", "migrate", target, "--engine", self.engine, "--to", to]
        argv += ["--config", self._path(), "--output", "json", *self.flags]
        done = hosts.lab.exec("a", argv, check=False, timeout=MOVE_S)
        if done.returncode != 0:
            raise RuntimeError(failure(argv[0], done.returncode, done.stderr or done.stdout))
        return parse_report(json.loads(done.stdout.splitlines()[-1]))


class PhaulFull(_Phaul, Plain):
    """Process engine; all of memory is there before it runs."""

    key = "phaul-full"
    title = "phaul-runtime, process, full"
    flags: ClassVar[tuple[str, ...]] = ("--files", "copy")

    @classmethod
    def prepare(cls, hosts: Hosts) -> None:
        """See `Method`."""
        cls.configure(hosts)

    def move(self) -> Carried:
        """See `Method`."""
        return self.migrate(self.hosts, str(self.pid))


class PhaulLazy(PhaulFull):
    """Process engine; memory that went over is paged in after it runs."""

    key = "phaul-lazy"
    title = "phaul-runtime, process, lazy"
    restore = "lazy"
    lazy = True


class PhaulHybrid(PhaulLazy):
    """Rounds, then what is rewritten comes after it runs."""

    key = "phaul-hybrid"
    title = "phaul-runtime, process, hybrid"
    flags: ClassVar[tuple[str, ...]] = (*PhaulFull.flags, "--mode", "hybrid")


class PhaulPostCopy(PhaulLazy):
    """No rounds: all of memory comes after it runs."""

    key = "phaul-post"
    title = "phaul-runtime, process, post-copy"
    flags: ClassVar[tuple[str, ...]] = (*PhaulFull.flags, "--mode", "post-copy")


class PhaulTcp(PhaulLazy):
    """CRIU writes memory to the connection itself, and nobody encrypts it."""

    key = "phaul-tcp"
    title = "phaul-runtime, process, lazy, tcp://"
    more = "transport: {insecure: true}\n"

    @classmethod
    def prepare(cls, hosts: Hosts) -> None:
        """See `Method`."""
        super().prepare(hosts)
        cls.tidy(hosts)
        start = "setsid phaul-runtime agent --listen tcp://0.0.0.0 --insecure"
        hosts.sh("b", f"{start} >/var/tmp/bench-agent.log 2>&1 </dev/null & echo $! >{_AGENT}")
        ready = "grep ' agent ready ' /var/tmp/bench-agent.log"
        wait_until("the agent listens", lambda: hosts.sh("b", ready, check=False) != "")

    @classmethod
    def tidy(cls, hosts: Hosts) -> None:
        """See `Method`."""
        end = f"[ ! -e {_AGENT} ] || kill $(cat {_AGENT}); rm -f {_AGENT}"
        hosts.sh("b", end, check=False)

    def move(self) -> Carried:
        """See `Method`."""
        return self.migrate(self.hosts, str(self.pid), "tcp://b")


class PhaulPolicy(PhaulFull):
    """The ancestor's constants for when pre-copy ends."""

    key = "phaul-policy"
    title = "phaul-runtime, process, full, policy: phaul"
    policy = "phaul"


class PhaulLocal(_Phaul, Namespaced):
    """Within one host."""

    key = "phaul-local"
    title = "phaul-runtime, process, full, local:"

    @classmethod
    def prepare(cls, hosts: Hosts) -> None:
        """See `Method`."""
        cls.configure(hosts)

    def move(self) -> Carried:
        """See `Method`."""
        return self.migrate(self.hosts, str(self.pid), "local:")


class PhaulRunc(_Phaul, Bundle):
    """A container of runc."""

    key = "phaul-runc"
    title = "phaul-runtime, runc, full"
    engine = "runc"

    @classmethod
    def prepare(cls, hosts: Hosts) -> None:
        """See `Method`."""
        cls.configure(hosts)

    def move(self) -> Carried:
        """See `Method`."""
        if self.workload.redis:
            self.flags: tuple[str, ...] = ("--tcp-established",)  # type: ignore[misc]
        return self.migrate(self.hosts, NAME)


class PhaulRuncLazy(PhaulRunc):
    """The same, paged in after it runs."""

    key = "phaul-runc-lazy"
    title = "phaul-runtime, runc, lazy"
    restore = "lazy"
    lazy = True


class PhaulDocker(_Phaul, OfDocker):
    """A container of docker."""

    key = "phaul-docker"
    title = "phaul-runtime, docker, full"
    engine = "docker"

    @classmethod
    def prepare(cls, hosts: Hosts) -> None:
        """See `Method`."""
        super().prepare(hosts)
        cls.configure(hosts)

    def move(self) -> Carried:
        """See `Method`."""
        return self.migrate(self.hosts, NAME)


class PhaulDockerLazy(PhaulDocker):
    """The same, paged in after it runs."""

    key = "phaul-docker-lazy"
    title = "phaul-runtime, docker, lazy"
    restore = "lazy"
    lazy = True
