"""Metrics: what is counted, that it adds up over processes, and that a scraper can read it."""

from __future__ import annotations

import sys
import threading
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from phaul_runtime import events as ev
from phaul_runtime.cli.observe import Observer
from phaul_runtime.config.model import Config
from phaul_runtime.cutover.states import Role
from phaul_runtime.errors import ConfigError, PhaulError
from phaul_runtime.hooks.lifecycle import COMMITTED, EVENTS, ON_FAILURE, Failure, Move
from phaul_runtime.report import Iteration, MigrationReport
from phaul_runtime.source import metrics as metrics_module
from phaul_runtime.source.metrics import Metrics, observe, serve

MOVED = MigrationReport(
    "moved", engine="runc", downtime_ms=250.0, total_ms=4000.0, bytes_transferred=1 << 20,
    iterations=[Iteration(1, 0, 4096, 1.0)] * 3,
)  # fmt: skip
REFUSED = MigrationReport("refused", engine="runc", total_ms=500.0, exit_code=3)


def values(text: str) -> dict[str, float]:
    """Samples by name and labels, as `name{a=b}`."""
    return {
        sample.name + "{" + ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items())) + "}":
        sample.value
        for family in text_string_to_metric_families(text) for sample in family.samples
    }  # fmt: skip


def test_a_file_adds_up_over_processes(tmp_path: Path) -> None:
    file = tmp_path / "phaul.prom"
    for report in (MOVED, MOVED, REFUSED):
        Metrics(file).ended(report)
    Metrics(file).arrived("docker", "moved")
    found = values(file.read_text())
    role = "role=source"
    assert found[f"phaul_migrations_total{{engine=runc,result=moved,{role}}}"] == 2
    assert found[f"phaul_migrations_total{{engine=runc,result=refused,{role}}}"] == 1
    assert found["phaul_migrations_total{engine=docker,result=moved,role=destination}"] == 1
    assert found["phaul_downtime_seconds_count{engine=runc}"] == 2
    assert found["phaul_downtime_seconds_sum{engine=runc}"] == 0.5
    edges = {le: found[f"phaul_downtime_seconds_bucket{{engine=runc,le={le}}}"]
             for le in ("0.2", "0.3", "30.0", "+Inf")}  # fmt: skip
    assert edges == {"0.2": 0, "0.3": 2, "30.0": 2, "+Inf": 2}
    assert found["phaul_duration_seconds_sum{engine=runc,result=moved}"] == 8
    assert found["phaul_duration_seconds_count{engine=runc,result=refused}"] == 1
    assert found["phaul_transferred_bytes_total{engine=runc}"] == 2 << 20
    assert found["phaul_iterations_total{engine=runc}"] == 6
    assert found["phaul_last_downtime_seconds{engine=runc}"] == 0.25
    assert found[f"phaul_last_end_timestamp_seconds{{engine=runc,result=moved,{role}}}"] > 1e9
    # Nothing lies beside it that node_exporter would read.
    assert [path.name for path in tmp_path.glob("*.prom")] == ["phaul.prom"]


def test_post_copy_is_counted_where_it_was(tmp_path: Path) -> None:
    file = tmp_path / "phaul.prom"
    told = {"pages": 1000, "faults": 7, "worst_fault_ms": 250.0, "seconds": 4.0}
    for report in (
        MOVED,
        replace(MOVED, mode="post-copy", post_copy=told),
        replace(MOVED, mode="hybrid", post_copy={**told, "worst_fault_ms": 125.0}),
        # One that a recovery finished.
        replace(MOVED, mode="hybrid"),
    ):
        Metrics(file).ended(report)
    found = values(file.read_text())
    assert found["phaul_post_copy_pages_total{engine=runc}"] == 2000
    assert found["phaul_post_copy_faults_total{engine=runc}"] == 14
    assert found["phaul_post_copy_seconds_count{engine=runc}"] == 2
    assert found["phaul_post_copy_seconds_sum{engine=runc}"] == 8
    assert found["phaul_last_worst_fault_seconds{engine=runc}"] == 0.125
    assert found["phaul_downtime_seconds_count{engine=runc}"] == 4


