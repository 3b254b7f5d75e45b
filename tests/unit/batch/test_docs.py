"""The example in docs/batch.md is a file of moves."""

from __future__ import annotations

import re
from pathlib import Path

from phaul_runtime.batch.model import Batch, Limits, load_batch
from phaul_runtime.batch.preflight import waves
from phaul_runtime.cli.batch_cmd import batch_group

DOCS = Path(__file__).resolve().parents[3] / "docs"


def test_the_example_loads_and_has_the_defaults_that_it_says(tmp_path: Path) -> None:
    text = (DOCS / "batch.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    file = tmp_path / "moves.yaml"
    file.write_text(example)
    batch = load_batch(file)
    assert batch.limits == Limits()
    fields = Batch.model_fields
    for name in ("retries", "retry_pause_s", "reconnect_s", "move_timeout_s", "order"):
        assert getattr(batch, name) == fields[name].default, name
    assert [[move.name for move in wave] for wave in waves(batch)] == [
        ["db1", "cache"], ["db2"], ["web"], ["worker"],
    ]  # fmt: skip


def test_every_command_that_it_names_is_there() -> None:
    text = (DOCS / "batch.md").read_text(encoding="utf-8")
    named = set(re.findall(r"phaul-runtime batch ([a-z]+)", text))
    assert named == set(batch_group.commands) == {"run", "resume", "status", "report"}
    options = {
        option
        for command in batch_group.commands.values()
        for parameter in command.params
        for option in parameter.opts
    }
    for option in re.findall(r"(?<=[ `])--[a-z][a-z-]+", text):
        assert option in options | {"--id"}, option
