"""`phaul-runtime batch`."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import click

from phaul_runtime.batch.events import BatchEnded, MoveTold
from phaul_runtime.batch.extra import require
from phaul_runtime.batch.model import Batch, Move, load_batch
from phaul_runtime.batch.outcome import Answer
from phaul_runtime.batch.plan import MoveState
from phaul_runtime.batch.preflight import plan
from phaul_runtime.batch.record import BatchRecord, read, read_all
from phaul_runtime.batch.remote_move import MoveRunner
from phaul_runtime.batch.run import Controller, summary
from phaul_runtime.batch.store import Store, new_batch_id
from phaul_runtime.batch.view import BatchView, JsonLines, LiveTable
from phaul_runtime.cli.options import on_signals
from phaul_runtime.cli.outlet import echo, tell
from phaul_runtime.config.model import Config, load_config
from phaul_runtime.errors import ExitCode, NoSuchMigration, PhaulError, Refused
from phaul_runtime.system.cancel import Cancellation

_SCHEMA = "phaul-runtime/batch/1"
_Command = TypeVar("_Command", bound=Callable[..., Any])

_config = click.option(
    "--config",
    "config_path",
    type=click.Path(readable=False, path_type=Path),
    metavar="FILE",
    help="Configuration of this host: how ssh is called, and where batches are kept.",
)
_store = click.option(
    "--store",
    metavar="DIR|URL",
    help="Where batches are kept: a directory, or postgresql://..., which several controllers may "
    "share.  [default: batch.store, or `batches` in the state directory]",
)
_output = click.option(
    "--output",
    type=click.Choice(["text", "json"]),
    help="json: one event a line.  [default: text on a terminal, json in a pipe]",
)


def _controls(command: _Command) -> _Command:
    options = (
        click.option(
            "--controller",
            metavar="NAME",
            help="This controller's name, the same after a restart.  [default: the host's]",
        ),
        click.option(
            "--report", "report_path", type=click.Path(path_type=Path), metavar="FILE",
            help="Write an HTML report there at the end.",
        ),
        _config, _store, _output,
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@click.group("batch")
def batch_group() -> None:
    """Move many targets, from many hosts, under limits; survives its own death."""


@batch_group.command("run")
@click.argument("file", type=click.Path(readable=False, path_type=Path))
@click.option("--id", "batch_id", metavar="NAME", help="Name the batch.  [default: random]")
@click.option("--dry-run", is_flag=True, help="Print the plan with every move's preflight.")
@click.option("--again", is_flag=True, help="Even if a batch of the same moves is not at its end.")
@_controls
def run_command(file: Path, batch_id: str | None, dry_run: bool, again: bool, **given: Any) -> int:
    """Do the moves of FILE.

    Ctrl-C: nothing else is started, what is under way ends; twice: that is
    cancelled too. `batch resume` goes on, after a kill or a crash as well.

    \b
    Exit codes: 0 all moved; 2 usage or configuration; 3 refused; 5 left before
    its end; 7 some were not moved, or it was stopped.
    """
    config = load_config(given["config_path"])
    batch = load_batch(file)
    runner = MoveRunner(config)
    if dry_run:
        return _dry_run(batch, runner, given["output"])
    require("dbos", "rich")
    store = _open(config, given["store"])
    if not again:
        _refuse_twice(store, batch)
    batch_id = batch_id or new_batch_id()
    return _control(store, batch_id, runner, given, lambda c: c.run(batch))


@batch_group.command("resume")
@click.argument("batch_id", required=False, metavar="[ID]")
@click.option(
    "--retry-failed", is_flag=True, help="Try those once more that were refused or failed."
)
@_controls
def resume_command(batch_id: str | None, retry_failed: bool, **given: Any) -> int:
    """Go on with the batch ID, or take part in it; by default the last that is not at its end.

    \b
    Exit codes as those of run.
    """
    config = load_config(given["config_path"])
    require("dbos", "rich")
    store = _open(config, given["store"])
    if batch_id is None:
        batch_id = _last(store, unfinished=not retry_failed)
    return _control(
        store, batch_id, MoveRunner(config), given, lambda c: c.resume(retry_failed=retry_failed)
    )


@batch_group.command("status")
@click.argument("batch_id", required=False, metavar="[ID]")
@_config
@_store
@_output
def status_command(
    batch_id: str | None, config_path: Path | None, store: str | None, output: str | None
) -> int:
    """Show where batch ID stands, or all batches; may be asked while it runs.

    \b
    Exit codes: 0; 3 there is no such batch.
    """
    require("dbos")
    found = _open(load_config(config_path), store)
    as_json = (output or _default()) == "json"
    if batch_id is None:
        for record in read_all(found):
            if as_json:
                echo(json.dumps(_record(record, moves=False)))
            else:
                echo(f"{record.id}  {_standing(found, record)}")
        return 0
    record = read(found, batch_id)
    if as_json:
        echo(json.dumps(_record(record, moves=True)))
        return 0
    echo(f"{batch_id}: {_standing(found, record)}")
    for name, state in record.states.items():
        attempts = record.attempts.get(name, [])
        line = f"  {state.value:<10} {name}"
        if attempts and state is MoveState.MOVED and "downtime_ms" in attempts[-1].report:
            line += f"  downtime {attempts[-1].report['downtime_ms']:.0f} ms"
        elif attempts and attempts[-1].error:
            line += f"  {attempts[-1].error.splitlines()[0]}"
        echo(line)
    return 0


@batch_group.command("report")
@click.argument("batch_id", required=False, metavar="[ID]")
@click.option(
    "--html", type=click.Path(path_type=Path), required=True, metavar="FILE",
    help="To be written; needs nothing else to be shown.",
)  # fmt: skip
@_config
@_store
def report_command(
    batch_id: str | None, html: Path, config_path: Path | None, store: str | None
) -> int:
    """Write an HTML report of batch ID, or the last, with a timeline of every move."""
    require("dbos", "plotly")
    found = _open(load_config(config_path), store)
    _write_report(found, batch_id or _last(found, unfinished=False), html)
    return 0


# -- parts -------------------------------------------------------------------------------------


def _default() -> str:
    return "text" if sys.stdout.isatty() else "json"


def _open(config: Config, store: str | None) -> Store:
    return Store.parse(store or config.batch.store, Path(config.state_dir))


def _last(store: Store, *, unfinished: bool) -> str:
    for record in reversed(list(read_all(store))):
        if not unfinished or record.active or record.again():
            return record.id
    what = "batch that is not at its end" if unfinished else "batch"
    raise NoSuchMigration(f"no {what} in {store}", hint="phaul-runtime batch status lists them")


def _refuse_twice(store: Store, batch: Batch) -> None:
    for record in read_all(store):
        if (record.active or record.again()) and record.batch.digest == batch.digest:
            raise Refused(
                f"batch {record.id} has the same moves and is not at its end",
                hint=f"phaul-runtime batch resume {record.id}, or --again",
            )


def _control(
    store: Store,
    batch_id: str,
    runner: MoveRunner,
    given: dict[str, Any],
    work: Callable[[Controller], BatchEnded],
) -> int:
    view: BatchView = JsonLines(echo) if (given["output"] or _default()) == "json" else LiveTable()

    def ask(move: Move, migration_id: str, cancel: Cancellation, timeout_s: float) -> Answer:
        def told(event: dict[str, Any]) -> None:
            view(MoveTold(move.name, migration_id, event))

        return runner.ask(move, migration_id, told, cancel, timeout_s)

    controller = Controller(store, batch_id, ask, view, given["controller"] or socket.gethostname())
    tell(f"phaul-runtime: batch {batch_id}")
    with _stop_on_signals(controller), view:
        ended = work(controller)
    states = ", ".join(f"{count} {name}" for name, count in sorted(ended.states.items()))
    tell(f"phaul-runtime: batch {batch_id}: {states}")
    if given["report_path"] is not None:
        _write_report(store, batch_id, given["report_path"])
    return ended.exit_code


@contextmanager
def _stop_on_signals(controller: Controller) -> Iterator[None]:
    def ask(_number: int, _frame: FrameType | None) -> None:
        controller.stop()

    with on_signals(ask):
        yield


def _dry_run(batch: Batch, runner: MoveRunner, output: str | None) -> int:
    as_json = (output or _default()) == "json"
    refused = 0
    for each in plan(batch, runner.check, Cancellation()):
        if as_json:
            echo(json.dumps({"schema": _SCHEMA, **each.to_json()}))
        else:
            mark = "ok" if each.ok else "later" if each.depends else "NO"
            after = f" after {', '.join(each.after)}" if each.after else ""
            echo(
                f"{each.wave:>4}  {mark:<5} {each.move}: {each.engine} {each.target} "
                f"{each.source} > {each.to}{after}"
            )
            if each.problem:
                echo(f"            {each.problem.splitlines()[0]}")
            for warning in each.warnings:
                echo(f"            warning: {warning}")
        refused += not each.ok and not each.depends
    if refused:
        tell(f"phaul-runtime: {refused} moves would be refused")
    return int(ExitCode.REFUSED) if refused else 0


def _standing(store: Store, record: BatchRecord) -> str:
    states = ", ".join(f"{count} {name}" for name, count in sorted(record.counts().items()))
    what = "to be resumed" if record.active or record.again() else "at its end"
    if record.active and store.shared:
        what = "under way, or to be resumed"  # its controllers may be anywhere
    elif record.active and store.is_alive(record.id, ""):
        what = "under way"
    return f"{what}: {states}"


def _record(record: BatchRecord, *, moves: bool) -> dict[str, Any]:
    ended = summary(record.id, record.states, max(0.0, record.ended - record.began))
    told: dict[str, Any] = {
        "schema": _SCHEMA,
        "batch": record.id,
        "active": record.active,
        "states": record.counts(),
        "began": record.began,
        "ended": record.ended or None,
        "exit_code": None if record.active else ended.exit_code,
    }
    if moves:
        told["moves"] = [
            {
                "name": name,
                "state": state.value,
                "attempts": [each.to_json() for each in record.attempts.get(name, [])],
            }
            for name, state in record.states.items()
        ]
    return told


def _write_report(store: Store, batch_id: str, path: Path) -> None:
    from phaul_runtime.batch.report_html import write_report  # noqa: PLC0415 - plotly is large

    try:
        write_report(read(store, batch_id), path)
    except OSError as error:
        raise PhaulError(f"cannot write {path}: {error.strerror}") from error
