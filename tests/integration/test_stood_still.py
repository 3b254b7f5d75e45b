"""What an engine knows of its target is what stood still, not what ran just before it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from phaul_engines.common import netlock
from phaul_engines.oci.runtime import Container, Runtime
from phaul_engines.oci.source import OciLocal, OciSource
from phaul_engines.process.engine import ProcessLocal, ProcessSource
from phaul_engines.process.options import ProcessOptions

from phaul_runtime.engine import Inspection
from phaul_runtime.errors import TargetGone
from phaul_runtime.system.cancel import Cancellation

# Root, a child that ends, and one that stays; all tell their pids on stdout, connections a port.
VICTIM = """
import os, signal, socket, sys
sockets = []

def child():
    pid = os.fork()
    if pid == 0:
        signal.pause()
    print(pid, flush=True)
    return pid

first = child()
for line in sys.stdin:
    word, *more = line.split()
    if word == "fork":
        child()
    elif word == "connect":
        sockets.append(socket.create_connection(("127.0.0.1", int(more[0]))))
        print(sockets[-1].getsockname()[1], flush=True)
    elif word == "end":
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
        print("ended", flush=True)
"""


class Victim:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", VICTIM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.pid = self.process.pid
        self.children = [int(self._line())]

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def tell(self, words: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{words}\n")
        self.process.stdin.flush()
        return self._line()

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # a test may have ended all of them
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait(20)
        for file in (self.process.stdin, self.process.stdout):
            assert file is not None
            file.close()


@pytest.fixture
def victim() -> Iterator[Victim]:
    found = Victim()
    yield found
    found.end()


class Told:
    """A handover that keeps what it is told."""

    post_copy = held = committing = False

    def __init__(self) -> None:
        self.identities: list[Mapping[str, Any]] = []

    def freezing(self, identity: Mapping[str, Any]) -> None:
        self.identities.append(identity)

    def stopped(self) -> None:
        pass

    def prepare(self, _images_dir: Path, identity: Mapping[str, Any] | None = None) -> int:
        assert identity is not None
        self.identities.append(identity)
        return 1


class Contained(OciSource):
    """The half of a container whose processes are a victim's, in the host's network."""

    def __init__(self, pid: int) -> None:
        super().__init__(Runtime("false", ""), ())
        self._container: Any = SimpleNamespace(pid=pid)

    @property
    def runtime_name(self) -> str:
        return "victim"

    def _network_of(self, container: Container) -> str:
        return ""

    def _places(self, container: Container) -> dict[str, tuple[str, str]]:
        return {}

    def inspect(self) -> Inspection:
        raise NotImplementedError

    def finish(self) -> Sequence[str]:
        return netlock.release(self._connections)


class Dump:
    """The two words of a final dump's CRIU, as an engine hears them."""

    def __init__(self, kind: str, pid: int) -> None:
        self.told = told = Told()
        handover: Any = told
        self.source: ProcessSource | Contained
        if kind == "process":
            self.source = ProcessSource(pid, ProcessOptions.model_validate({}), 4)
            local = self.source.local(handover, Cancellation())
            assert isinstance(local, ProcessLocal)
            self.begins, self.stands = local.pre_dump, local.post_dump
        else:
            self.source = Contained(pid)
            container = self.source.local(handover, Cancellation())
            assert isinstance(container, OciLocal)
            self.begins = lambda: container._on("pre-dump")
            self.stands = lambda: container._on("post-dump")
        self.source.look()


@pytest.mark.parametrize("kind", ["process", "container"])
def test_a_tree_that_changes_until_it_is_frozen(
    victim: Victim, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    released: list[list[Any]] = []

    def release(found: Sequence[Any], **_: object) -> list[str]:
        released.append(list(found))
        return []

    monkeypatch.setattr(netlock, "release", release)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        before = int(victim.tell(f"connect {port}"))
        dump = Dump(kind, victim.pid)
        dump.begins()
        # Hooks run, files are carried a last time: then only comes the freeze.
        late = int(victim.tell("fork"))
        assert victim.tell("end") == "ended\n"
        after = int(victim.tell(f"connect {port}"))
        dump.stands()
        begun, stood = dump.told.identities
        assert [pid for pid, _ in begun["members"]] == [victim.pid, *victim.children]
        # What is held, and found again by a recovery; one that is gone is nobody's.
        assert [pid for pid, _ in stood["members"]] == [victim.pid, late]
        assert dump.source.processes() == [victim.pid, late]
        assert dump.source.identity() == stood
        # Network locks are those of the connections that were dumped.
        assert {local for _, local, _, _ in stood["connections"]} == {before, after}
        successor = Dump(kind, victim.pid).source
        successor.recall(json.loads(json.dumps(stood)))
        for half in (dump.source, successor):
            half.rollback()
            assert {local for _, local, _, _ in released.pop()} == {before, after}
            assert not half.gone()
    # The child that was begun last is ended with the rest.
    os.kill(victim.pid, signal.SIGKILL)
    victim.process.wait(20)
    assert successor.gone()
    assert not successor.dead()
    successor.end_rest()
    successor.await_end()
    assert successor.dead()


@pytest.mark.parametrize("kind", ["process", "container"])
def test_a_tree_that_ended_until_it_was_frozen(victim: Victim, kind: str) -> None:
    dump = Dump(kind, victim.pid)
    dump.begins()
    os.killpg(victim.pid, signal.SIGKILL)
    victim.process.wait(20)
    with pytest.raises(TargetGone):
        dump.stands()
    assert len(dump.told.identities) == 1
