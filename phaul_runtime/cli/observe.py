"""What is kept of migrations beside what is shown: log records and metrics."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from phaul_runtime import events as ev
from phaul_runtime.cli.logoptions import asked_level
from phaul_runtime.cli.outlet import tell
from phaul_runtime.cli.views import describe
from phaul_runtime.errors import ExitCode, PhaulError
from phaul_runtime.report import MigrationReport
from phaul_runtime.source import metrics
from phaul_runtime.system import logs

if TYPE_CHECKING:
    from phaul_runtime.config.model import Config

log = logging.getLogger(__name__)

_ALARMING = (ev.Warned, ev.Recovering, ev.Reconnecting, ev.RolledBack)


def _level(event: ev.Event) -> int:
    if isinstance(event, ev.MERE_PROGRESS):
        return logging.DEBUG
    refused = isinstance(event, ev.Checked) and event.level == "refused"
    return logging.WARNING if refused or isinstance(event, _ALARMING) else logging.INFO


class Observer:
    """Passes events on to a view, and keeps what becomes of the migration.

    Events are logged only if a level was asked for: without one, what is shown says the same.

    Args:
        config: as loaded.
        view: shown the same events.
        metrics_file: instead of the configuration's `metrics.textfile`.

    Raises:
        ConfigError: metrics are asked for and cannot be had.
    """

    def __init__(self, config: Config, view: ev.Listener, metrics_file: Path | None = None) -> None:
        self._view = view
        self._logs = bool(config.logging.level or asked_level())
        textfile = metrics_file or (config.metrics.textfile and Path(config.metrics.textfile))
        self._metrics = metrics.Metrics(textfile) if textfile else None
        self._settles = self._counted = False
        if self._metrics:
            metrics.require()

    def __call__(self, event: ev.Event) -> None:
        """Log an event and pass it on."""
        if isinstance(event, ev.MigrationStarted):
            logs.enter(event.id)
        self._settles = self._settles or isinstance(event, ev.Recovering)
        if isinstance(event, ev.OutcomeRecorded) and not self._settles:
            self._counted = True  # by the command that was there before
        if self._logs:
            text = describe(event).strip() or event.name
            log.log(_level(event), "%s", text, extra={"data": event.to_json()})
        self._view(event)

    def report(self, report: MigrationReport) -> None:
        """A migration has ended; a dry run and a wrong command are none."""
        if self._logs:
            bad = report.exit_code != 0
            text = f"{report.result}: {report.error}" if bad else report.result
            level = logging.ERROR if bad else logging.INFO
            extra = {"data": report.to_json(), "migration": report.id}
            log.log(level, "%s", text, extra=extra)
        if self._metrics is None or self._counted or report.result == "checked":
            return
        if report.exit_code == ExitCode.USAGE:
            return
        try:
            self._metrics.ended(report)
        except PhaulError as error:
            tell(f"phaul-runtime: warning: {error}")
