"""All tests, part by part; those of one processor side by side.

    python -m tests.parts [PART ...]      all parts, or those named, one after the other

What a part prints is shown once it has ended; how long each took stands at the end. Logs are in
build/tests.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "build/tests"
BIN = Path(sys.executable).parent
LAB = "tests/lab/lab"
SLOWEST = "--durations=10 --durations-min=20"
PYTEST = f"PYTHONPATH=$({LAB} pycriu) {BIN}/pytest"
# By name: what a shell runs.
PARTS = {
    "image-trixie": f"{LAB} root --suite trixie",
    "image-forky": f"{LAB} root --suite forky",
    "lint": f"{BIN}/ruff check . && {BIN}/ruff format --check . && {BIN}/mypy"
    f" && {BIN}/lint-imports",
    "unit": f"{PYTEST} tests/unit tests/contract tests/integration",
    "unit-forky": "tests/lab/unit-forky.sh",
    "e2e-native": f"{PYTEST} tests/e2e --labs native,native-mixed -n 3 --dist loadfile {SLOWEST}",
    "e2e-emulated": f"{PYTEST} tests/e2e --labs emulated {SLOWEST}",
    "e2e-emulated-forky": f"{PYTEST} tests/e2e --labs emulated-forky,emulated-mixed {SLOWEST}",
}
# One stage after the other; its lanes side by side, each one part after the other. Emulated hosts
# are alone: they take two processors.
# `make e2e-emulated-forky` is apart: it shows what e2e-emulated does, on other software.
STAGES: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("image-trixie",), ("image-forky",), ("lint",)),
    (("unit",), ("unit-forky",)),
    (("e2e-native",),),
    (("e2e-emulated",),),
)


@dataclass
class Run:
    """The parts that ran, and how they ended."""

    began: float = field(default_factory=time.monotonic)
    rows: list[tuple[str, float, int]] = field(default_factory=list)
    processes: set[int] = field(default_factory=set)
    given_up: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def lane(self, parts: Sequence[str]) -> None:
        """Run these one after the other; a part that fails stops none."""
        for part in parts:
            if not self.given_up:
                self.part(part)

    def part(self, name: str) -> None:
        began = time.monotonic()
        log = LOGS / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["bash", "-c", PARTS[name]],
                cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
            self.processes.add(process.pid)
            code = process.wait()
            self.processes.discard(process.pid)
        seconds = time.monotonic() - began
        with self.lock:
            self.rows.append((name, seconds, code))
            print(f"===== {name}: {_verdict(code)} after {seconds:.0f} s")
            print(log.read_text(errors="replace"), flush=True)

    def end_all(self) -> None:
        """End what still runs, with all that it started, and begin nothing more."""
        self.given_up = True
        for pid in list(self.processes):
            os.killpg(pid, signal.SIGTERM)

    def report(self) -> int:
        """Print how long each took; returns the exit code."""
        print("===== how long each part took")
        for name, seconds, code in self.rows:
            print(f"{seconds:7.0f} s  {name}: {_verdict(code)}")
        print(f"{time.monotonic() - self.began:7.0f} s  in all", flush=True)
        return 1 if any(code for _, _, code in self.rows) else 0


def _verdict(code: int) -> str:
    return "passed" if code == 0 else f"failed with {code}"


def main(names: Sequence[str]) -> int:
    """Run all, or the named parts."""
    if unknown := [name for name in names if name not in PARTS]:
        print(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
        return 2
    LOGS.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    run = Run()
    stages = ((tuple(names),),) if names else STAGES
    try:
        for lanes in stages:
            with ThreadPoolExecutor(len(lanes)) as pool:
                waiting = [pool.submit(run.lane, lane) for lane in lanes]
                try:
                    for done in waiting:
                        done.result()
                except KeyboardInterrupt:
                    run.end_all()
                    raise
    except KeyboardInterrupt:
        return 130
    return run.report()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
