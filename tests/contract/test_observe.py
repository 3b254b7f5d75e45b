"""What the command line keeps of a move: log records with the migration's id, and metrics."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from phaul_runtime.cli.agentmetrics import agent_hooks
from phaul_runtime.cli.main import cli
from phaul_runtime.config.model import Config
from phaul_runtime.errors import ConfigError
from phaul_runtime.source import metrics as metrics_module
from phaul_runtime.system import logs, proc
from tests.contract.wholemove import WholeMove


class Command:
    """`phaul-runtime migrate` of the whole move's victim."""

    def __init__(self, whole: WholeMove, capsys: pytest.CaptureFixture[str]) -> None:
        self.whole = whole
        self._capsys = capsys
        self.out = ""
        self.records: list[dict[str, Any]] = []

    def run(self, *flags: str, **sections: Any) -> Any:
        file = self.whole.tmp_path / "config.yaml"
        config = self.whole.config().model_dump(include=_KEYS) | sections
        file.write_text(
            yaml.safe_dump({**config, "hooks": {"directory": "/none", **self.whole.here}})
        )
        argv = ["migrate", self.whole.target, "--config", str(file), *flags]
        code = cli.main(argv, standalone_mode=False)
        self.out, err = self._capsys.readouterr()
        self.records = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
        self.rest = [line for line in err.splitlines() if not line.startswith("{")]
        return code


_KEYS = {"engine", "workdir", "state_dir", "log_dir", "restore", "transport"}


@pytest.fixture
def command(whole: WholeMove, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    root = logging.getLogger()
    before = list(root.handlers)
    yield Command(whole, capsys)
    root.handlers[:] = before
    logs.enter("")
    for name in logs._OURS:
        logging.getLogger(name).setLevel(logging.NOTSET)


def test_records_of_both_ends_have_the_migrations_id(command: Command) -> None:
    command.whole.there = {"committed": [["false"]]}
    assert command.run("--log-level", "info", "--log-format", "json") == 0
    (name,) = {record["migration"] for record in command.records}
    assert len(name) == 16
    told = [
        record["data"]["event"] for record in command.records if "event" in record.get("data", {})
    ]
    assert told[0] == "migration_started"
    assert told[-3:] == ["prepared", "source_dead", "committed"]
    last = [record for record in command.records if "schema" in record.get("data", {})]
    assert (last[0]["message"], last[0]["data"]["id"]) == ("moved", name)
    states = [
        r["message"] for r in command.records if r["logger"] == "phaul_runtime.cutover.journal"
    ]
    assert "source: committing" in states
    assert "destination: done" in states
    warning = [r for r in command.records if r["level"] == "warning"]
    assert [r["logger"] for r in warning] == ["phaul_runtime.destination.incoming"]
    assert "hook committed: false ended with 1" in warning[0]["message"]
    assert command.rest == []


def test_without_a_level_nothing_is_said_twice(command: Command) -> None:
    command.whole.here = {"committed": [["false"]]}
    assert command.run() == 0
    assert "warning: hook committed: false" in command.out
    assert (command.records, command.rest) == ([], [])


def test_the_configuration_has_a_level_and_a_flag_wins(command: Command) -> None:
    command.whole.here = {"pre_freeze": [["false"]]}
    settings = {"level": "warning", "format": "json"}
    assert command.run(logging=settings) == 4
    assert [r["level"] for r in command.records] == ["warning", "error"]
    assert "failed: " in command.records[-1]["message"]
    assert command.run("--log-level", "error", logging=settings) == 4
    assert [r["level"] for r in command.records] == ["error"]


def test_debug_tells_of_every_program(command: Command) -> None:
    command.whole.here = command.whole.there = {"pre_check": [["sh", "-c", "exit 0"]]}
    command.run("--log-level", "debug", "--log-format", "json")
    said = [r["message"] for r in command.records]
    hooks = [r for r in command.records if r["message"] == "hook pre_check: running sh"]
    assert len(hooks) == 2  # of both hosts, about the same migration
    assert {r["migration"] for r in hooks} == {command.records[-1]["migration"]}
    assert "running sh -c 'exit 0'" in said


def test_metrics_of_the_source(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    file = command.whole.tmp_path / "phaul.prom"
    command.whole.here = {"pre_freeze": [["false"]]}
    assert command.run("--metrics-file", str(file)) == 4
    command.whole.here = {}
    assert command.run(metrics={"textfile": str(file)}) == 0
    text = file.read_text()
    for result in ("failed", "moved"):
        labels = f'engine="fake",result="{result}",role="source"'
        assert f"phaul_migrations_total{{{labels}}} 1.0" in text
    assert 'phaul_downtime_seconds_count{engine="fake"} 1.0' in text


def test_a_dry_run_and_a_wrong_command_are_no_migrations(command: Command) -> None:
    file = command.whole.tmp_path / "phaul.prom"
    assert command.run("--metrics-file", str(file), "--dry-run") == 0
    assert command.run("--metrics-file", str(file), "--to", "nowhere") == 2
    assert not file.exists()


def test_metrics_that_cannot_be_written_do_not_fail_a_move(command: Command) -> None:
    assert command.run("--metrics-file", "/none/phaul.prom") == 0
    (line,) = command.rest
    assert "warning: cannot write metrics to /none/phaul.prom: No such file" in line


def test_metrics_that_cannot_be_had_are_refused_before_the_move(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigError, match="prometheus_client"):
        command.run("--metrics-file", "/tmp/x.prom")
    assert command.whole.events == []


def test_an_agent_counts_what_arrives(whole: WholeMove, monkeypatch: pytest.MonkeyPatch) -> None:
    file = whole.tmp_path / "there.prom"
    whole.observe = agent_hooks(Config.model_validate({"metrics": {"textfile": str(file)}})).observe
    whole.run()
    text = file.read_text()
    assert 'phaul_migrations_total{engine="fake",result="moved",role="destination"} 1.0' in text


def test_an_agent_without_metrics_loads_nothing() -> None:
    script = (
        "import sys\n"
        "from phaul_runtime.cli import agent_cmd, main\n"
        "from phaul_runtime.config.model import Config\n"
        "agent_cmd.agent_hooks(Config())\n"
        "print(*sys.modules)\n"
    )
    loaded = proc.run([sys.executable, "-c", script], timeout_s=60).stdout.split()
    assert "phaul_runtime.agent.service" in loaded
    assert not {"phaul_runtime.source.metrics", "prometheus_client", "rich"} & set(loaded)


def test_an_agent_serves_them_if_it_can(
    whole: WholeMove, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    served: list[str] = []
    monkeypatch.setattr(metrics_module, "serve", lambda _, listen: served.append(listen))
    config = Config.model_validate({"metrics": {"listen": "127.0.0.1:9753"}})
    agent_hooks(config)
    deadline = time.monotonic() + 60
    while not served:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert served == ["127.0.0.1:9753"]
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    agent_hooks(config)
    while "prometheus_client" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.01)
