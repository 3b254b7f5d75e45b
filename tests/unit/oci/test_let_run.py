"""What an engine's destination half has let run, it never ends: the real ones, over stand-ins."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from phaul_engines.docker.arrival import DockerDestination
from phaul_engines.oci.options import RuncOptions
from phaul_engines.oci.runtime import Runtime
from phaul_engines.process.engine import ProcessDestination
from phaul_engines.process.options import ProcessOptions
from phaul_engines.runc import arrival
from phaul_engines.runc.arrival import RuncDestination

from phaul_runtime.engine import DestinationHalf
from phaul_runtime.system import cgroup
from phaul_runtime.system.process import Member
from phaul_runtime.system.procfs import start_time


def harm(*_: object, **__: object) -> Any:
    pytest.fail("what runs is ended")


def of_process(_: Path, monkeypatch: pytest.MonkeyPatch) -> DestinationHalf:
    half = ProcessDestination(ProcessOptions.model_validate({}), 4, 1.0)
    half.prepare({}, "id")
    held: Any = SimpleNamespace(resume=lambda _: 1.5, discard=harm)
    half._held = held
    monkeypatch.setattr(cgroup, "kill", harm)
    return half


def of_runc(place: Path, monkeypatch: pytest.MonkeyPatch) -> DestinationHalf:
    half = RuncDestination(RuncOptions.model_validate({}), 1.0)
    half._id, half._manifest = "id", {"bundle": str(place), "name": "x", "config": {}}
    codes = iter([None, 0])
    command: Any = SimpleNamespace(
        gate=SimpleNamespace(answer=lambda *_, **__: None),
        next=lambda _: None,
        wait=lambda _: next(codes),
        failure=lambda: AssertionError("it failed"),
        close=lambda: None,
    )
    half._command, half._held = command, command
    for module, name in ((arrival, "apply_limits"), (cgroup, "sweep")):
        monkeypatch.setattr(module, name, lambda *_: [])
    monkeypatch.setattr(cgroup, "kill", harm)
    monkeypatch.setattr(Runtime, "delete", harm)
    return half


def of_docker(_: Path, monkeypatch: pytest.MonkeyPatch) -> DestinationHalf:
    half = DockerDestination(Runtime("false"), 1.0)
    half._id, half._manifest = "id", {"host": "unix:///none", "timeout_s": 1}
    half._holders = [Member(os.getpid(), start_time(Path("/proc/self")))]
    stand_in: Any = SimpleNamespace(
        answer=lambda *_, **__: None, next=lambda *_: None, close=lambda: None, error=None
    )
    answers = iter([False, True])
    start: Any = SimpleNamespace(wait=lambda _: next(answers), error=None)
    half._gate, half._start, half._held = stand_in, start, stand_in
    monkeypatch.setattr(DockerDestination, "_settle", lambda _: None)
    monkeypatch.setattr(DockerDestination, "_end_half_built", harm)
    monkeypatch.setattr(cgroup, "kill_all", harm)
    return half


@pytest.mark.parametrize("make", [of_process, of_runc, of_docker])
def test_discard_after_resume_ends_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path, pytest.MonkeyPatch], DestinationHalf],
) -> None:
    half = make(tmp_path, monkeypatch)
    assert half.resume() > 0
    for _ in range(2):
        half.discard()
