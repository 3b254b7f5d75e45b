"""What a test needs of its hosts, and which laboratory has it.

A test says it by `@pytest.mark.needs(...)`; without, hosts of namespaces do, at native speed.
"""

from __future__ import annotations

from phaul_lab.lab import Kind
from phaul_lab.machine import (
    controllers,
    soft_dirty,
    sys_resource,
    why_not_emulated,
    why_not_native,
)

# By the name that tests and `--labs` have for it.
LABS = {
    "native": Kind(native=True),
    "emulated": Kind(),
    "emulated-forky": Kind(suite="forky"),
    "emulated-mixed": Kind(suites={"a": "trixie", "b": "forky"}),
    "native-mixed": Kind(native=True, suites={"a": "trixie", "b": "forky"}),
}
NEEDS = {
    "dirty-tracking": "a kernel with soft-dirty, for pre-copy",
    "controllers": "cgroup2 with the controllers cpu, memory and pids",
    "own-kernel": "hosts whose clock and settings are their own",
    "sys-resource": "CAP_SYS_RESOURCE, without which CRIU dumps no process of another user",
    "docker-networks": "a docker that restores containers with a network of their own, before 28",
}


def _native_has(need: str) -> bool:
    """Whether hosts of namespaces have it on this machine."""
    probes = {
        "dirty-tracking": soft_dirty,
        "controllers": controllers,
        "sys-resource": sys_resource,
    }
    return need in probes and probes[need]()


def choose(needs: set[str]) -> tuple[str, str]:
    """The laboratory that has it all, by its name; or why none has, on this machine."""
    if unknown := needs - NEEDS.keys():
        raise ValueError(f"no such need: {sorted(unknown)}; there are {sorted(NEEDS)}")
    lacks = [need for need in sorted(needs) if not _native_has(need)]
    if not lacks and not why_not_native():
        return "native", ""
    if not why_not_emulated():
        return "emulated", ""
    wanted = ", ".join(NEEDS[need] for need in lacks) or "a host"
    return "", f"needs {wanted}: {why_not_native() or why_not_emulated()}"
