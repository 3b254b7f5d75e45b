"""Both hosts are after a move, and after one that failed, what they were before it.

All that can be seen of a host is compared (programs/host_snapshot.py). What may differ is named
here, line by line, with the reason: the copy that lives there, what docs/operations.md says is
kept, and what the test itself has put there.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from phaul_lab import Lab

from tests.e2e.conftest import Hosts, wait_until
from tests.e2e.docker_hosts import IMAGE
from tests.e2e.faults.stage import CONFIG, Stage
from tests.e2e.faults.victims import ContainerVictim, DockerVictim, Victim
from tests.e2e.observer import Observer
from tests.e2e.test_move import SELF_TALKER

PROGRAM = Path(__file__).parents[1] / "programs/host_snapshot.py"
HOOKS = "/etc/phaul-runtime/hooks/post_restore.d"
OPTIONS = "nsdelegate,memory_recursiveprot"
SETTLES_S = 30.0
Lines = dict[str, list[str]]


@dataclass(frozen=True)
class Allowed:
    """A line that may be there or not, and why."""

    kind: str
    pattern: str
    why: str


ALWAYS = [
    Allowed("files", r"/var/tmp/.*\.status .*", "the victim writes it, and leaves it at its end"),
    Allowed("files", r"/var/tmp/\w+\.py .*", "the test's own programs"),
    Allowed("files", r"/tmp/stagehand-\d+\.(out|err) .*", "what the test's commands said"),
    Allowed("files", r"/var/lib/phaul-runtime/[0-9a-f]{16}(/.*)? .*", "journals, kept"),
    Allowed("files", r"/run/phaul drwx\S+ 0:0", "the working directory stays, empty"),
    Allowed("files", r"/run/criu\.kdat .*", "CRIU's knowledge of the kernel, for the next time"),
]
IN_COPY = r"(,|nc|piggie-dirty|sh|sleep|python3)+"
# Directories, without a blob in them.
EMPTY_OF_CONTAINERD = Allowed(
    "files",
    r"/var/lib/containerd/io\.containerd\.content\.v1\.content(/ingest|/blobs(/sha256)?)? d.*",
    "containerd's, of the first restore",
)
EMPTY_OF_CRUN = Allowed("files", r"/run/crun/\.empty-directory .*", "crun's, of its first start")
OF_COPY = [
    Allowed("processes", rf"{IN_COPY}( \(\d+ times\))?", "the copy"),
    Allowed("namespaces", rf"time of {IN_COPY}", "CRIU keeps a restored tree's clock by it"),
    Allowed("listening", r"-u 0\.0\.0\.0:\d+", "by which it tells the observer"),
]


def of_the_copy(victim: Victim) -> list[Allowed]:
    """What a copy is seen by on the host where it lives."""
    spaces = rf"(cgroup|ipc|mnt|net|pid|uts) of {IN_COPY}"
    if isinstance(victim, DockerVictim):
        store = r"/(var/lib|run)/(docker|containerd)/.*[0-9a-f]{64}.*"
        return [
            *OF_COPY,
            Allowed("namespaces", spaces, "the container's"),
            Allowed("processes", r"containerd-shim", "containerd's, one for each container"),
            Allowed("mounts", store, "docker's of the container"),
            Allowed("files", store, "docker's of the container"),
            Allowed("files", r"/var/lib/docker/overlay2/l/\w{26} l.*", "names of its layers"),
            Allowed("listening", r"-x /run/containerd/s/\w+", "the shim's"),
            Allowed("files", r"/run/containerd/s/\w+ .*", "the shim's"),
            Allowed("cgroups", r"/sys/fs/cgroup/docker/[0-9a-f]{64} .*", "the container's"),
        ]
    if isinstance(victim, ContainerVictim):
        name, runtime = re.escape(victim.container.name), victim.container.runtime
        return [
            *OF_COPY,
            Allowed("namespaces", spaces, "the container's"),
            Allowed("cgroups", rf"/sys/fs/cgroup/{name} .*", "the container's"),
            Allowed("files", rf"/run/{runtime}(/{name}(/.*)?)? .*", "the runtime's state of it"),
            EMPTY_OF_CRUN,
        ]
    group = r"/sys/fs/cgroup/phaul-runtime(/[0-9a-f]{16})? .*"
    return [*OF_COPY, Allowed("cgroups", group, "its own, in which it was restored")]


def of_its_files(victim: Victim) -> list[Allowed]:
    """What is kept of a container on the host where it does not live."""
    if isinstance(victim, DockerVictim):
        return [EMPTY_OF_CONTAINERD]
    if not isinstance(victim, ContainerVictim):
        return []
    name, runtime = re.escape(victim.container.name), victim.container.runtime
    return [
        Allowed("files", rf"/var/lib/bundles(/{name}(/.*)?)? .*", "the bundle stays"),
        Allowed("files", rf"/run/{runtime} .*", "the runtime's own directory, empty"),
        EMPTY_OF_CRUN,
        Allowed("files", r"/tmp/run\.err .*", "what the runtime said when the test started it"),
    ]


def snapshot(hosts: Hosts, host: str) -> Lines:
    """What a host is like now."""
    hosts.lab.push(host, PROGRAM, "/var/tmp/host_snapshot.py")
    found: Lines = json.loads(hosts.sh(host, "python3 /var/tmp/host_snapshot.py"))
    return found


def differences(before: Lines, after: Lines, allowed: list[Allowed]) -> list[str]:
    """The lines that one has and the other has not, but for those that are allowed."""
    found = []
    for kind, lines in before.items():
        patterns = [re.compile(a.pattern) for a in allowed if a.kind == kind]
        was, now = set(lines), set(after[kind])
        for sign, some in (("-", was - now), ("+", now - was)):
            for line in some:
                if not any(pattern.fullmatch(line) for pattern in patterns):
                    found.append(f"{kind}: {sign} {line}")
    return sorted(found)


def hold_against(
    hosts: Hosts, before: dict[str, Lines], allowed: Callable[[str], list[Allowed]]
) -> None:
    """Fail unless both hosts become what they were; what ends by itself gets the time."""
    deadline = time.monotonic() + SETTLES_S
    while True:
        found = [
            f"{host}: {line}"
            for host in ("a", "b")
            for line in differences(before[host], snapshot(hosts, host), allowed(host))
        ]
        if not found:
            return
        assert time.monotonic() < deadline, "\n".join(found)
        time.sleep(0.5)


@dataclass
class Move:
    """A victim, the hosts as they were before it, and the way it is moved."""

    stage: Stage
    victim: Victim
    before: dict[str, Lines]
    flags: tuple[str, ...]
    said: str = ""

    def run(self, stop_at: str = "") -> None:
        """Begin, and wait until it stops there."""
        argv = [*self.victim.migrate(), "--config", CONFIG, *self.flags]
        self.stage.a.do("run", argv=argv, stop_at=stop_at)
        if stop_at:
            stopped = self.stage.a.do("await", seconds=120)
            assert stopped == {"stopped": True}, stopped

    def ends_with(self, code: int) -> None:
        """Wait for its end."""
        ended = self.stage.a.do("await", seconds=200)
        self.said = ended.get("err", "")
        assert ended.get("code") == code, self.said

    def compare(self, lives: str) -> None:
        """Hold both hosts against what they were; `lives`: the host of the copy."""
        victim = self.victim
        deadline = time.monotonic() + SETTLES_S
        while (where := self.stage.where(victim)) != [lives]:
            assert time.monotonic() < deadline, f"copies on {where}: {self.said}"
            time.sleep(0.3)

        def allowed(host: str) -> list[Allowed]:
            of_copy = of_the_copy(victim) if host == lives else []
            return [*ALWAYS, *of_its_files(victim), *of_copy]

        hold_against(self.stage.hosts, self.before, allowed)


def moved(move: Move) -> str:
    move.run()
    move.ends_with(0)
    return "b"


def refused(move: Move) -> str:
    """Before anything is frozen: the destination has no CRIU."""
    hosts = move.stage.hosts
    hosts.sh("b", "mv /usr/sbin/criu /usr/sbin/criu.away")
    try:
        move.run()
        move.ends_with(3)
    finally:
        hosts.sh("b", "mv /usr/sbin/criu.away /usr/sbin/criu")
    return "a"


def vetoed_there(move: Move) -> str:
    """Everything is rebuilt there when a hook says no."""
    hosts = move.stage.hosts
    made = hosts.sh("b", "d=$1; while [ ! -d $d ]; do echo $d; d=${d%/*}; done; mkdir -p $1", HOOKS)
    hosts.sh("b", 'printf "#!/bin/sh\\nexit 1\\n" >"$1/no"; chmod 755 "$1/no"', HOOKS)
    try:
        move.run()
        move.ends_with(4)
    finally:
        hosts.sh("b", 'rm "$1"; shift; [ $# = 0 ] || rmdir "$@"', f"{HOOKS}/no", *made.split())
    return "a"


def failed_there(move: Move) -> str:
    """The restore fails: what it needs is taken by somebody meanwhile."""
    move.run("copy")
    mend = move.victim.refuse()
    move.stage.a.do("go")
    try:
        move.ends_with(4)
    finally:
        mend()
    return "a"


def criu_killed_there(move: Move) -> str:
    move.run("copy")
    move.stage.a.do("go")
    assert move.stage.b.do("kill", what="criu", seconds=60)["killed"]
    # The first may only have been asked for its version.
    while move.stage.b.do("kill", what="criu", seconds=3)["killed"]:
        pass
    move.ends_with(4)
    return "a"


def criu_killed_here(move: Move) -> str:
    move.run("prepared")
    assert move.stage.a.do("kill", what="criu")["killed"]
    move.stage.a.do("go")
    move.ends_with(4)
    return "a"


def recovered_here(move: Move) -> str:
    """The command is killed before it is decided."""
    return _recovered(move, "prepared", "a")


def recovered_there(move: Move) -> str:
    """The command is killed when the source's copy is given up, which a post-copy never does."""
    return _recovered(move, "committing", "a" if move.flags == LATE else "b")


