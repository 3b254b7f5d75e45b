"""The source's lifecycle hooks at events that are not a step of the cut-over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from phaul_runtime.cutover.journal import Journal
from phaul_runtime.errors import PhaulError, UsageError
from phaul_runtime.events import Listener, Warned
from phaul_runtime.hooks.lifecycle import FROZEN, ON_FAILURE, Failure, Hooks, Move, move_of
from phaul_runtime.preflight.checks import HostFinding, check_hooks
from phaul_runtime.report import result_of


@dataclass(frozen=True)
class SourceHooks:
    """The hooks of the source's host, for one migration.

    Args:
        hooks: of this host.
        listener: told what fails where it can change nothing any more.
    """

    hooks: Hooks
    listener: Listener

    def asked(self, move: Move, host: str) -> list[HostFinding]:
        """What pre_check's say; `host` is how this one is called in findings."""
        return [HostFinding(host, finding) for finding in check_hooks(self.hooks, move)]

    def when_frozen(self, journal: Journal) -> Callable[[], None] | None:
        """Looked up while the target runs: without hooks the freeze knows nothing of them."""
        if not self.hooks.programs(FROZEN):
            return None
        return lambda: self.hooks.run(FROZEN, move_of(journal))

    def failed(self, move: Move, error: Exception) -> None:
        """Run on_failure's, unless the command itself was wrong: then nothing was tried."""
        if isinstance(error, UsageError):
            return
        text = error.message if isinstance(error, PhaulError) else repr(error)
        failure = Failure(result_of(error), text)
        for warning in self.hooks.try_to(ON_FAILURE, move, failure=failure):
            self.listener(Warned(warning))
