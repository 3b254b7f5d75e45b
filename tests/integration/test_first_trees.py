"""Trees that are made for the move and go before the others, by the real rsync."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from phaul_runtime.config.model import Config, CriuConfig, FilesystemConfig, TimeoutsConfig
from phaul_runtime.criu.session import Criu
from phaul_runtime.cutover.journal import Journal
from phaul_runtime.cutover.states import Role, State, Verdict
from phaul_runtime.engine import Inspection
from phaul_runtime.engine.targets import Tree
from phaul_runtime.errors import Cancelled, DestinationError, MigrationFailed, PhaulError
from phaul_runtime.events import Staging, TreeProgress, TreeSynced, Warned
from phaul_runtime.files import tree_sender as trees_module
from phaul_runtime.files.tree_sender import STAGED
from phaul_runtime.hooks.lifecycle import Hooks
from phaul_runtime.recovery.resolve import Settler
from phaul_runtime.rpc import phaul_pb2 as pb
from phaul_runtime.source.carry import TreeCarrier
from phaul_runtime.source.migration import Migration
from phaul_runtime.source.preflight import Checked, Hosts
from phaul_runtime.system.cancel import Cancellation
from tests.integration.test_trees import (
    ID,
    FakeDestination,
    FakeEngine,
    Move,
    Options,
    fail,
    mark,
    rsyncs,
    wait,
)

MIGRATION = "3f" * 8


class ImageDestination(FakeDestination):
    """Knows where the rest goes once it has the image, as an engine that has to load it."""

    def __init__(self, places: Mapping[str, Path], image: Path) -> None:
        super().__init__(places)
        self.image = image
        self.found: list[str] = []
        self.others: list[Path] = []
        self.needed, self.loaded = True, False
        self.at_arrival: Callable[[Cancellation], object] = lambda _: None

    def trees(self) -> Mapping[str, Path]:
        image = {"image": self.image} if self.needed else {}
        return {**image, **(self._places if self.loaded else {})}

    def arrived(self, name: str, cancellation: Cancellation) -> None:
        self.calls.append(f"arrived {name}")
        self.found = sorted(path.name for path in self.image.iterdir())
        self.others = [path for path in self._places.values() if path.exists()]
        self.at_arrival(cancellation)
        self.loaded = True


class ImageSource:
    """The little of an engine's source half that comes before CRIU, and makes an image."""

    def __init__(self, path: Path, calls: list[str]) -> None:
        self.path = path
        self.calls = calls
        self.at_staging: Callable[[Cancellation], object] = lambda _: None

    def stage(self, name: str, cancellation: Cancellation) -> None:
        self.calls.append(f"stage {name}")
        self.path.mkdir()
        for layer in ("one", "two"):
            (self.path / layer).write_text(layer)
        self.at_staging(cancellation)

    def unstage(self, name: str) -> None:
        self.calls.append(f"unstage {name}")
        shutil.rmtree(self.path, ignore_errors=True)

    def identity(self) -> dict[str, Any]:
        return {}

    def recall(self, identity: Mapping[str, Any]) -> None:
        pass

    def local(self, handover: Any, cancellation: Cancellation) -> Any:
        return None

    def mapped(self) -> dict[str, list[str]]:
        return {}

    def gone(self) -> bool:
        return False

    def rollback(self) -> None:
        self.calls.append("rollback")


