"""What has to be right before a move: of both hosts, of the target, and of its files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phaul_runtime.criu.session import Criu
from phaul_runtime.cutover.freezer import check_hold
from phaul_runtime.engine.findings import OK, REFUSED, WARNING, Finding
from phaul_runtime.engine.interface import Inspection, SourceHalf
from phaul_runtime.engine.targets import FileVerdict, Tree
from phaul_runtime.errors import Refused
from phaul_runtime.hooks.lifecycle import Move
from phaul_runtime.library.client import PRE_COPY
from phaul_runtime.preflight.checks import HostFinding, check_lazy, check_rsync, compare_hosts
from phaul_runtime.preflight.host_facts import one_host
from phaul_runtime.preflight.wiring import Wiring
from phaul_runtime.rpc import phaul_pb2 as pb
from phaul_runtime.rpc.client import RemoteAgent

if TYPE_CHECKING:
    from phaul_runtime.config.model import Config

HERE = "here"


@dataclass(frozen=True)
class Hosts:
    """Both hosts of a move.

    Attributes:
        here: the facts of this one.
        there: the facts of the destination.
        name: what messages call the destination.
    """

    here: pb.HostFacts
    there: pb.HostFacts
    name: str

    @property
    def same(self) -> bool:
        """They are one: a pid names the same process for both."""
        return one_host(self.here, self.there)


@dataclass(frozen=True)
class Checked:
    """What a preflight has found out, for the move that follows it.

    Attributes:
        hosts: both.
        source: the engine's half here, with the target inspected.
        options: the engine's.
        inspection: of the target.
        differing: paths of the target's files that the destination lacks or has otherwise.
        throttled: the cgroup in which the target can be slowed; None if it is not to be, or cannot.
    """

    hosts: Hosts
    source: SourceHalf
    options: Any
    inspection: Inspection
    differing: Sequence[str] = ()
    throttled: Path | None = None


def look_at_hosts(config: Config, criu: Criu, agent: RemoteAgent, wiring: Wiring) -> Hosts:
    """Gather the facts of both hosts."""
    here = wiring.facts(config.workdir, config.state_dir, criu)
    return Hosts(here, agent.hello(), agent.name)


def check_both(config: Config, hosts: Hosts) -> list[HostFinding]:
    """Hold the hosts against each other, and against what the move needs of them."""
    findings = compare_hosts(hosts.here, hosts.there, (HERE, hosts.name), config.criu.page_server)
    if config.restore == "lazy" or config.mode != PRE_COPY:
        findings.append(HostFinding(hosts.name, check_lazy(hosts.there)))
    if config.mode != PRE_COPY:
        findings += [HostFinding(HERE, check_lazy(hosts.here)), HostFinding(HERE, check_hold())]
    return findings


def check_target(
    config: Config,
    about: Move,
    agent: RemoteAgent,
    *,
    hosts: Hosts,
    source: SourceHalf,
    inspection: Inspection,
) -> tuple[list[HostFinding], list[str]]:
    """Hold the target against the destination.

    Returns:
        What was found, and the paths of files that differ.
    """
    findings = [HostFinding(HERE, finding) for finding in inspection.findings]
    if config.mode != PRE_COPY and source.no_post_copy:
        text = f"no {config.mode}: {source.no_post_copy}"
        findings.append(HostFinding(HERE, Finding("mode", REFUSED, text, "--mode pre-copy")))
    request = pb.CheckRequest(
        engine=config.engine,
        manifest=json.dumps(manifest_of(config, inspection)).encode(),
        memory=inspection.memory,
        cpuinfo=hosts.here.cpuinfo,
        same_host=hosts.same,
        id=about.id,
        target=about.target,
        source=hosts.here.hostname,
        restore=config.restore,
    )
    found, differing = agent.check(request, () if hosts.same else inspection.files)
    findings += [HostFinding(hosts.name, finding) for finding in found]
    copy = config.filesystem.files == "copy"
    of_files = _about_files(differing, len(inspection.files), copy=copy)
    findings.append(HostFinding(hosts.name, of_files))
    if trees := trees_of(config, inspection):
        # Within one host they may be at their place already; the first may not be needed.
        needed = not hosts.same and not all(tree.first for tree in trees)
        for host, facts in ((HERE, hosts.here), (hosts.name, hosts.there)):
            findings.append(HostFinding(host, check_rsync(facts, needed=needed)))
    return findings, [verdict.path for verdict in differing]


def _about_files(verdicts: Sequence[FileVerdict], files: int, *, copy: bool) -> Finding:
    stuck = [verdict for verdict in verdicts if not (copy and verdict.copyable)]
    if stuck:
        text = "; ".join(f"{verdict.path} {verdict.reason}" for verdict in stuck)
        if all(verdict.copyable for verdict in stuck):
            return Finding("files", REFUSED, text, "--files copy carries them")
        return Finding(
            "files", REFUSED, text, "install the same packages on both hosts, or the same file"
        )
    if verdicts:
        text = f"{len(verdicts)} of {files} differ and will be carried"
        return Finding("files", OK, text)
    return Finding("files", OK, f"{files} files are there")


def check_throttle(config: Config, source: SourceHalf) -> tuple[list[HostFinding], Path | None]:
    """Whether the target last inspected can be slowed, if that may be asked for.

    Returns:
        What was found, and the cgroup in which it can be.
    """
    if config.policy.if_not_converging != "throttle":
        return [], None
    try:
        group = source.throttle_cgroup()
    except Refused as error:
        finding = Finding(
            "throttle",
            WARNING,
            f"it cannot be slowed: {error.message}",
            "give it a cgroup v2 of its own with the cpu controller; without: proceed",
        )
        return [HostFinding(HERE, finding)], None
    finding = Finding("throttle", OK, f"{group / 'cpu.max'} can slow it")
    return [HostFinding(HERE, finding)], group


def trees_of(config: Config, inspection: Inspection) -> list[Tree]:
    """The target's trees that are carried where the destination has a place for them."""
    shared = config.filesystem.rootfs == "shared"
    return [tree for tree in inspection.trees if tree.first or not shared]


def manifest_of(config: Config, inspection: Inspection) -> dict[str, Any]:
    """What the engine's other half is told: its own, and what the core decides."""
    return {**inspection.manifest, "rootfs": config.filesystem.rootfs}
