"""The fake engine passes the conformance suite, and an engine that breaks its contract does not."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from phaul_runtime.criu.session import Criu
from phaul_runtime.engine import DestinationHalf, Finding, Handover, Inspection, SourceHalf
from phaul_runtime.errors import MigrationFailed, PhaulError, Refused
from phaul_runtime.library.api import Outcome, PhaulConfig, PhaulLocal
from phaul_runtime.system.cancel import Cancellation
from phaul_runtime.testing import CHECKS, Bench, Check, FakeCase, FakeEngine, NotConforming, Place
from phaul_runtime.testing.bench import Move
from phaul_runtime.testing.fake import HELD, FakeDestination, FakeLocal, FakeSource


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    root = tmp_path_factory.mktemp("fake")
    with Bench(FakeCase(root / "victims"), root / "bench") as found:
        yield found


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_fake_conforms(bench: Bench, check: Check) -> None:
    bench.run(check)


def test_its_discard_is_as_harmful_as_that_of_a_real_engine(tmp_path: Path) -> None:
    """An object that let nothing run ends whatever it finds, as in the cgroup of a process.

    Without, no test over this engine would see a core that has what runs discarded.
    """
    with Bench(FakeCase(tmp_path / "victims"), tmp_path / "bench") as bench, Move(bench) as move:
        move.run()
        assert bench.case.alive(Place.DESTINATION)
        successor = FakeEngine().destination(None, criu_log_level=4, hold_s=1.0)
        successor.prepare(move.manifest, move.id)
        successor.discard()
        assert not bench.case.alive(Place.DESTINATION)


# -- a broken engine is seen -------------------------------------------------------------------


class CommitsWhileTheSourceLives(FakeLocal):
    def give_up(self, connection: socket.socket, frozen_at: float) -> Outcome:
        outcome = self.handover.commit(lambda: True, frozen_at)
        connection.sendall(b"die\n")
        return outcome


class KillsBeforePrepare(FakeLocal):
    def write(self, image: Path, memory: dict[str, Any]) -> None:
        super().write(image, memory)
        os.kill(self.source.identity()["pid"], signal.SIGKILL)
        while not self.source.gone():
            time.sleep(0.01)


class LosesAPage(FakeLocal):
    def write(self, image: Path, memory: dict[str, Any]) -> None:
        memory["pages"][7] = ""
        super().write(image, memory)


class HidesTheReason(FakeLocal):
    def dump_copy_restore(
        self, criu: Criu, config: PhaulConfig, last_client_images_dir: str | None
    ) -> Outcome:
        try:
            return super().dump_copy_restore(criu, config, last_client_images_dir)
        except PhaulError as error:
            raise MigrationFailed("something went wrong") from error


class KeepsItFrozen(FakeLocal):
    frozen: socket.socket

    def _connect(self) -> socket.socket:
        connection = super()._connect()
        KeepsItFrozen.frozen = connection.dup()
        return connection


class NeverForgetsTheFailure(FakeLocal):
    def write(self, image: Path, memory: dict[str, Any]) -> None:
        if image.parent.name != "final":
            memory["pages"] = memory["pages"][:1] * len(memory["pages"])
        super().write(image, memory)


class SaysOtherThings(FakeSource):
    calls = 0

    def inspect(self) -> Inspection:
        SaysOtherThings.calls += 1
        found = super().inspect()
        return Inspection(found.pid, found.memory, manifest={"path": f"{self.calls}"})


class UnknownLevel(FakeSource):
    def inspect(self) -> Inspection:
        found = super().inspect()
        findings = [Finding("target", "fine", "it is")]
        return Inspection(found.pid, found.memory, manifest=found.manifest, findings=findings)


class NoJson(FakeSource):
    def identity(self) -> Mapping[str, Any]:
        return {**super().identity(), "path": self.directory}


class RefusesWhatIsMissing(FakeSource):
    def inspect(self) -> Inspection:
        try:
            return super().inspect()
        except PhaulError as error:
            raise Refused(error.message) from error


class ForgetsWhoItWas(FakeSource):
    def recall(self, identity: Mapping[str, Any]) -> None:
        pass


class NeverGone(FakeSource):
    def gone(self) -> bool:
        return False

    def end_rest(self) -> None:
        pass


class MakesItAtOnce(FakeSource):
    def inspect(self) -> Inspection:
        found = super().inspect()
        self.stage("image", Cancellation())
        return found


class StagesNothing(FakeSource):
    def stage(self, name: str, cancellation: Cancellation) -> None:
        cancellation.check()


class CannotBeStopped(FakeSource):
    def stage(self, name: str, cancellation: Cancellation) -> None:
        super().stage(name, Cancellation())


class LeavesWhatItMade(FakeSource):
    def unstage(self, name: str) -> None:
        pass


class RemovesOnlyItsOwn(FakeSource):
    staged = False

    def stage(self, name: str, cancellation: Cancellation) -> None:
        self.staged = True
        super().stage(name, cancellation)

    def unstage(self, name: str) -> None:
        if self.staged:
            super().unstage(name)


class MissesTheArrival(FakeDestination):
    def arrived(self, name: str, cancellation: Cancellation) -> None:
        pass


class RunsAtOnce(FakeDestination):
    def restore(self, criu: Criu, images_dir: Path, *, lazy: bool = False) -> int:
        pid = super().restore(criu, images_dir)
        super().resume()
        return pid


class NeverRuns(FakeDestination):
    def resume(self) -> float:
        return 0.0


class LeavesHalfARestore(FakeDestination):
    def restore(self, criu: Criu, images_dir: Path, *, lazy: bool = False) -> int:
        try:
            return super().restore(criu, images_dir)
        except PhaulError:
            assert self.directory is not None
            (self.directory / HELD).write_text("{}")
            raise


class RunsWhatIsDiscarded(FakeDestination):
    def resume(self) -> float:
        return 0.0 if self.process is None else super().resume()


class LeavesACopy(FakeDestination):
    def discard(self) -> None:
        pass


class EndsWhatItLetRun(FakeDestination):
    def discard(self) -> None:
        self._resumed = False
        super().discard()


class LeavesItsDirectory(FakeDestination):
    def undo(self) -> None:
        pass


class DiscardsOnce(FakeDestination):
    def discard(self) -> None:
        if self.process is None:
            raise MigrationFailed("there is nothing to discard")
        super().discard()


class TakesTheTaken(FakeDestination):
    def check(self, manifest: Mapping[str, Any]) -> list[Finding]:
        return []


class OutlivesItsDriver(FakeDestination):
    def restore(self, criu: Criu, images_dir: Path, *, lazy: bool = False) -> int:
        pid = super().restore(criu, images_dir)
        assert self.process is not None
        assert self.process.stdin is not None
        # Somebody else holds the end of the pipe, too.
        os.set_inheritable(self.process.stdin.fileno(), True)
        if os.fork() == 0:
            os.execvp("sleep", ["sleep", "8"])
        return pid


class BrokenEngine(FakeEngine):
    """The fake with one part replaced."""

    def __init__(self, part: type) -> None:
        self._part = part

    def source(self, target: str, options: Any, *, criu_log_level: int) -> SourceHalf:
        part = self._part
        if issubclass(part, FakeSource):
            return part(target)
        if not issubclass(part, FakeLocal):
            return FakeSource(target)

        class Source(FakeSource):
            def local(self, handover: Handover, cancellation: Cancellation) -> PhaulLocal:
                local: PhaulLocal = part(self, handover)
                return local

        return Source(target)

    def destination(self, options: Any, *, criu_log_level: int, hold_s: float) -> DestinationHalf:
        if issubclass(self._part, FakeDestination):
            return self._part(hold_s)
        return FakeDestination(hold_s)


@pytest.mark.parametrize(
    ("part", "check", "said"),
    [
        (CommitsWhileTheSourceLives, "it_moves", "while its copy lives"),
        (KillsBeforePrepare, "it_moves", "dead before commit"),
        (LosesAPage, "it_moves", "has 1 wrong pages"),
        (HidesTheReason, "a_failed_prepare_lets_the_source_run", "something went wrong"),
        (HidesTheReason, "cancelled_in_time", "something went wrong"),
        (KeepsItFrozen, "a_failed_prepare_lets_the_source_run", "the source's copy goes on"),
        (NeverForgetsTheFailure, "a_retry_works", "wrong pages"),
        (SaysOtherThings, "inspect_changes_nothing", "and then"),
        (UnknownLevel, "inspect_changes_nothing", "unknown level 'fine'"),
        (NoJson, "identity_finds_the_target", "is not JSON"),
        (NoJson, "it_moves", "is not JSON"),
        (RefusesWhatIsMissing, "no_such_target", "nothing runs in"),
        (ForgetsWhoItWas, "identity_finds_the_target", "gone() says that it does not"),
        (NeverGone, "it_moves", "the source's copy is dead, in commit"),
        (MakesItAtOnce, "inspect_changes_nothing", "has made the tree image"),
        (StagesNothing, "what_is_staged_is_removed", "made no directory"),
        (StagesNothing, "it_moves", "made no directory"),
        (CannotBeStopped, "what_is_staged_is_removed", "although it was cancelled"),
        (LeavesWhatItMade, "what_is_staged_is_removed", "after a cancelled stage() has left"),
        (LeavesWhatItMade, "it_moves", "unstage() has left"),
        (RemovesOnlyItsOwn, "what_is_staged_is_removed", "after stage() has left"),
        (MissesTheArrival, "it_moves", "the image did not arrive"),
        (RunsAtOnce, "it_moves", "runs while it is held"),
        (RunsAtOnce, "a_failed_hold_lets_the_source_run", "runs while it is held"),
        (NeverRuns, "it_moves", "the destination's copy goes on"),
        (EndsWhatItLetRun, "it_moves", "discard() after resume() ended what runs"),
        (LeavesACopy, "discard_leaves_nothing", "left a copy alive"),
        (LeavesACopy, "a_failed_hold_lets_the_source_run", "lives at the destination too"),
        (LeavesHalfARestore, "a_failed_restore_leaves_nothing", "held.json"),
        (RunsWhatIsDiscarded, "discard_leaves_nothing", "had been discarded"),
        (LeavesItsDirectory, "prepare_is_repeated_and_undone", "after undo"),
        (DiscardsOnce, "discard_leaves_nothing", "nothing to discard"),
        (TakesTheTaken, "check_says_what_is_taken", "does not refuse"),
        (OutlivesItsDriver, "the_drivers_death_is_a_no", "no copy at the destination"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_broken_engine_is_seen(part: type, check: str, said: str, tmp_path: Path) -> None:
    case = FakeCase(tmp_path / "victims", BrokenEngine(part))
    case.within_s = 2.0
    checks = {found.__name__: found for found in CHECKS}
    with (
        Bench(case, tmp_path / "bench") as bench,
        pytest.raises((NotConforming, PhaulError)) as seen,
    ):
        bench.run(checks[check])
    assert said in str(seen.value)