class ImageMove(Move):
    """A migration whose `run` ends, if all goes well, where CRIU would begin."""

    half: ImageDestination

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(tmp_path, monkeypatch)
        self.root = tmp_path
        (self.here / "x").write_text("x")
        self.half.calls.clear()
        self.source: Any = ImageSource(tmp_path / "staged", self.half.calls)
        self.image = Tree("image", str(self.source.path), first=True)

    def destination(self, tmp_path: Path) -> FakeDestination:
        return ImageDestination({"rootfs": self.there}, tmp_path / "made" / "image")

    def migration(self, rootfs: Literal["rsync", "shared"] = "rsync") -> Any:
        config = Config(
            state_dir=str(self.root / "state here"), criu=CriuConfig(binary="no-such-criu"),
            filesystem=FilesystemConfig(rootfs=rootfs), timeouts=TimeoutsConfig(heartbeat_s=0.2),
        )  # fmt: skip
        found: Any = Migration(
            config, "web", self.told.append, id=MIGRATION, cancellation=self.cancellation
        )
        return found

    def checked(self, inspection: Inspection) -> Checked:
        facts = pb.HostFacts(rsync=True, page_format=1)
        return Checked(Hosts(facts, facts, "b"), self.source, Options(), inspection)

    def run(self, rootfs: Literal["rsync", "shared"] = "rsync") -> PhaulError:
        """Move as far as that goes, and give up; returns why."""
        migration = self.migration(rootfs)
        inspection = Inspection(1, 0, trees=[Tree("rootfs", str(self.here)), self.image])
        session: Any = SimpleNamespace(
            certificate="",
            agent=self.remote, make_workdir=lambda: self.root,
            open_memory=lambda: self.channel.open_memory(MIGRATION), cut_memory=lambda _: None,
        )  # fmt: skip
        with pytest.raises(PhaulError) as caught:
            migration._move(session, FakeEngine(self.half), self.checked(inspection))
        self.reached = self.half.calls[:]
        self.carried = (self.there / "x").exists()
        if "cannot start no-such-criu" in str(caught.value):
            migration._begun.cut_over.destination.sync_files()
        migration.roll_back(session, caught.value)
        migration._begun.journal.close()
        return caught.value

    def is_undone(self) -> None:
        assert self.half.calls[-3:] == ["rollback", "discard", "undo"]
        assert not self.source.path.exists()
        assert not (self.root / "made").exists()


@pytest.fixture
def move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ImageMove]:
    mark(tmp_path, monkeypatch)
    found = ImageMove(tmp_path, monkeypatch)
    yield found
    found.remote.close()
    found.agent.stop()
    wait(lambda: not rsyncs())


@contextlib.contextmanager
def meanwhile(action: Callable[[], object]) -> Iterator[None]:
    thread = threading.Thread(target=action)
    thread.start()
    yield
    thread.join()


WELL = ["prepare", "stage image", "arrived image", "unstage image"]


@pytest.mark.parametrize("rootfs", ["rsync", "shared"])
def test_it_is_made_and_taken_in_before_the_others_go(
    move: ImageMove, rootfs: Literal["rsync", "shared"]
) -> None:
    assert "cannot start no-such-criu" in str(move.run(rootfs))
    assert move.reached == WELL
    assert move.half.found == ["one", "two"]
    assert move.half.others == []
    assert move.carried == (rootfs == "rsync")
    told = [
        (type(event), event.tree, getattr(event, "final", None))
        for event in move.told
        if isinstance(event, (Staging, TreeSynced))
    ]
    first: list[Any] = [(Staging, "image", None), (TreeSynced, "image", False)]
    rest = [(TreeSynced, "rootfs", False), (TreeSynced, "rootfs", True)]
    # Once, and not again in the freeze.
    assert told == (first + rest if rootfs == "rsync" else first)
    move.is_undone()


def test_its_bytes_count(move: ImageMove) -> None:
    places = move.remote.open(
        MIGRATION,
        engine="fake",
        target="web",
        manifest={},
        options={},
        lost_s=600,
        log_level=4,
        restore="full",
        page_format=1,
    )
    with Journal.create(move.root / "state here", MIGRATION, Role.SOURCE) as journal:
        carrier = TreeCarrier(
            move.carriage, "b", move.source,
            journal=journal, listener=move.told.append, cancellation=move.cancellation,
            same_host=True,
        )  # fmt: skip
        sent = carrier.carry([move.image], places)
        assert journal.facts[STAGED] == ["image"]
    (synced,) = (event for event in move.told if isinstance(event, TreeSynced))
    assert sent == synced.bytes > 0
    assert move.carriage.sync_files() == (0, 0)


def test_what_is_not_needed_there_is_not_made(move: ImageMove) -> None:
    move.half.needed, move.half.loaded = False, True
    move.run()
    assert move.reached == ["prepare"]
    assert move.carried
    assert not any(isinstance(event, Staging) for event in move.told)