def test_every_metric_of_the_table_is_told(tmp_path: Path) -> None:
    Metrics(tmp_path / "a.prom").ended(MOVED)
    text = (tmp_path / "a.prom").read_text()
    told = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    doc = metrics_module.__doc__ or ""
    assert told == {word.strip("`") for word in doc.split() if word.startswith("``phaul_")}


def test_processes_at_once_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "phaul.prom"

    def work() -> None:
        for _ in range(5):
            Metrics(file).ended(MOVED)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = values(file.read_text())
    assert found["phaul_migrations_total{engine=runc,result=moved,role=source}"] == 20


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    file = tmp_path / "phaul.prom"
    Metrics(file).ended(MOVED)
    with file.open() as reader:
        before = reader.read(20)
        Metrics(file).ended(MOVED)
        # The old file is whole, and another than the new one.
        assert values(before + reader.read())["phaul_downtime_seconds_count{engine=runc}"] == 1
    assert values(file.read_text())["phaul_downtime_seconds_count{engine=runc}"] == 2


def test_what_is_no_file_of_metrics_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "phaul.prom"
    file.write_text("dear diary{\n")
    with pytest.raises(PhaulError, match="is no file of metrics"):
        Metrics(file).ended(MOVED)
    assert file.read_text() == "dear diary{\n"
    with pytest.raises(PhaulError, match="No such file"):
        Metrics(tmp_path / "none/x.prom").ended(MOVED)


@pytest.mark.parametrize("kept", ["file", "process"])
def test_over_http(tmp_path: Path, kept: str) -> None:
    metrics = Metrics(tmp_path / "phaul.prom" if kept == "file" else None)
    metrics.arrived("runc", "failed")
    server = serve(metrics, "127.0.0.1:0")
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{server.server_port}/metrics", timeout=30) as reply:
            found = values(reply.read().decode())
        assert found["phaul_migrations_total{engine=runc,result=failed,role=destination}"] == 1
        with pytest.raises(PhaulError, match="cannot serve metrics at"):
            serve(metrics, f"127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()


def test_an_observer_counts_what_arrives(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "phaul.prom")
    told: list[str] = []
    observer = observe(metrics, told.append)
    for role in Role:
        move = Move("1f", role, "runc", "web", "b")
        for event in EVENTS:
            if event != ON_FAILURE:
                observer(event, move, None)
        observer(ON_FAILURE, move, Failure("unknown", "its client is lost"))
    found = values((tmp_path / "phaul.prom").read_text())
    ends = {name: value for name, value in found.items() if name.startswith("phaul_migrations")}
    assert ends == {
        "phaul_migrations_total{engine=runc,result=moved,role=destination}": 1,
        "phaul_migrations_total{engine=runc,result=unknown,role=destination}": 1,
    }
    (tmp_path / "phaul.prom").write_text("?{")
    observer(COMMITTED, Move("1f", Role.DESTINATION, "runc", "web", "b"), None)
    assert "is no file of metrics" in told[0]


@pytest.mark.parametrize("settled_now", [False, True])
def test_an_outcome_that_was_there_already_is_not_counted_again(
    tmp_path: Path, settled_now: bool
) -> None:
    file = tmp_path / "phaul.prom"
    observer = Observer(Config(), ev.nobody, file)
    if settled_now:
        observer(ev.Recovering("an earlier command left it"))
    observer(ev.OutcomeRecorded("1f", "moved"))
    observer.report(MigrationReport("moved", id="1f"))
    assert file.exists() == settled_now


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigError, match="not installed"):
        metrics_module.require()
    with pytest.raises(ConfigError):
        Metrics(tmp_path / "phaul.prom").ended(MOVED)
