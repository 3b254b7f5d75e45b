"""A container's runtime that does not run is not one that knows no container."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from phaul_engines.oci.checks import runtime_finding
from phaul_engines.oci.gated import GatedCommand
from phaul_engines.oci.runtime import Runtime, read_container
from phaul_hooks.gate import Gate

from phaul_runtime.engine import OK, REFUSED
from phaul_runtime.errors import NoSuchTarget, Refused

LOADER = "runc: error while loading shared libraries: libseccomp.so.2: cannot open"
ASKED: list[Callable[[Runtime], object]] = [
    lambda runtime: runtime.version(),
    lambda runtime: runtime.state("web"),
    lambda runtime: runtime.names(),
    lambda runtime: read_container(runtime, "web"),
]


def runtime(tmp_path: Path, text: str) -> Runtime:
    path = tmp_path / "runc"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return Runtime(str(path), str(tmp_path / "state"))


@pytest.mark.parametrize("ask", ASKED)
def test_what_the_loader_said_is_in_the_message(
    tmp_path: Path, ask: Callable[[Runtime], object]
) -> None:
    broken = runtime(tmp_path, f"echo '{LOADER}' >&2; exit 127")
    with pytest.raises(Refused, match="libseccomp") as caught:
        ask(broken)
    assert not isinstance(caught.value, NoSuchTarget)
    assert "(code 127)" in caught.value.message


def test_one_that_is_killed_has_its_signal_in_the_message(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"does not run \(code -11\)"):
        runtime(tmp_path, "kill -SEGV $$").state("web")


def test_a_container_that_it_does_not_know_is_none(tmp_path: Path) -> None:
    assert runtime(tmp_path, "echo container does not exist >&2; exit 1").state("web") is None


def test_one_whose_output_may_be_inherited_has_its_code_at_least(tmp_path: Path) -> None:
    broken = runtime(tmp_path, f"echo '{LOADER}' >&2; exit 127")
    command = GatedCommand(
        broken.argv("restore", "web"),
        Gate(tmp_path / "gate", deadline_s=60),
        name="runc",
        request="RESTORE",
        log=tmp_path / "restore.log",
        quiet=True,
    )
    command.start()
    try:
        assert command.wait(60) == 127
        assert command.failure().log == (f"{broken.binary} ended with code 127 and said nothing",)
    finally:
        command.close()


@pytest.mark.parametrize(
    ("version", "shared_masks", "level"),
    [
        ("crun version 1.21", True, REFUSED),
        ("crun version 1.24", True, OK),
        ("crun version 2.0", True, OK),
        ("crun version 1.21", False, OK),
        ("runc version 1.1.15+ds1", True, OK),
    ],
)
def test_masks_that_an_older_crun_does_not_restore(
    version: str, shared_masks: bool, level: str
) -> None:
    found = runtime_finding(version, {"shared_masks": shared_masks})
    assert (found.check, found.level) == ("runtime", level)
    assert version in found.text
    assert runtime_finding(version, {}).level == OK