def _recovered(move: Move, moment: str, lives: str) -> str:
    move.run(moment)
    assert move.stage.a.do("kill", what="cli")["killed"]
    move.ends_with(-9)
    ended = move.stage.recover("a")
    assert ended["code"] == 0, ended["err"]
    return lives


FULL, LAZY, LATE = ("--restore", "full"), ("--restore", "lazy"), ("--mode", "post-copy")
IDS = {FULL: "full", LAZY: "lazy", LATE: "post-copy"}
MODES = {"process": (FULL, LAZY, LATE), "runc": (FULL, LAZY, LATE), "crun": (FULL,),
         "docker": (FULL, LAZY, LATE)}  # fmt: skip
ENDS: tuple[Callable[[Move], str], ...] = (
    moved, refused, vetoed_there, failed_there, criu_killed_there, criu_killed_here,
    recovered_here, recovered_there,
)  # fmt: skip
# The others in `make test-all`. Of docker there is the thorough suite alone.
QUICK = {
    ("process", FULL): (moved, vetoed_there, criu_killed_here, recovered_there),
    ("process", LATE): (moved, recovered_there),
    ("runc", FULL): (moved, criu_killed_there),
    ("runc", LAZY): (moved, recovered_here),
}


def cells() -> Iterator[object]:
    """Every engine, in every way that it can be moved, with every end."""
    for engine, modes in MODES.items():
        for mode in modes:
            for end in ENDS:
                marks = [] if end in QUICK.get((engine, mode), ()) else [pytest.mark.thorough]
                name = f"{engine}-{IDS[mode]}-{end.__name__}"
                yield pytest.param(engine, mode, end, id=name, marks=marks)