def test_what_is_at_its_place_already_is_not_made(move: ImageMove) -> None:
    move.half.image = move.source.path
    with pytest.raises(DestinationError, match="no place for the tree rootfs"):
        raise move.run()
    assert move.reached == ["prepare"]


def test_without_its_place_another_tree_fails_the_move(move: ImageMove) -> None:
    move.half._places = {}
    with pytest.raises(DestinationError, match="no place for the tree rootfs"):
        raise move.run()
    assert move.reached == WELL
    move.is_undone()


def test_rsync_has_to_be_there_only_for_what_is_needed_for_sure(move: ImageMove) -> None:
    migration = move.migration()
    hosts = Hosts(pb.HostFacts(boot_id="1"), pb.HostFacts(boot_id="2"), "b")
    session: Any = SimpleNamespace(agent=move.remote)
    levels = []
    for trees in ([move.image], [move.image, Tree("rootfs", str(move.here))]):
        found, _ = migration._of_target(session, hosts, move.source, Inspection(1, 0, trees=trees))
        levels.append({f.finding.level for f in found if f.finding.check == "rsync"})
    assert levels == [{"warning"}, {"refused"}]


# -- failures ------------------------------------------------------------------------------


def raising(error: Exception) -> Callable[[Cancellation], object]:
    def action(_: Cancellation) -> None:
        raise error

    return action


def test_what_cannot_be_made_is_removed(move: ImageMove) -> None:
    error = MigrationFailed("no room for it")
    move.source.at_staging = raising(error)
    assert move.run() is error
    assert move.reached == ["prepare", "stage image", "unstage image"]
    move.is_undone()


def test_cancelling_ends_its_making(move: ImageMove) -> None:
    def staging(cancellation: Cancellation) -> None:
        cancellation.request()
        cancellation.check()

    move.source.at_staging = staging
    assert isinstance(move.run(), Cancelled)
    assert move.reached == ["prepare", "stage image", "unstage image"]
    move.is_undone()


def test_a_cancellation_that_its_making_overlooked_counts(move: ImageMove) -> None:
    move.source.at_staging = lambda cancellation: cancellation.request()
    assert isinstance(move.run(), Cancelled)
    assert not any(isinstance(event, TreeSynced) for event in move.told)
    move.is_undone()


