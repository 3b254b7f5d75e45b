"""Preflight: both hosts and the target, before anything is frozen.

Each check has a name, under which it can be overridden on its own (`--ignore NAME`,
`checks.ignore`); there is no --force. `CHECKS` lists the names that the core knows; engines add
their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from phaul_runtime.criu.page_format import OTHER_RECEIVER, unknown_format
from phaul_runtime.criu.session import Criu
from phaul_runtime.engine.findings import OK, REFUSED, WARNING, Finding
from phaul_runtime.errors import CheckFailed, MigrationFailed, UsageError
from phaul_runtime.events import Checked, Listener
from phaul_runtime.files.tree_sender import INSTALL_RSYNC
from phaul_runtime.hooks.lifecycle import PRE_CHECK, Hooks, Move
from phaul_runtime.preflight.host_facts import cpu_problem
from phaul_runtime.rpc import phaul_pb2 as pb

IGNORED = "ignored"
# Room for the images: all of memory once, and what is dirtied meanwhile.
IMAGES_FACTOR = 1.25
_MIB = 1 << 20

CHECKS = {
    "pre-check": "no pre_check hook of either host says no",
    "root": "phaul-runtime runs as root on both hosts",
    "criu": "CRIU and pycriu are there, and CRIU's own check of the kernel is content",
    "criu-version": "pages of the source's CRIU are of use to the destination's (4.2 changed how)",
    "phaul-version": "both hosts have the same phaul-runtime",
    "arch": "same machine architecture and page size",
    "kernel": "the destination's kernel is not older than the source's",
    "cpu": "the destination's CPU has what the source's has",
    "dirty-tracking": "the source's kernel tracks dirty pages; without it there is no pre-copy",
    "lazy-pages": "the destination can restore lazily, where restore is lazy",
    "workdir": "the working directories are private and in memory",
    "state": "the journals' directories are private and outlive a reboot",
    "leftovers": "nothing of earlier migrations is left on either host",
    "space": "the destination has room for the images and for the process itself",
    "rsync": "rsync is installed on both hosts, where directory trees have to be carried",
    "throttle": "the target has a cgroup of its own, where policy.if_not_converging is throttle",
    "files": "files that the target holds open or mapped are the same at the destination",
}

# What no override can make work.
FATAL = frozenset({"root", "criu", "arch", "target"})


@dataclass(frozen=True)
class HostFinding:
    """A finding and the host it is about."""

    host: str
    finding: Finding


def compare_hosts(
    source: pb.HostFacts,
    destination: pb.HostFacts,
    names: tuple[str, str],
    page_server: str = "phaul",
) -> list[HostFinding]:
    """Hold two hosts against each other.

    Args:
        source, destination: their facts.
        names: how the user calls them.
        page_server: who receives pages, as `criu.page_server`.
    """
    here, there = names
    found: list[HostFinding] = []

    def add(host: str, check: str, level: str, text: str, hint: str = "") -> None:
        found.append(HostFinding(host, Finding(check, level, text, hint)))

    for host, facts in ((here, source), (there, destination)):
        _one_host(host, facts, add)
    if source.phaul_version != destination.phaul_version:
        add(
            there,
            "phaul-version",
            REFUSED,
            f"phaul-runtime {destination.phaul_version}, here {source.phaul_version}",
            "install the same version on both hosts",
        )
    if (source.arch, source.page_size) != (destination.arch, destination.page_size):
        add(
            there,
            "arch",
            REFUSED,
            f"{destination.arch} with pages of {destination.page_size}, "
            f"here {source.arch} with {source.page_size}",
        )
    else:
        add(there, "arch", OK, destination.arch)
    if source.criu_version and destination.criu_version:
        problem, hint = _page_format_problem(source, destination, page_server)
        text = f"CRIU {destination.criu_version}, here {source.criu_version}"
        if problem:
            add(there, "criu-version", REFUSED, f"{text}: {problem}", hint)
        else:
            add(there, "criu-version", OK, text)
    older = _kernel_number(destination.kernel) < _kernel_number(source.kernel)
    add(
        there,
        "kernel",
        WARNING if older else OK,
        f"Linux {destination.kernel}" + (f", older than {source.kernel} here" if older else ""),
    )
    if not source.dirty_tracking and source.criu_version:
        add(
            here,
            "dirty-tracking",
            WARNING,
            "no dirty tracking (CONFIG_MEM_SOFT_DIRTY): one stop-and-copy round, no pre-copy",
        )
    elif source.criu_version:
        add(here, "dirty-tracking", OK, "dirty pages are tracked")
    return found


def check_hooks(hooks: Hooks, move: Move) -> list[Finding]:
    """Ask this host's pre_check hooks; nothing if there are none."""
    programs = len(hooks.programs(PRE_CHECK))
    if not programs:
        return []
    try:
        hooks.run(PRE_CHECK, move)
    except MigrationFailed as error:
        return [Finding("pre-check", REFUSED, "; ".join((error.message, *error.log)), error.hint)]
    return [Finding("pre-check", OK, f"{programs} hooks have nothing against it")]


