"""Metrics for Prometheus: a file for node_exporter's textfile collector, or a page over HTTP.

=======================================  =========  ==============================================
metric                                   type       what
=======================================  =========  ==============================================
``phaul_migrations_total``               counter    migrations that ended; role, engine, result
``phaul_downtime_seconds``               histogram  of those that moved, at the source; engine
``phaul_duration_seconds``               histogram  from the command to its end; engine, result
``phaul_transferred_bytes_total``        counter    memory, images and files; engine
``phaul_iterations_total``               counter    pre-copy rounds; engine
``phaul_post_copy_pages_total``          counter    pages that came once the copy ran; engine
``phaul_post_copy_faults_total``         counter    of them, those that were waited for; engine
``phaul_post_copy_seconds``              histogram  from then to the last page; engine
``phaul_last_worst_fault_seconds``       gauge      of the last post-copy: its longest wait; engine
``phaul_last_downtime_seconds``          gauge      of the last that moved; engine
``phaul_last_end_timestamp_seconds``     gauge      when the last ended, Unix time; role, engine,
                                                    result
=======================================  =========  ==============================================

A command lives for one migration, so its counters live in the file: it is read, added to, and
replaced in one step under a lock. `prometheus_client` writes and reads the format; it is loaded
with the first number.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phaul_runtime.cutover.states import Role
from phaul_runtime.errors import ConfigError, PhaulError
from phaul_runtime.hooks.lifecycle import COMMITTED, ON_FAILURE, Failure, Move
from phaul_runtime.report import MigrationReport

if TYPE_CHECKING:
    from prometheus_client.core import Metric

_FAMILIES = {
    "phaul_migrations": ("counter", "Migrations that ended"),
    "phaul_downtime_seconds": ("histogram", "From the freeze until the destination's copy ran"),
    "phaul_duration_seconds": ("histogram", "From the start of the command to its end"),
    "phaul_transferred_bytes": ("counter", "Memory, images and files that were carried"),
    "phaul_iterations": ("counter", "Pre-copy rounds"),
    "phaul_post_copy_pages": ("counter", "Pages that came once the destination's copy ran"),
    "phaul_post_copy_faults": ("counter", "Pages of a post-copy that were waited for"),
    "phaul_post_copy_seconds": ("histogram", "From the moment the copy ran to its last page"),
    "phaul_last_worst_fault_seconds": ("gauge", "Longest wait for a page in the last post-copy"),
    "phaul_last_downtime_seconds": ("gauge", "Downtime of the last migration that moved"),
    "phaul_last_end_timestamp_seconds": ("gauge", "When the last migration ended, Unix time"),
}
_DOWNTIME = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0)
_DURATION = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
_LOCK_S = 10.0
_POLL_S = 0.02

# A sample's name and its labels, sorted.
_Key = tuple[str, tuple[tuple[str, str], ...]]


def require() -> None:
    """Whether metrics can be had here.

    Raises:
        ConfigError: prometheus_client is not installed.
    """
    try:
        import prometheus_client  # noqa: F401, PLC0415 - loaded when it is needed
    except ImportError as error:
        raise ConfigError(
            "metrics need prometheus_client, which is not installed",
            hint="install python3-prometheus-client, or phaul-runtime[metrics] by pip",
        ) from error


class Metrics:
    """The numbers of a host.

    Args:
        textfile: where they are kept, NAME.prom; None keeps them in this process.
    """

    def __init__(self, textfile: Path | None = None) -> None:
        self.textfile = textfile
        self._values: dict[_Key, float] = {}
        self._lock = threading.Lock()

    def ended(self, report: MigrationReport) -> None:
        """A migration from this host has ended.

        Raises:
            PhaulError: the file cannot be read or written.
        """
        engine = {"engine": report.engine}
        with self._change() as values:
            _end(values, Role.SOURCE, report.engine, report.result)
            labels = {**engine, "result": report.result}
            _observe(values, "phaul_duration_seconds", labels, report.total_ms / 1000, _DURATION)
            _add(values, "phaul_transferred_bytes_total", engine, report.bytes_transferred)
            _add(values, "phaul_iterations_total", engine, len(report.iterations))
            if report.downtime_ms is not None:
                seconds = report.downtime_ms / 1000
                _observe(values, "phaul_downtime_seconds", engine, seconds, _DOWNTIME)
                values[_key("phaul_last_downtime_seconds", engine)] = seconds
            if report.post_copy:
                _post_copy(values, engine, report.post_copy)

    def arrived(self, engine: str, result: str) -> None:
        """A migration to this host has ended; `result` is moved, failed or unknown.

        Raises:
            PhaulError: as `ended`.
        """
        with self._change() as values:
            _end(values, Role.DESTINATION, engine, result)

    def collect(self) -> Iterator[Metric]:
        """What they are now, for a registry of prometheus_client."""
        from prometheus_client.core import Metric  # noqa: PLC0415

        with self._lock:
            values = self._read() if self.textfile else dict(self._values)
        yield from _families(values, Metric)

    @contextmanager
    def _change(self) -> Iterator[dict[_Key, float]]:
        with self._lock:
            if self.textfile is None:
                yield self._values
                return
            try:
                with _locked(self.textfile):
                    values = self._read()
                    yield values
                    self._write(self.textfile, values)
            except OSError as error:
                raise PhaulError(
                    f"cannot write metrics to {self.textfile}: {error.strerror}"
                ) from error

    def _read(self) -> dict[_Key, float]:
        require()
        from prometheus_client.parser import text_string_to_metric_families  # noqa: PLC0415

        if self.textfile is None or not self.textfile.exists():
            return {}
        try:
            families = list(text_string_to_metric_families(self.textfile.read_text("utf-8")))
        except ValueError as error:
            raise PhaulError(
                f"{self.textfile} is no file of metrics: {error}", hint="remove it, or name another"
            ) from error
        return {
            _key(sample.name, sample.labels): sample.value
            for family in families
            if family.name in _FAMILIES
            for sample in family.samples
        }

    @staticmethod
    def _write(path: Path, values: Mapping[_Key, float]) -> None:
        from prometheus_client import write_to_textfile  # noqa: PLC0415
        from prometheus_client.core import Metric  # noqa: PLC0415

        class Once:
            def collect(self) -> Iterable[Metric]:
                return _families(values, Metric)

        # Replaces it in one step.
        write_to_textfile(str(path), _registry(Once()))


def _registry(collector: Any) -> Any:
    from prometheus_client import CollectorRegistry  # noqa: PLC0415

    registry = CollectorRegistry()
    registry.register(collector)
    return registry


def observe(
    metrics: Metrics, warn: Callable[[str], None]
) -> Callable[[str, Move, Failure | None], None]:
    """What counts a destination's migrations: an observer of `lifecycle.Hooks`.

    Args:
        metrics: to be added to.
        warn: told what kept a number from being added.
    """

    def told(event: str, move: Move, failure: Failure | None) -> None:
        if move.role is not Role.DESTINATION or event not in (COMMITTED, ON_FAILURE):
            return
        try:
            metrics.arrived(move.engine, "moved" if failure is None else failure.result)
        except PhaulError as error:
            warn(str(error))

    return told


def serve(metrics: Metrics, listen: str) -> Any:
    """Serve them over HTTP at `listen`, HOST:PORT, from a thread; returns the server.

    Raises:
        PhaulError: the port cannot be had.
    """
    from prometheus_client import start_http_server  # noqa: PLC0415

    host, _, port = listen.rpartition(":")
    try:
        server, _thread = start_http_server(int(port), host.strip("[]"), _registry(metrics))
    except OSError as error:
        raise PhaulError(f"cannot serve metrics at {listen}: {error.strerror}") from error
    return server


# -- samples -----------------------------------------------------------------------------------


def _key(name: str, labels: Mapping[str, str]) -> _Key:
    return name, tuple(sorted(labels.items()))


def _add(values: dict[_Key, float], name: str, labels: Mapping[str, str], much: float = 1) -> None:
    key = _key(name, labels)
    values[key] = values.get(key, 0.0) + much


def _end(values: dict[_Key, float], role: Role, engine: str, result: str) -> None:
    labels = {"role": role.value, "engine": engine, "result": result}
    _add(values, "phaul_migrations_total", labels)
    values[_key("phaul_last_end_timestamp_seconds", labels)] = round(time.time(), 3)


def _post_copy(
    values: dict[_Key, float], engine: Mapping[str, str], told: Mapping[str, float]
) -> None:
    _add(values, "phaul_post_copy_pages_total", engine, told.get("pages", 0))
    _add(values, "phaul_post_copy_faults_total", engine, told.get("faults", 0))
    _observe(values, "phaul_post_copy_seconds", engine, told.get("seconds", 0.0), _DURATION)
    worst = told.get("worst_fault_ms", 0.0) / 1000
    values[_key("phaul_last_worst_fault_seconds", engine)] = worst


def _observe(
    values: dict[_Key, float],
    name: str,
    labels: Mapping[str, str],
    value: float,
    buckets: Iterable[float],
) -> None:
    for edge in (*buckets, float("inf")):
        text = "+Inf" if edge == float("inf") else repr(edge)
        _add(values, f"{name}_bucket", {**labels, "le": text}, float(value <= edge))
    _add(values, f"{name}_count", labels)
    _add(values, f"{name}_sum", labels, value)


def _families(values: Mapping[_Key, float], make: Any) -> Iterator[Metric]:
    for name, (kind, text) in _FAMILIES.items():
        family = make(name, text, kind)
        suffixes = {"counter": ("_total",), "gauge": ("",)}.get(kind, ("_bucket", "_count", "_sum"))
        names = [name + suffix for suffix in suffixes]
        for (sample, labels), value in values.items():
            if sample in names:
                family.add_sample(sample, dict(labels), value)
        yield family


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Exclude other processes that write to `path`.

    Raises:
        OSError: the file of the lock cannot be made, or somebody has it for too long.
    """
    fd = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + _LOCK_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_S)
        yield
    finally:
        os.close(fd)