@pytest.fixture
def begin(stage: Stage, observer: Observer) -> Iterator[Callable[..., Move]]:
    """Know the hosts, then start a victim."""
    victims = []

    def make(engine: str, flags: tuple[str, ...]) -> Move:
        for host in ("a", "b"):
            # What a distribution's init says; heard only outside of cgroup namespaces.
            stage.hosts.sh(host, f"mount -o remount,{OPTIONS} /sys/fs/cgroup")
            # Groups of trees that an earlier test ended: the next move here removes them.
            groups = "/sys/fs/cgroup/phaul-runtime"
            stage.hosts.sh(host, f"rmdir {groups}/*/ 2>/dev/null; rmdir {groups}", check=False)
        before = {host: snapshot(stage.hosts, host) for host in ("a", "b")}
        victims.append(stage.victim(observer, engine))
        return Move(stage, victims[-1], before, flags)

    yield make
    for victim in victims:
        stage.clear(victim)


@pytest.fixture
def with_docker(request: pytest.FixtureRequest) -> None:
    """Docker on both hosts, if the cell is one of it, and what its first container makes."""
    if request.node.callspec.params["engine"] != "docker":
        return
    lab: Lab = request.getfixturevalue("docker_lab")
    for host in ("a", "b"):
        Hosts(lab).sh(host, f"docker run --rm --network host {IMAGE} ls")