def _page_format_problem(
    source: pb.HostFacts, destination: pb.HostFacts, page_server: str
) -> tuple[str, str]:
    """Why pages of one CRIU are of no use to the other, and what to do; empty if they are."""
    by_criu = page_server == "criu"
    if by_criu and source.criu_version == destination.criu_version:
        return "", ""
    for facts in (source, destination):
        if not facts.page_format:
            return unknown_format(facts.criu_version), OTHER_RECEIVER
    if by_criu and source.page_format != destination.page_format:
        return (
            "the page server of the one does not understand the other (criu.page_server: criu)",
            "criu.page_server: phaul, or the same series on both hosts",
        )
    return "", ""


def check_lazy(facts: pb.HostFacts) -> Finding:
    """Whether that host can do what `restore: lazy` asks for."""
    if facts.criu_version and not facts.page_format:
        return Finding(
            "lazy-pages", REFUSED, unknown_format(facts.criu_version), "--restore full, pre-copy"
        )
    if facts.lazy_pages:
        return Finding("lazy-pages", OK, "userfaultfd is there")
    text = "its kernel has no userfaultfd that CRIU can use, and restore is lazy"
    return Finding("lazy-pages", REFUSED, text, "--restore auto")


def _one_host(host: str, facts: pb.HostFacts, add: _Add) -> None:
    if not facts.root:
        add(
            host,
            "root",
            REFUSED,
            "phaul-runtime does not run as root there",
            "CRIU restores pids, namespaces and sockets of others: run it as root",
        )
    if facts.criu_problem:
        first, _, rest = facts.criu_problem.partition("\n")
        add(host, "criu", REFUSED, first, rest.strip() or "install CRIU 4.1 or 4.2")
    else:
        add(host, "criu", OK, f"CRIU {facts.criu_version} on Linux {facts.kernel}")
    if facts.workdir_problem:
        add(
            host,
            "workdir",
            REFUSED,
            f"{facts.workdir}: {facts.workdir_problem}",
            "choose another workdir in the configuration",
        )
    elif facts.workdir_fs not in ("tmpfs", "ramfs"):
        add(
            host,
            "workdir",
            WARNING,
            f"{facts.workdir} is on {facts.workdir_fs or 'an unknown file system'}: "
            "images on a disk make the freeze longer",
        )
    else:
        add(
            host,
            "workdir",
            OK,
            f"{facts.workdir} on {facts.workdir_fs}, {facts.workdir_free // _MIB} MiB free",
        )
    _state(host, facts, add)
    for leftover in facts.leftovers:
        add(host, "leftovers", WARNING, leftover)


