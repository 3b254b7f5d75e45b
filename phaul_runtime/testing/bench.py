"""The bench: one engine's two halves, in one process on one host, without agent and transport."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from phaul_runtime.criu.session import Criu, CriuFeatures
from phaul_runtime.engine.interface import DestinationHalf, Handover, SourceHalf
from phaul_runtime.errors import PhaulError
from phaul_runtime.library.api import Outcome, PhaulConfig, PhaulRemote
from phaul_runtime.library.client import PhaulClient
from phaul_runtime.library.policy import Decision, Round
from phaul_runtime.library.server import PhaulServer
from phaul_runtime.memory.image_dirs import image_files, new_directory, remove_tree
from phaul_runtime.report import MigrationReport
from phaul_runtime.system import cgroup
from phaul_runtime.system.cancel import Cancellation
from phaul_runtime.testing.case import Case, NotConforming, Place, Told, expect

HOLD_S = 120.0
_POLL_S = 0.02
_ROUNDS = 2


def as_json(value: Mapping[str, Any], what: str) -> dict[str, Any]:
    """A mapping as it comes out at the other end of a channel or of a journal.

    Raises:
        NotConforming: it has values that JSON does not have, or changes on the way.
    """
    try:
        found: dict[str, Any] = json.loads(json.dumps(dict(value)))
    except (TypeError, ValueError) as error:
        raise NotConforming(f"{what} is not JSON: {error}") from error
    expect(found == dict(value), f"{what} changes on its way through JSON: {value!r}")
    return found


class NoCriu(Criu):
    """For engines that need none: a client with it skips pre-copy."""

    def feature_check(self) -> CriuFeatures:
        """See `Criu`: nothing can be done."""
        return CriuFeatures(mem_track=False, lazy_pages=False, pidfd_store=False)


class _Rounds:
    """So many pre-dumps."""

    def decide(self, rounds: Sequence[Round]) -> Decision:
        return Decision(len(rounds) < _ROUNDS, f"{_ROUNDS} rounds", None)


class _Remote(PhaulRemote):
    """The other side is in this process, and so is its server if there is one."""

    def __init__(self, server: PhaulServer | None) -> None:
        self._server = server

    def start_iter(self) -> None:
        if self._server is not None:
            self._server.start_iter()

    def stop_iter(self) -> None:
        if self._server is not None:
            self._server.stop_iter()

    def failure(self) -> PhaulError | None:
        return None if self._server is None else self._server.failure

    def end_chain(self) -> None:
        if self._server is not None:
            self._server.end_chain()


class RecordingHandover(Handover):
    """A `Handover` that notes each step, and holds the engine to what has to be true in it.

    Attributes:
        steps: what was called, in order.
        identity: as given to `freezing`.
        broken: what the engine did wrong; raised once more by `Move.run`, since CRIU's callbacks
            turn any error into a veto.
    """

    def __init__(self, move: Move) -> None:
        self._move = move
        self._committing = False
        self.steps: list[str] = []
        self.identity: dict[str, Any] = {}
        self.broken: NotConforming | None = None
        self._stopped_at: int | None = None

    @property
    def committing(self) -> bool:
        return self._committing

    post_copy = held = False

    @contextlib.contextmanager
    def _step(self, name: str, before: Sequence[str]) -> Iterator[None]:
        had = list(self.steps)
        self.steps.append(name)
        try:
            expect(had == list(before), f"{name} was called after {had or 'nothing'}")
            yield
        except NotConforming as error:
            self.broken = self.broken or error
            raise

    def freezing(self, identity: Mapping[str, Any]) -> None:
        with self._step("freezing", []):
            self.identity = as_json(identity, "the identity")
            self._move.at_freezing()

    def stopped(self) -> None:
        if self.steps != ["freezing"]:
            self.broken = self.broken or NotConforming(f"stopped was called after {self.steps}")
        self._stopped_at = self._move.bench.counter(Place.SOURCE)

    def prepare(self, images_dir: Path, identity: Mapping[str, Any] | None = None) -> int:
        with self._step("prepare", ["freezing"]):
            bench = self._move.bench
            expect(bench.case.alive(Place.SOURCE), "the source's copy is dead before commit")
            bench.stands(Place.SOURCE, "in the freeze")
            now = bench.counter(Place.SOURCE)
            expect(
                self._stopped_at in (None, now),
                f"stopped was called, and the source ran on: {self._stopped_at} > {now}",
            )
            if identity is not None:
                self.identity = as_json(identity, "the identity in the freeze")
            there = self._move.take(images_dir)
            self._move.before_restore()
            pid = self._move.restore(there)
            self._move.after_restore(there)
            self._committing = True
            return pid

    def commit(self, source_is_dead: Callable[[], bool], frozen_at: float | None = None) -> Outcome:
        with self._step("commit", ["freezing", "prepare"]):
            expect(self._committing, "commit was called although prepare had raised")
            bench = self._move.bench
            bench.until("the source's copy is dead, in commit", source_is_dead)
            expect(
                not bench.case.alive(Place.SOURCE),
                "commit was called, and the source said to be dead, while its copy lives",
            )
            bench.stands(Place.DESTINATION, "before resume")
            resumed_at = self._move.destination.resume()
            expect(
                isinstance(resumed_at, float) and resumed_at <= time.monotonic(),
                f"resume() returned {resumed_at!r}, not a time.monotonic() that has been",
            )
            return Outcome(restored_pid=self._move.pid)


class Move:
    """One migration of the bench's victim: what client, agent and both halves need.

    Hooks may be replaced: `at_freezing`, `before_restore`, `after_restore(images_dir)`.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        case = bench.case
        self.id = secrets.token_hex(8)
        self.directory = new_directory(bench.directory, "move")
        self.source = bench.source()
        self.inspection = self.source.inspect()
        self.manifest = bench.manifest(self.inspection.manifest)
        self.destination = bench.destination()
        self.destination.prepare(self.manifest, self.id)
        self.pid = 0
        self.at_freezing: Callable[[], object] = lambda: None
        self.before_restore: Callable[[], object] = lambda: None
        self.after_restore: Callable[[Path], object] = lambda _: None
        self._carry_first()
        self._carry()
        self._ours, self._theirs = socket.socketpair()
        criu = case.criu()
        self.criu = criu or NoCriu()
        for name in ("client", "server"):
            (self.directory / name).mkdir(mode=0o700)
        self._server: PhaulServer | None = None
        if criu is not None:
            self._server = PhaulServer(
                PhaulConfig(0, self._theirs.fileno(), str(self.directory / "server")), criu
            )
        self.begin()

    def begin(self) -> None:
        """A new handover; at the first attempt a new client too."""
        self.handover = RecordingHandover(self)
        self.client = PhaulClient(
            self.source.local(self.handover, Cancellation()),
            _Remote(self._server),
            PhaulConfig(self.inspection.pid, self._ours.fileno(), str(self.directory / "client")),
            policy=_Rounds(),
            criu=self.criu,
        )

    def again(self) -> None:
        """After a failure: the same client may `run` once more, with a new handover."""
        self.handover = RecordingHandover(self)
        self.client.local = self.source.local(self.handover, Cancellation())

    def _carry_first(self) -> None:
        for tree in (tree for tree in self.inspection.trees if tree.first):
            places = self.destination.trees()
            if tree.name not in places:
                continue
            try:
                self.source.stage(tree.name, Cancellation())
                expect(
                    Path(tree.path).is_dir(),
                    f"stage() made no directory for the tree {tree.name}: {tree.path}",
                )
                self.bench.case.carry([tree], places)
                self.destination.arrived(tree.name, Cancellation())
            finally:
                self.source.unstage(tree.name)

    def _carry(self) -> None:
        trees = [tree for tree in self.inspection.trees if not tree.first]
        if trees:
            places = self.destination.trees()
            missing = [tree.name for tree in trees if tree.name not in places]
            expect(not missing, f"the destination half has no place for the trees {missing}")
            self.bench.case.carry(trees, places)

    def take(self, images_dir: Path) -> Path:
        """The final images, as an agent takes them; returns the directory to restore from."""
        self._carry()
        if self._server is None:
            return images_dir
        there = Path(self._server.last_images_dir or "")
        for image in image_files(images_dir):
            shutil.copy(image, there)
        self._server.stop_iter()
        return there

    def restore(self, images_dir: Path) -> int:
        """Restore, and look that it is held."""
        case = self.bench.case
        self.pid = self.destination.restore(self.criu, images_dir)
        expect(
            isinstance(self.pid, int) and Path(f"/proc/{self.pid}").exists(),
            f"restore() returned {self.pid!r}, which is no pid on this host",
        )
        expect(case.alive(Place.DESTINATION), "restore() returned, and nothing is held")
        self.bench.stands(Place.DESTINATION, "while it is held")
        return self.pid

    def run(self) -> MigrationReport:
        """Migrate.

        Raises:
            NotConforming: the engine broke its contract.
            PhaulError: the engine raised it, which may be right.
        """
        try:
            report = self.client.migrate()
        except BaseException as error:
            if self.handover.broken is not None and self.handover.broken is not error:
                raise self.handover.broken from error
            raise
        broken = self.handover.broken
        if broken is not None:
            raise broken
        return report

    def fails(self) -> PhaulError:
        """Migrate where that has to fail; returns with what."""
        try:
            self.run()
        except PhaulError as error:
            steps = self.handover.steps
            expect("commit" not in steps, f"it failed, and yet went through {steps}")
            return error
        raise NotConforming("dump_copy_restore() returned although the handover raised")

    def give_up(self) -> None:
        """What follows a failure on both sides; each step twice, since it is idempotent."""
        if self._server is not None:
            self._server.abort()
        for _ in range(2):
            self.source.rollback()
        for _ in range(2):
            self.destination.discard()
        for _ in range(2):
            self.destination.undo()

    def close(self) -> None:
        """Leave nothing of the bench's own; idempotent."""
        if self._server is not None:
            self._server.abort()
        self._ours.close()
        self._theirs.close()
        remove_tree(self.directory)

    def __enter__(self) -> Move:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            # So that nothing of an engine that failed a check keeps the next from working.
            with contextlib.suppress(Exception):
                self.give_up()
        self.close()