@pytest.mark.parametrize("code", [23, 24])
def test_only_what_is_whole_arrives(
    move: ImageMove, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    bin_dir = move.root / "bin"
    bin_dir.mkdir()
    wrapper = bin_dir / "rsync"
    wrapper.write_text(f'#!/bin/sh\n{shutil.which("rsync")} "$@" || exit\n'
                       f'case "$1" in --server) ;; *) exit {code};; esac\n')  # fmt: skip
    wrapper.chmod(0o755)
    environment = {**os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}"}
    monkeypatch.setattr(trees_module, "rsync_environment", lambda: environment)
    assert f"tree image: rsync ended with code {code}" in str(move.run())
    assert move.reached == ["prepare", "stage image", "unstage image"]
    move.is_undone()


def test_what_is_of_no_use_there_fails_the_move(move: ImageMove) -> None:
    move.half.at_arrival = raising(DestinationError("a layer is damaged"))
    error = move.run()
    assert isinstance(error, DestinationError)
    assert (error.message, error.host) == ("a layer is damaged", "b")
    assert move.reached == WELL
    assert not move.carried
    move.is_undone()


def test_what_is_left_at_the_source_is_a_warning(
    move: ImageMove, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(move.source, "unstage", raising(MigrationFailed("it is busy")))
    assert "cannot start no-such-criu" in str(move.run())
    (warned,) = (event for event in move.told if isinstance(event, Warned))
    assert warned.text == "tree image is left on this host: it is busy"


class Slow:
    """An arrival that ends only if it is asked to."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.asked = False

    def __call__(self, cancellation: Cancellation) -> None:
        end = threading.Event()
        with cancellation.interrupt_with(end.set):
            self.begun.set()
            self.asked = end.wait(30)
        cancellation.check()


def test_heartbeats_go_on_while_it_is_taken_in(move: ImageMove) -> None:
    def arrival(_: Cancellation) -> None:
        incoming = move.agent.service.find(MIGRATION)
        seen = {incoming.seen}

        def heard() -> bool:
            seen.add(incoming.seen)
            return len(seen) > 2

        wait(heard)

    move.half.at_arrival = arrival
    assert "cannot start no-such-criu" in str(move.run())
    assert move.reached == WELL


def test_cancelling_ends_its_taking_in(move: ImageMove) -> None:
    slow = move.half.at_arrival = Slow()

    def cancel() -> None:
        assert slow.begun.wait(30)
        move.cancellation.request()

    with meanwhile(cancel):
        assert isinstance(move.run(), Cancelled)
    assert slow.asked
    assert "arrived image" in move.reached
    move.is_undone()


def test_losing_the_client_ends_its_taking_in(move: ImageMove) -> None:
    slow = move.half.at_arrival = Slow()

    def lose() -> None:
        assert slow.begun.wait(30)
        move.agent.service.find(MIGRATION).lost_s = 0.0

    with meanwhile(lose):
        assert isinstance(move.run(), MigrationFailed)
    assert slow.asked
    assert not move.half.image.exists()
    assert not move.source.path.exists()


def test_an_agent_lost_meanwhile_is_told(move: ImageMove, monkeypatch: pytest.MonkeyPatch) -> None:
    def staging(_: Cancellation) -> None:
        monkeypatch.setattr(move.remote._stub, "Beat", fail)
        move.remote.beat_every(0.01, 0.0, print)
        wait(lambda: move.remote._silent is not None)

    move.source.at_staging = staging
    assert "no sign of life" in str(move.run())
    assert move.reached == ["prepare", "stage image", "unstage image"]
    assert not any(isinstance(event, TreeSynced) for event in move.told)


def test_only_a_known_tree_arrives_and_only_before_the_freeze(move: ImageMove) -> None:
    def arrive(name: str) -> None:
        move.remote._call(
            move.remote._stub.Arrived.future, pb.ArrivedRequest(id=ID, name=name), 30.0
        )

    for name in ("", "none", "rootfs"):
        with pytest.raises(DestinationError, match=f"no tree '{name}'"):
            arrive(name)
    move.agent.service.find(ID).journal.enter(State.FROZEN)
    with pytest.raises(DestinationError, match="the migration is frozen"):
        arrive("image")
    assert "arrived image" not in move.half.calls


def test_a_recovery_removes_what_was_made(move: ImageMove, monkeypatch: pytest.MonkeyPatch) -> None:
    state_dir = move.root / "state here"
    with Journal.create(state_dir, MIGRATION, Role.SOURCE) as journal:
        journal.enter(State.ITERATING, engine="fake", target="web", options={}, identity={})
        journal.add(STAGED, "image")
    move.source.stage("image", Cancellation())
    monkeypatch.setattr(FakeEngine, "source", lambda *_, **__: move.source)
    settler = Settler(
        state_dir, move.workdir, Criu("no-such-criu"), Hooks(), lambda _: FakeEngine(move.half)
    )
    settled = settler.settle(MIGRATION, Role.SOURCE, Verdict.DISCARD)
    assert settled.warnings == ()
    assert not move.source.path.exists()
    assert move.half.calls == ["stage image", "unstage image", "rollback"]


# -- progress ------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_what_takes_its_time_tells_how_far_it_is(
    move: ImageMove, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    monkeypatch.setattr(trees_module, "_TELL_S", 0.01)
    size = 96 << 20

    def fill(directory: Path) -> None:
        (directory / "big").write_bytes(os.urandom(size))

    if first:
        move.source.at_staging = lambda _: fill(move.source.path)
    else:
        fill(move.here)
    move.run()
    name = "image" if first else "rootfs"
    events = [e for e in move.told if isinstance(e, (TreeProgress, TreeSynced)) and e.tree == name]
    first_pass = itertools.takewhile(lambda e: isinstance(e, TreeProgress), events)
    told = [event.bytes for event in first_pass]
    assert len(told) > 1
    assert told == sorted(told)
    assert 1 << 20 < told[-1] < size * 1.1