def _state(host: str, facts: pb.HostFacts, add: _Add) -> None:
    hint = "choose another state_dir in the configuration"
    if facts.state_problem:
        add(host, "state", REFUSED, f"{facts.state_dir}: {facts.state_problem}", hint)
    elif facts.state_fs in ("tmpfs", "ramfs"):
        text = f"{facts.state_dir} is on {facts.state_fs}: the journals do not outlive a reboot"
        add(host, "state", REFUSED, text, hint)
    else:
        add(host, "state", OK, f"{facts.state_dir} on {facts.state_fs or 'an unknown file system'}")


def check_rsync(facts: pb.HostFacts, *, needed: bool) -> Finding:
    """Whether a host can carry trees; `needed`: without it the move cannot succeed."""
    if facts.rsync:
        return Finding("rsync", OK, "rsync is there")
    return Finding("rsync", REFUSED if needed else WARNING, "rsync is missing", INSTALL_RSYNC)


class _Add(Protocol):
    def __call__(self, host: str, check: str, level: str, text: str, hint: str = "") -> None: ...


def check_space(facts: pb.HostFacts, memory: int) -> Finding:
    """Whether images and process of `memory` bytes fit on a host."""
    images = int(memory * IMAGES_FACTOR)
    in_memory = facts.workdir_fs in ("tmpfs", "ramfs")
    needed = memory + (images if in_memory else 0)
    if facts.workdir_free < images:
        return Finding(
            "space",
            REFUSED,
            f"{facts.workdir} has {facts.workdir_free // _MIB} MiB free, the images "
            f"take {images // _MIB} MiB",
            "free some, or choose another workdir",
        )
    if facts.memory_available < needed:
        return Finding(
            "space",
            REFUSED,
            f"{facts.memory_available // _MIB} MiB of memory are available, process "
            f"and images take {needed // _MIB} MiB",
            "free some, or put the workdir on a disk",
        )
    return Finding("space", OK, f"{needed // _MIB} MiB of memory fit")


def check_cpu(workdir: str, criu: Criu, cpuinfo: bytes) -> Finding:
    """Whether the CPU that `cpuinfo` describes is covered by this one, by CRIU's own judgement."""
    if not cpuinfo:
        return Finding("cpu", WARNING, "the source's CPU is not known")
    lines = cpu_problem(workdir, criu, cpuinfo)
    if lines:
        return Finding(
            "cpu",
            REFUSED,
            f"CPU features are missing: {'; '.join(lines)}",
            "a program that uses them would die there (SIGILL)",
        )
    return Finding("cpu", OK, "the CPU has what the source's has")


def _kernel_number(release: str) -> tuple[int, ...]:
    numbers = []
    for part in release.split("-", maxsplit=1)[0].split(".")[:2]:
        digits = "".join(c for c in part if c.isdigit())
        numbers.append(int(digits or 0))
    return tuple(numbers)


def judge(
    findings: Iterable[HostFinding], ignore: Sequence[str], listener: Listener
) -> list[HostFinding]:
    """Tell every finding, leave out what the user ignores, and return what refuses."""
    refused = []
    for host, finding in ((f.host, f.finding) for f in findings):
        level = finding.level
        if level == REFUSED and finding.check in ignore:
            if finding.check in FATAL:
                raise UsageError(f"the check {finding.check!r} cannot be ignored: {finding.text}")
            level = IGNORED
        listener(Checked(finding.check, level, host, finding.text, finding.hint))
        if level == REFUSED:
            refused.append(HostFinding(host, finding))
    return refused


def refuse(refused: Sequence[HostFinding]) -> None:
    """Raise if anything refuses, naming all of it.

    Raises:
        CheckFailed: its message is the first refusal, the others follow.
    """
    if not refused:
        return
    first, *others = refused
    ignorable = [r.finding.check for r in refused if r.finding.check not in FATAL]
    hint = first.finding.hint
    if ignorable and not hint:
        hint = f"--ignore {ignorable[0]} overrides this check"
    raise CheckFailed(
        f"{first.finding.text} (check {first.finding.check})",
        host=first.host,
        hint=hint,
        log=[f"{r.host}: {r.finding.text} (check {r.finding.check})" for r in others],
    )