class Bench:
    """Runs checks on an engine.

    Args:
        case: of the engine.
        directory: for images, private; best on tmpfs.
    """

    def __init__(self, case: Case, directory: Path) -> None:
        self.case = case
        self.directory = directory
        self._target = ""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def __enter__(self) -> Bench:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every victim; idempotent."""
        self._target = ""
        self.case.clear()

    def run(self, check: Callable[[Bench], None]) -> None:
        """Run one check; the victim of one that passed and left it running is the next's too.

        Raises:
            NotConforming: the engine failed it.
        """
        try:
            check(self)
        except BaseException:
            self.close()
            raise

    # -- what checks are made of -----------------------------------------------------------

    def target(self) -> str:
        """A victim that runs at the source."""
        if not self._target or not self.case.alive(Place.SOURCE):
            self.close()
            self._target = self.case.start()
            self.goes_on(Place.SOURCE)
        return self._target

    def _options(self) -> Any:
        return self.case.engine.options_model.model_validate(dict(self.case.options))

    def source(self, target: str | None = None) -> SourceHalf:
        """A new source half, for the victim or another target."""
        name = self.target() if target is None else target
        return self.case.engine.source(name, self._options(), criu_log_level=4)

    def destination(self) -> DestinationHalf:
        """A new destination half."""
        return self.case.engine.destination(self._options(), criu_log_level=4, hold_s=HOLD_S)

    def manifest(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """A manifest as the destination gets it."""
        return as_json(self.case.there(as_json(manifest, "the manifest")), "the manifest there")

    def until(self, what: str, condition: Callable[[], bool]) -> None:
        """Wait until something is true.

        Raises:
            NotConforming: it did not become so in time.
        """
        deadline = time.monotonic() + self.case.within_s
        while not condition():
            if time.monotonic() > deadline:
                raise NotConforming(f"not within {self.case.within_s:g} s: {what}")
            time.sleep(_POLL_S)

    def _told(self, place: Place) -> Told:
        return self.case.told(place) or Told(0, 0, 0)

    def counter(self, place: Place) -> int:
        """How far the copy there is."""
        return self._told(place).counter

    def stands(self, place: Place, when: str) -> None:
        """The copy there does not run."""
        before = self._told(place).counter
        time.sleep(self.case.pause_s)
        after = self._told(place).counter
        expect(before == after, f"the {place.value}'s copy runs {when}: {before} > {after}")

    def goes_on(self, place: Place) -> None:
        """The copy there runs."""
        self.until(f"the {place.value}'s copy runs", lambda: self.case.alive(place))
        before = self._told(place).counter
        self.until(
            f"the {place.value}'s copy goes on counting", lambda: self._told(place).counter > before
        )

    def is_whole(self, place: Place) -> None:
        """The copy there runs, and all of its memory, verified from now on, is right."""
        self.goes_on(place)
        wanted = self._told(place).passes + 2
        self.until(
            f"the {place.value}'s copy verifies all of its memory",
            lambda: self._told(place).passes >= wanted,
        )
        wrong = self._told(place).wrong
        expect(wrong == 0, f"the {place.value}'s copy has {wrong} wrong pages")

    def runs_on(self) -> None:
        """After a failure: the source's copy is whole, and there is no other."""
        self.is_whole(Place.SOURCE)
        expect(not self.case.alive(Place.DESTINATION), "a copy lives at the destination too")

    def nothing_there(self, migration_id: str, *, undone: bool) -> None:
        """Nothing is left at the destination."""
        found = [f"pid {pid} in cgroup {migration_id}" for pid in cgroup.members(migration_id)]
        found += self.case.leftovers(undone=undone)
        after = "undo" if undone else "discard"
        expect(not found, f"left at the destination after {after}: {', '.join(found)}")


def read_line(fd: int, within_s: float) -> str:
    """A line that another process writes; empty if there was none in time."""
    deadline = time.monotonic() + within_s
    os.set_blocking(fd, False)
    data = b""
    while not data.endswith(b"\n") and time.monotonic() < deadline:
        try:
            part = os.read(fd, 1 << 16)
        except BlockingIOError:
            time.sleep(_POLL_S)
            continue
        if not part:
            break
        data += part
    return data.decode()


__all__ = [
    "HOLD_S",
    "Bench",
    "Move",
    "NoCriu",
    "RecordingHandover",
    "as_json",
    "read_line",
]
