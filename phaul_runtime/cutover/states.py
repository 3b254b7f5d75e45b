"""The state table of the two-phase cut-over, and what follows from two journals.

::

    source (CRIU's DUMP)                          destination (CRIU's RESTORE)
    ─────────────────────                         ────────────────────────────
    iterating                                     iterating
    frozen      freeze, final dump
                post-dump: blocked ─── images ──▶ frozen      restore
                                                              post-restore: blocked, nothing runs
                          ◀────── prepared ────── prepared
    prepared
    committing  answers true: CRIU kills the tree
                sees its copy dead ── commit ───▶ committing  answers true: the tree runs
                          ◀────── running ───────
    hooks told, cleaned                           hooks told, put in order
    done                                          done

Each host writes a state to its journal, and waits until it is on the disk, *before* it takes the
step that the state names. From this and four facts follows that at most one copy ever runs, and
that one can always be brought back:

1. CRIU takes the end of its client for a "no". A frozen tree whose phaul-runtime dies runs again; a
   held tree whose agent dies is discarded. Nothing stays frozen, nothing is let go by accident.
2. The source's tree can die only after its journal says *committing*, and that is written only
   after the destination has said *prepared*: by then the destination has all images on its side.
3. The destination's tree can run only after its journal says *committing*, and that is written only
   on a commit, which is sent only when the source's tree has been seen dead.
4. So with the source before *committing* the source's copy is the one: discard. With the source at
   *committing*, whether its tree is alive says whether the answer reached CRIU: alive, CRIU
   heard a "no" and will hear nothing else: discard; dead: the destination's copy is the one, and if
   it is no longer held it is rebuilt from the images. With the destination at *committing* the
   source is dead.

What was let run is never discarded, whether its journal could say so or not: the images are kept
until it says *done*, and show that it runs (`images.was_resumed`). *Done* comes last on each host,
after its hooks: a recovery does what nobody lived to do. A process counts as dead once it can run
nothing any more (`member`), and a time-out is neither alive nor dead: unknown.

`aborting > aborted` is the way back from anything before committing; from committing only the
source has it, and only when its tree was seen alive after CRIU's end (fact 4).

Post-copy changes one step. The source's tree is not killed, since its memory has to be served: once
its journal says *committing*, it is frozen by a cgroup (`freezer`), CRIU is killed, and only when
both are seen is the commit sent. Nobody thaws it from then on, unless the destination's own journal
says that it was not told to run. Both ends stand at *post-copy* until the last page is over; then
the source's tree is killed. In fact 4 a tree that is held by its cgroup counts as neither alive nor
dead: what the destination was told decides, and as long as that is not known it stays frozen.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from phaul_runtime.errors import MigrationFailed


class Role(Enum):
    """Which end of a migration a journal belongs to."""

    SOURCE = "source"
    DESTINATION = "destination"


class State(Enum):
    """Where a migration stands; see the picture above."""

    ITERATING = "iterating"
    FROZEN = "frozen"
    PREPARED = "prepared"
    COMMITTING = "committing"
    POST_COPY = "post-copy"
    DONE = "done"
    ABORTING = "aborting"
    ABORTED = "aborted"

    @property
    def settled(self) -> bool:
        """Nothing is left to be done."""
        return self in (State.DONE, State.ABORTED)


_NEXT: dict[State | None, set[State]] = {
    None: {State.ITERATING},
    State.ITERATING: {State.FROZEN, State.ABORTING},
    State.FROZEN: {State.PREPARED, State.ABORTING},
    State.PREPARED: {State.COMMITTING, State.ABORTING},
    State.COMMITTING: {State.POST_COPY, State.DONE},
    State.POST_COPY: {State.DONE},
    State.DONE: set(),
    State.ABORTING: {State.ABORTED},
    State.ABORTED: set(),
}


def guard(role: Role, old: State | None, new: State) -> None:
    """Refuse a transition that the table does not have.

    Raises:
        MigrationFailed: it does not.
    """
    if new in _NEXT[old]:
        return
    if role is Role.SOURCE and (old, new) == (State.COMMITTING, State.ABORTING):
        return
    was = old.value if old else "nothing"
    raise MigrationFailed(f"the {role.value} cannot go from {was} to {new.value}")


class Verdict(Enum):
    """What is to become of the destination's copy."""

    RUN = "run"
    DISCARD = "discard"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Standing:
    """One end of a migration as its host sees it now.

    Attributes:
        state: the last that its journal names.
        alive: the root of that end's tree exists (at the source: it runs).
        held: at the source: it exists, and is frozen by the cgroup of a post-copy move.
    """

    state: State
    alive: bool = False
    held: bool = False


@dataclass(frozen=True)
class Settled:
    """What became of one end in a recovery.

    Attributes:
        pid: root of the destination's copy, if it runs.
        warnings: what the user should know.
        missing: pages of it that are still at the source; None if none ever were.
    """

    pid: int = 0
    warnings: tuple[str, ...] = ()
    missing: int | None = None


@dataclass(frozen=True)
class Decision:
    """A verdict and why."""

    verdict: Verdict
    reason: str


def decide(source: Standing | None, destination: Standing | None) -> Decision:
    """Which copy is the one; None is an end that nothing is known of.

    Pure; what it says of any two standings never lets two copies run.
    """
    there = destination.state if destination else None
    if there in (State.COMMITTING, State.POST_COPY, State.DONE):
        if source is not None and source.alive:
            return Decision(
                Verdict.UNKNOWN, "the destination was told to run, yet the source's copy lives"
            )
        return Decision(Verdict.RUN, "the destination was told to run")
    if source is None:
        if there is State.PREPARED:
            return Decision(
                Verdict.UNKNOWN, "only the source's host knows whether its copy was killed"
            )
        return Decision(Verdict.DISCARD, "the destination was never prepared")
    if source.state not in (State.COMMITTING, State.POST_COPY, State.DONE):
        return Decision(Verdict.DISCARD, f"the source never went past {source.state.value}")
    known = f"stands at {there.value}" if there else "is not known or not reachable"
    if source.held:
        if source.state is State.COMMITTING and there is not None:
            return Decision(Verdict.DISCARD, "the destination was not told to run")
        return Decision(Verdict.UNKNOWN, f"the source's copy is frozen and the destination {known}")
    if source.alive:
        if source.state is not State.COMMITTING:
            return Decision(Verdict.UNKNOWN, "the source was done, yet its copy lives")
        return Decision(Verdict.DISCARD, "the source's copy was not killed")
    if there is State.PREPARED:
        return Decision(Verdict.RUN, "the source's copy was killed")
    return Decision(Verdict.UNKNOWN, f"the source's copy is dead and the destination {known}")
