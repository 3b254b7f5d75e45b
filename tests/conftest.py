"""What CI runs, and that nothing end-to-end is skipped there: a skipped e2e test fails the run."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from phaul_runtime.system import logs
from tests.environment import know_pycriu

# How long an example takes says how busy the machine is.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# The laboratory's package.
sys.path.insert(0, str(Path(__file__).resolve().parent / "lab"))


def pytest_configure() -> None:
    """Of several that run tests side by side each has laboratories of its own."""
    know_pycriu()
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker and not os.environ.get("PHAUL_LAB", "").endswith(worker):
        from phaul_lab.lab import checkout_name

        os.environ["PHAUL_LAB"] = f"{checkout_name()}-{worker}"


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = [r.nodeid for r in (reporter.stats.get("skipped", []) if reporter else [])]
    if os.environ.get("CI") and any("tests/e2e" in name for name in skipped):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """CI has 25 minutes: what is `thorough` is left to `make test-all` (THOROUGH=1)."""
    if os.environ.get("THOROUGH"):
        return
    left = [item for item in items if item.get_closest_marker("thorough")]
    if left and len(items) > len(left):  # one that was named alone is run
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]


@pytest.fixture(autouse=True)
def _logs_as_before() -> Iterator[None]:
    """What a command set up in this process ends with the test: its stderr is none afterwards.

    Nor is a test about the migration of an earlier one (`logs.enter`).
    """
    logs.enter("")
    root = logging.getLogger()
    handlers = list(root.handlers)
    levels = {name: logging.getLogger(name).level for name in logs._OURS}
    yield
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