@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("with_docker")
@pytest.mark.parametrize(("engine", "mode", "end"), [*cells()])
def test_hosts_are_what_they_were(
    begin: Callable[..., Move], engine: str, mode: tuple[str, ...], end: Callable[[Move], str]
) -> None:
    move = begin(engine, mode)
    move.compare(end(move))


# -- CRIU's network lock, by either of its means -----------------------------------------------


TALKS = "/var/tmp/selftalk.log"
LOCKS = {"iptables": "0xc114", "nftables": "CRIU-"}
# iptables makes its table when it is first used, and nobody takes it away: it drops nothing.
EMPTY_TABLE = [
    Allowed("rules", rf"host: {said}", "the empty table of iptables, made by its first use")
    for said in (
        r"nft: table ip6? filter: table ip6? filter \{",
        r"nft: table ip6? filter chain \w+: chain (INPUT|OUTPUT|FORWARD) \{",
        r"nft: .*: type filter hook (in|out|for)\w+ priority filter; policy accept;",
        r"ip6?tables-save: \*filter: (\*filter|:(INPUT|OUTPUT|FORWARD) ACCEPT)",
    )
]
KILLED = ("nobody", "cli", "criu")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("killed", KILLED)
@pytest.mark.parametrize("lock", LOCKS)
def test_the_network_lock_goes(stage: Stage, lock: str, killed: str) -> None:
    """Of a tree with a connection within the host."""
    hosts = stage.hosts
    for host in ("a", "b"):
        hosts.sh(host, 'mkdir -p /etc/criu; echo "network-lock $1" >/etc/criu/default.conf', lock)
        hosts.sh(host, f"rm -f {TALKS}")
    before = {host: snapshot(hosts, host) for host in ("a", "b")}
    start = 'setsid python3 -c "$1" </dev/null >/dev/null 2>&1 & echo $!'
    pid = int(hosts.sh("a", start, SELF_TALKER))
    try:
        wait_until("it talks", lambda: len(hosts.sh("a", f"cat {TALKS}", check=False)) > 10)
        argv = ["migrate", str(pid), "--to", "ssh://root@b", "--config", CONFIG]
        stage.a.do("run", argv=[*argv, "--tcp-established"], stop_at="prepared")
        stopped = stage.a.do("await", seconds=120)
        assert stopped == {"stopped": True}, stopped
        assert LOCKS[lock] in hosts.sh("a", "nft list ruleset; iptables-save")
        if killed != "nobody":
            assert stage.a.do("kill", what=killed)["killed"]
        if killed != "cli":
            stage.a.do("go")
        ended = stage.a.do("await", seconds=120)
        # A CRIU that is killed leaves the connection in repair mode: if the tree breaks by that
        # before phaul-runtime looks, the copy at b is the one.
        codes = {"nobody": {0}, "cli": {-9}, "criu": {0, 4}}
        assert ended["code"] in codes[killed], ended
        if killed == "cli":
            assert stage.recover("a")["code"] == 0
        of_talker = [
            *OF_COPY,
            Allowed("files", rf"{TALKS} .*", "it writes there"),
            Allowed("cgroups", r"/sys/fs/cgroup/phaul-runtime.*", "its own"),
            Allowed("listening", r"-t 127\.0\.0\.1:7777", "its own"),
        ]
        hold_against(hosts, before, lambda _host: [*ALWAYS, *of_talker, *EMPTY_TABLE])
    finally:
        for host in ("a", "b"):
            hosts.sh(host, "kill -9 $1; rm -f $2", str(pid), TALKS, check=False)
            hosts.sh(host, "rm /etc/criu/default.conf; rmdir /etc/criu", check=False)
            hosts.sh(host, "sleep 0.2; rmdir /sys/fs/cgroup/phaul-runtime/*/", check=False)
