"""The checks: what `engine.SourceHalf` and `engine.DestinationHalf` promise, one by one."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from phaul_runtime.engine.findings import OK, REFUSED, WARNING, Finding
from phaul_runtime.engine.interface import SourceHalf
from phaul_runtime.engine.targets import Tree
from phaul_runtime.errors import Cancelled, DestinationError, NoSuchTarget, PhaulError, Refused
from phaul_runtime.system.cancel import Cancellation
from phaul_runtime.testing.bench import Bench, Move, as_json, read_line
from phaul_runtime.testing.case import NotConforming, Place, expect

Check = Callable[[Bench], None]


def _levels(findings: Sequence[Finding], whose: str) -> None:
    for found in findings:
        expect(
            found.level in (OK, WARNING, REFUSED),
            f"{whose} has a finding {found.check!r} of the unknown level {found.level!r}",
        )
        expect(found.check and found.text, f"{whose} has a finding without a name or text: {found}")


def _raising(error: BaseException) -> Callable[..., NoReturn]:
    def hook(*_: object) -> NoReturn:
        raise error

    return hook


def _failed_with(move: Move, error: Exception) -> None:
    raised = move.fails()
    expect(
        raised is error,
        f"after {move.handover.steps} the handover raised {error!r}, the engine instead: {raised}",
    )


# -- before anything is touched ----------------------------------------------------------------


def inspect_changes_nothing(bench: Bench) -> None:
    """inspect() may be repeated, says the same, and the victim never notices."""
    half = bench.source()
    first, second = half.inspect(), half.inspect()
    as_json(first.manifest, "the manifest")
    expect(
        first.manifest == second.manifest,
        f"inspect() said {first.manifest!r} and then {second.manifest!r}",
    )
    expect(first.pid == second.pid, f"inspect() said pid {first.pid} and then {second.pid}")
    expect(Path(f"/proc/{first.pid}").exists(), f"inspect() said pid {first.pid}: there is none")
    expect(first.memory > 0, f"inspect() said that the victim has {first.memory} bytes of memory")
    _levels(first.findings, "inspect()")
    refused = [found.text for found in first.findings if found.level == REFUSED]
    expect(not refused, f"inspect() refuses the victim: {refused}")
    for tree in first.trees:
        if tree.first:
            expect(not Path(tree.path).exists(), f"inspect() has made the tree {tree.name}")
        else:
            expect(Path(tree.path).is_dir(), f"the tree {tree.name} is no directory: {tree.path}")
    bench.is_whole(Place.SOURCE)


def no_such_target(bench: Bench) -> None:
    """inspect() of what does not exist raises NoSuchTarget, each time."""
    half = bench.source(bench.case.missing())
    for _ in range(2):
        try:
            found = half.inspect()
        except NoSuchTarget:
            continue
        raise NotConforming(f"inspect() of a target that does not exist returned {found}")


def identity_finds_the_target(bench: Bench) -> None:
    """A fresh half that recalls an identity finds the target alive; also without inspect()."""
    half = bench.source()
    half.inspect()
    identity = as_json(half.identity(), "the identity")
    for _ in range(2):
        other = bench.source()
        other.recall(identity)
        expect(not other.gone(), "recall(): the target runs, and gone() says that it does not")
        expect(not other.gone(), "gone() does not say the same twice")
        other.rollback()
        other.rollback()
    bench.is_whole(Place.SOURCE)


def check_changes_nothing(bench: Bench) -> None:
    """check() may be repeated, finds nothing against a fit host, and makes nothing."""
    manifest = bench.manifest(bench.source().inspect().manifest)
    kept = json.dumps(manifest)
    half = bench.destination()
    for _ in range(2):
        findings = half.check(manifest)
        _levels(findings, "check()")
        refused = [found.text for found in findings if found.level == REFUSED]
        expect(not refused, f"check() refuses a host that is fit: {refused}")
    expect(json.dumps(manifest) == kept, "check() has changed the manifest")
    bench.nothing_there("", undone=True)
    bench.is_whole(Place.SOURCE)


def check_says_what_is_taken(bench: Bench) -> None:
    """check() refuses where the name, pid or the like is taken, if the engine has such a notion."""
    manifest = bench.case.taken(as_json(bench.source().inspect().manifest, "the manifest"))
    if manifest is None:
        return
    findings = bench.destination().check(manifest)
    _levels(findings, "check()")
    expect(
        any(found.level == REFUSED for found in findings),
        f"check() does not refuse what is taken: {findings}",
    )
    bench.is_whole(Place.SOURCE)


def throttle_cgroup_is_its_own(bench: Bench) -> None:
    """throttle_cgroup() says which cgroup can be slowed, or why none can; and changes nothing."""
    half = bench.source()
    half.inspect()
    try:
        group = half.throttle_cgroup()
    except Refused as error:
        expect(error.message, "throttle_cgroup() refuses, and does not say why")
        return
    limit = (group / "cpu.max").read_text(encoding="ascii")
    expect(half.throttle_cgroup() == group, "throttle_cgroup() does not say the same twice")
    expect(
        (group / "cpu.max").read_text(encoding="ascii") == limit,
        "throttle_cgroup() has changed cpu.max",
    )
    expect(
        str(os.getpid()) not in (group / "cgroup.procs").read_text(encoding="ascii").split(),
        f"throttle_cgroup() says {group}: the asking process is in it too",
    )
    bench.is_whole(Place.SOURCE)


def what_is_staged_is_removed(bench: Bench) -> None:
    """stage() makes each tree that goes first, and stops on request; unstage() removes all of it.

    Also without stage(), after one that was cancelled, and by a successor.
    """
    half = bench.source()
    trees = [tree for tree in half.inspect().trees if tree.first]
    if not trees:
        return
    successor = bench.source()
    successor.recall(as_json(half.identity(), "the identity"))
    for tree in trees:

        def removed(by: SourceHalf, after: str, tree: Tree = tree) -> None:
            for _ in range(2):
                by.unstage(tree.name)
            expect(not Path(tree.path).exists(), f"unstage() after {after} has left {tree.path}")

        removed(half, "nothing")
        cancelled = Cancellation()
        cancelled.request()
        try:
            half.stage(tree.name, cancelled)
        except Cancelled:
            removed(half, "a cancelled stage()")
        else:
            raise NotConforming("stage() returned although it was cancelled")
        for by in (half, successor):
            half.stage(tree.name, Cancellation())
            expect(Path(tree.path).is_dir(), f"stage() made no directory {tree.path}")
            removed(by, "stage()")
    bench.runs_on()


# -- the destination half by itself ------------------------------------------------------------


def undo_needs_no_prepare(bench: Bench) -> None:
    """discard() and undo() come without prepare() too, and harm nobody."""
    bench.target()
    half = bench.destination()
    for _ in range(2):
        half.discard()
        half.undo()
    bench.runs_on()


def prepare_is_repeated_and_undone(bench: Bench) -> None:
    """prepare() by a successor changes nothing; undo() removes all of it; then it can begin anew.

    Nothing runs in all this.
    """
    manifest = bench.manifest(bench.source().inspect().manifest)
    for _ in range(2):
        migration = secrets.token_hex(8)
        bench.destination().prepare(manifest, migration)
        half = bench.destination()
        half.prepare(manifest, migration)
        half.wait_let_go()
        expect(not bench.case.alive(Place.DESTINATION), "prepare() made something run")
        half.discard()
        for _ in range(2):
            half.undo()
        bench.nothing_there(migration, undone=True)
    bench.runs_on()


# -- the cut-over ------------------------------------------------------------------------------


def it_moves(bench: Bench) -> None:
    """The order of steps; nothing runs there before resume(), and all of it is right after.

    The source is not found any more, and cleaning it may be repeated. What was let run cannot be
    discarded.
    """
    target = bench.target()
    with Move(bench) as move:
        move.run()
        steps = move.handover.steps
        expect(steps == ["freezing", "prepare", "commit"], f"the steps were {steps}")
        for tree in move.inspection.trees:
            if tree.first:
                expect(not Path(tree.path).exists(), f"unstage() has left {tree.path}")
        bench.goes_on(Place.DESTINATION)
        for _ in range(2):
            move.destination.discard()
        expect(bench.case.alive(Place.DESTINATION), "discard() after resume() ended what runs")
        successor = bench.source(target)
        successor.recall(move.handover.identity)
        for half in (move.source, successor):
            expect(half.gone(), "the source's copy is dead, and gone() says that it is not")
            for _ in range(2):
                half.end_rest()
                warnings = half.finish()
                expect(
                    all(isinstance(text, str) for text in warnings),
                    f"finish() returned {warnings!r}, not a list of warnings",
                )
        expect(not bench.case.alive(Place.SOURCE), "the source's copy lives")
        try:
            bench.source(target).inspect()
        except NoSuchTarget:
            pass
        else:
            raise NotConforming("inspect() still finds at the source what has moved away")
        bench.is_whole(Place.DESTINATION)
    bench.close()


def a_failed_prepare_lets_the_source_run(bench: Bench) -> None:
    """prepare() raises before anything was restored: the engine raises that, the source runs on."""
    with Move(bench) as move:
        error = DestinationError("no room, says the conformance suite")
        move.before_restore = _raising(error)
        _failed_with(move, error)
        bench.goes_on(Place.SOURCE)
        move.give_up()
        bench.runs_on()
        bench.nothing_there(move.id, undone=True)


def a_failed_hold_lets_the_source_run(bench: Bench) -> None:
    """prepare() raises with the copy restored and held: the same, and that copy never runs."""
    with Move(bench) as move:
        error = DestinationError("not this one, says the conformance suite")
        move.after_restore = _raising(error)
        _failed_with(move, error)
        bench.goes_on(Place.SOURCE)
        move.give_up()
        bench.runs_on()
        bench.nothing_there(move.id, undone=True)


def a_failed_restore_leaves_nothing(bench: Bench) -> None:
    """restore() of images that are none raises, with nothing left but what prepare() made."""
    with Move(bench) as move:
        nothing = move.directory / "server" / "nothing"
        nothing.mkdir(mode=0o700)

        def restore_it() -> None:
            try:
                pid = move.destination.restore(move.criu, nothing)
            except PhaulError:
                bench.nothing_there(move.id, undone=False)
                raise
            raise NotConforming(f"restore() of an empty directory returned {pid}")

        move.before_restore = restore_it
        raised = move.fails()
        expect(not isinstance(raised, Cancelled), f"the engine raised {raised!r}")
        move.give_up()
        bench.runs_on()
        bench.nothing_there(move.id, undone=True)


def cancelled_in_time(bench: Bench) -> None:
    """freezing() raises Cancelled: so does the engine, and everything is as it was."""
    with Move(bench) as move:
        error = Cancelled("cancelled by the conformance suite")
        move.at_freezing = _raising(error)
        _failed_with(move, error)
        expect(move.handover.steps == ["freezing"], f"the steps were {move.handover.steps}")
        move.give_up()
        bench.runs_on()
        bench.nothing_there(move.id, undone=True)


def a_retry_works(bench: Bench) -> None:
    """After a failed final dump the same client moves it, with every page right."""
    with Move(bench) as move:
        error = DestinationError("not yet, says the conformance suite")
        # What is dirtied here, only the dump knows of that fails.
        move.at_freezing = lambda: time.sleep(bench.case.pause_s)
        move.before_restore = _raising(error)
        _failed_with(move, error)
        move.source.rollback()
        bench.goes_on(Place.SOURCE)
        move.again()
        move.at_freezing = lambda: None
        move.before_restore = lambda: None
        move.run()
        bench.is_whole(Place.DESTINATION)
        move.source.finish()
    bench.close()


def discard_leaves_nothing(bench: Bench) -> None:
    """A held copy is discarded, without a trace but what prepare() made, and restored anew."""
    with Move(bench) as move:

        def discarded_and_restored(images_dir: Path) -> None:
            for _ in range(2):
                move.destination.discard()
            expect(not bench.case.alive(Place.DESTINATION), "discard() left a copy alive")
            bench.nothing_there(move.id, undone=False)
            expect(bench.case.alive(Place.SOURCE), "discard() ended the source's copy")
            try:
                move.destination.resume()
            except PhaulError:
                pass
            else:
                raise NotConforming("resume() returned although its copy had been discarded")
            move.restore(images_dir)

        move.after_restore = discarded_and_restored
        move.run()
        bench.is_whole(Place.DESTINATION)
        move.source.finish()
    bench.close()


# -- death of the driver ----------------------------------------------------------------


def the_drivers_death_is_a_no(bench: Bench) -> None:
    """Its driver is killed while the copy is held: the source runs on, no copy stays there.

    A successor then finds the source alive, and puts away what prepare() made.
    """
    target = bench.target()
    with _driver(bench) as (pid, said):
        expect(bench.case.alive(Place.DESTINATION), "nothing is held")
        before = bench.case.told(Place.DESTINATION)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        bench.goes_on(Place.SOURCE)
        bench.until("no copy at the destination", lambda: not bench.case.alive(Place.DESTINATION))
        successor = bench.source(target)
        successor.recall(said["identity"])
        expect(not successor.gone(), "the source's copy runs, and gone() says that it does not")
        successor.rollback()
        half = bench.destination()
        half.prepare(said["manifest"], said["id"])
        half.wait_let_go()
        half.discard()
        half.undo()
        bench.runs_on()
        after = bench.case.told(Place.DESTINATION)
        expect(
            after is None or (before is not None and after.counter >= before.counter),
            f"the copy at the destination has told {after} after {before}",
        )
        bench.nothing_there(said["id"], undone=True)


@contextlib.contextmanager
def _driver(bench: Bench) -> Iterator[tuple[int, dict[str, Any]]]:
    """A process of its own that holds a copy and waits for its end; and what it knows."""
    here, there = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(here)
        _drive(bench, there)
    os.close(there)
    try:
        line = read_line(here, bench.case.within_s)
        expect(line, "the driver said nothing")
        said = json.loads(line)
        expect("error" not in said, f"the driver failed: {said.get('error')}")
        yield pid, said
    finally:
        os.close(here)
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _drive(bench: Bench, there: int) -> NoReturn:
    def say(**facts: Any) -> None:
        os.write(there, json.dumps(facts).encode() + b"\n")

    try:
        move = Move(bench)

        def held(_: Path) -> None:
            say(id=move.id, manifest=move.manifest, identity=move.handover.identity)
            time.sleep(2 * bench.case.within_s)

        move.after_restore = held
        move.run()
        say(error="it was not killed in time")
    except BaseException as error:  # noqa: BLE001 - told to the process that waits
        say(error=f"{type(error).__name__}: {error}")
    os._exit(1)


CHECKS: tuple[Check, ...] = (
    inspect_changes_nothing,
    no_such_target,
    identity_finds_the_target,
    check_changes_nothing,
    check_says_what_is_taken,
    throttle_cgroup_is_its_own,
    what_is_staged_is_removed,
    undo_needs_no_prepare,
    prepare_is_repeated_and_undone,
    cancelled_in_time,
    a_failed_prepare_lets_the_source_run,
    a_failed_hold_lets_the_source_run,
    a_failed_restore_leaves_nothing,
    the_drivers_death_is_a_no,
    a_retry_works,
    discard_leaves_nothing,
    it_moves,
)
