"""Hosts that are directories, reached by a fake ssh: the real command line, the real journals.

    fakessh.py ARGV...        stands for ssh: runs the command for that host
    fakehosts.py ARGV...      stands for phaul-runtime there

A host is a directory below $FAKE_HOSTS: `state` has its journals, `victims` a file for each victim
that runs there, `moves.log` a line when an attempt froze its victim and one when the copy ran. A
victim's file has the number of times that it was moved: a second copy, or a page of an older one,
would show. How an attempt behaves is drawn from its id, so that it is the same for whoever asks.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

HOSTS = Path(os.environ.get("FAKE_HOSTS", "/nonexistent"))
FAILING = float(os.environ.get("FAKE_FAILING", "0"))
SECONDS = float(os.environ.get("FAKE_SECONDS", "0.3"))

# While it is there, no move gets past its pre-copy.
HELD = HOSTS / "held"


def log(host: str, **facts: object) -> None:
    line = json.dumps({"time": time.time(), "host": host, **facts}) + "\n"
    # One write of a short line in append mode is whole.
    fd = os.open(HOSTS / "moves.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(fd, line.encode())
    os.close(fd)


def phaul(argv: list[str]) -> None:
    """`phaul-runtime` at $FAKE_HOST: its own command line, with an engine that moves files."""
    from phaul_runtime.cli.main import main
    from phaul_runtime.cutover.journal import Journal
    from phaul_runtime.cutover.states import Role, State, Verdict
    from phaul_runtime.errors import MigrationFailed, NoSuchTarget
    from phaul_runtime.events import Committed, Frozen, MigrationStarted
    from phaul_runtime.recovery.recover import Recovered, Recovery
    from phaul_runtime.report import MigrationReport
    from phaul_runtime.source import migration, outcome
    from phaul_runtime.transport import Destination

    host = os.environ["FAKE_HOST"]

    def run(self: migration.Migration, *, dry_run: bool = False) -> MigrationReport:
        there = Destination.parse(self.config.transport.to or "").host
        victim, copy = (HOSTS / each / "victims" / self.target for each in (host, there))
        draw = random.Random(self.id)
        self.listener(MigrationStarted(self.id, self.config.engine, self.target, there))
        if not victim.exists():
            raise NoSuchTarget(f"{self.target} does not run at {host}")
        if dry_run:
            return MigrationReport("checked", id=self.id)
        log(host, what="begins", id=self.id, target=self.target, to=there, pid=os.getpid())
        facts = {
            "engine": self.config.engine, "target": self.target, "to": self.config.transport.to,
            "there": there,
        }  # fmt: skip
        state_dir = Path(self.config.state_dir)
        with Journal.create(state_dir, self.id, Role.SOURCE) as journal:
            nothing: Any = None
            self._begun = outcome.Begun(self.target, nothing, journal)
            journal.enter(State.ITERATING, **facts)
            try:
                time.sleep(SECONDS * draw.uniform(0.5, 1.5))
                while HELD.exists() and not self.cancellation.requested:
                    time.sleep(0.02)
                self.cancellation.check()
                if draw.random() < FAILING:
                    raise MigrationFailed("drawn to fail")
            except Exception:
                journal.enter(State.ABORTING)
                journal.enter(State.ABORTED)
                log(host, what="failed", id=self.id, target=self.target, to=there)
                raise
            self.cancellation.seal()
            journal.enter(State.FROZEN)
            self.listener(Frozen())
            count = int(victim.read_text())
            journal.enter(State.PREPARED)
            journal.enter(State.COMMITTING)
            victim.unlink()
            commit(copy, count + 1)
            journal.enter(State.DONE, pid=7, downtime_ms=1.0)
            self.listener(Committed(7, 1.0))
            log(host, what="moved", id=self.id, target=self.target, to=there, count=count + 1)
            report = MigrationReport("moved", downtime_ms=1.0, restored_pid=7)
            return self._finish_report(report, None)

    def commit(copy: Path, count: int) -> None:
        fd = os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(fd, str(count).encode())
        os.close(fd)

    def recover(self: Recovery, migration_id: str, held: Journal | None = None) -> Recovered:
        del held
        with Journal.open(self._state_dir, migration_id, Role.SOURCE) as journal:
            facts = journal.facts
            victim = HOSTS / host / "victims" / facts["target"]
            if journal.state is State.COMMITTING and not victim.exists():
                journal.enter(State.DONE, pid=7)
                return Recovered(migration_id, Verdict.RUN, "the source's copy was killed", 7)
            journal.enter(State.ABORTING)
            journal.enter(State.ABORTED)
            log(host, what="recovered", id=migration_id, target=facts["target"])
            return Recovered(migration_id, Verdict.DISCARD, "the source's copy was not killed")

    migration.Migration.run = run  # type: ignore[method-assign]
    Recovery.recover = recover  # type: ignore[method-assign]
    config = HOSTS / host / "config.yaml"
    sys.argv = ["phaul-runtime", *argv, "--config", str(config)]
    main()


if __name__ == "__main__":
    phaul(sys.argv[1:])
