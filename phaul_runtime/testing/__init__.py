"""For authors of an engine, or of what drives one: a conformance suite and a fake.

One suite that every engine passes. A third party tells it about an engine with a `Case`, and runs
each of `CHECKS` from any test runner; with pytest::

    @pytest.fixture(scope="module")
    def bench(tmp_path_factory):
        with Bench(MyCase(), tmp_path_factory.mktemp("bench")) as bench:
            yield bench

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_conforms(bench, check):
        bench.run(check)

A check that fails raises `NotConforming`, an AssertionError that says what the engine did. The
engines shipped here pass it in tests/e2e/programs/conformance.py, which is also an example of a
`Case` for each. `FakeEngine` is an engine without CRIU that obeys the contract.
"""

from __future__ import annotations

from phaul_runtime.testing.bench import Bench, Move, NoCriu, RecordingHandover
from phaul_runtime.testing.case import Case, NotConforming, Place, Told, expect
from phaul_runtime.testing.checks import CHECKS, Check
from phaul_runtime.testing.fake import FakeCase, FakeEngine

__all__ = [
    "CHECKS",
    "Bench",
    "Case",
    "Check",
    "FakeCase",
    "FakeEngine",
    "Move",
    "NoCriu",
    "NotConforming",
    "Place",
    "RecordingHandover",
    "Told",
    "expect",
]
