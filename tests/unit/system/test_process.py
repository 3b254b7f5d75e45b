"""Whether a process can still run, against files that stand for the kernel's, and a real one."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from phaul_engines.common.members import Members

from phaul_runtime.errors import OutcomeUnknown
from phaul_runtime.system import process
from phaul_runtime.system.process import Life, Member

EXITING = 0x4
SYS_EXIT = {"x86_64": 60, "aarch64": 93}
KILLED = "0000000000000100"


def thread(home: Path, state: str = "S", flags: int = 0, pending: str = "0" * 16) -> None:
    home.mkdir(parents=True, exist_ok=True)
    fields = [state, *["0"] * 5, str(flags), *["0"] * 12, "77", "0"]
    (home / "stat").write_text(f"{home.name} (a ) b) {' '.join(fields)}\n")
    (home / "status").write_text(f"Name:\tx\nSigPnd:\t{pending}\nShdPnd:\t{'0' * 16}\n")


@pytest.mark.parametrize(
    ("facts", "life"),
    [
        ({}, Life.RUNS),
        ({"state": "R"}, Life.RUNS),
        ({"state": "t"}, Life.RUNS),
        ({"state": "Z"}, Life.OVER),
        # Killed, and the kernel frees its memory: 612 ms for 4 GiB.
        ({"state": "R", "flags": EXITING, "pending": KILLED}, Life.OVER),
        ({"state": "R", "pending": KILLED}, Life.DOOMED),
        ({"state": "D", "pending": KILLED}, Life.OVER),
    ],
)
def test_what_the_kernel_says_of_one_thread(
    tmp_path: Path, facts: dict[str, object], life: Life
) -> None:
    thread(tmp_path / "10", **facts)  # type: ignore[arg-type]
    assert Member(10, 77).life(tmp_path) is life
    assert Member(10, 78).life(tmp_path) is Life.OVER
    assert Member(11, 77).life(tmp_path) is Life.OVER


def test_a_first_thread_that_has_ended_is_not_the_process(tmp_path: Path) -> None:
    thread(tmp_path / "10", "Z")
    thread(tmp_path / "10/task/10", "Z")
    thread(tmp_path / "10/task/12", "S")
    assert Member(10, 77).life(tmp_path) is Life.RUNS
    thread(tmp_path / "10/task/12", "R", EXITING)
    assert Member(10, 77).life(tmp_path) is Life.OVER
    thread(tmp_path / "10/task/12", "R", pending=KILLED)
    assert Member(10, 77).life(tmp_path) is Life.DOOMED


def test_such_a_process_is_known_to_live_and_is_killed() -> None:
    """A real one: its first thread calls pthread_exit, another goes on."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        import ctypes

        def wait() -> None:
            os.write(write, b"x")
            while True:
                time.sleep(3600)

        threading.Thread(target=wait, daemon=True).start()
        ctypes.CDLL(None).syscall(SYS_EXIT[os.uname().machine], 0)  # of this thread alone
    os.close(write)
    try:
        assert os.read(read, 1) == b"x"
        start = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        found = Member(pid, start)
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            pass
        assert found.life() is Life.RUNS
        members = Members([found])
        assert not members.gone()
        assert not members.dead()
        members.kill()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)
    assert members.gone()
    assert members.dead()


def test_what_the_kernel_still_frees_holds_up_its_clean_up_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No commit, and so no downtime, and no recovery's decision: that grew with memory."""
    monkeypatch.setattr(Member, "life", lambda self, proc=Path("/proc"): Life.OVER)
    monkeypatch.setattr(Member, "exists", lambda self, proc=Path("/proc"): True)
    members = Members([Member(10, 77), Member(11, 77)])
    assert members.dead()
    assert members.gone()
    assert members.ended()
    assert not members.await_end(0.0)


def test_one_that_does_not_get_to_die_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread(tmp_path / "10", "R", pending=KILLED)
    monkeypatch.setattr(Member, "life", lambda self, proc=tmp_path: Life.DOOMED)
    monkeypatch.setattr(process, "_POLL_S", 0.0)
    with pytest.raises(OutcomeUnknown, match="was killed and has not ended"):
        Member(10, 77).settled(0.0)


def test_one_that_stays_traced_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phaul_engines.common.members.LET_GO_WITHIN_S", 0.0)
    monkeypatch.setattr("phaul_engines.common.members.tracer_of", lambda _: 99)
    start = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    members = Members([Member(os.getpid(), start)])
    with pytest.raises(OutcomeUnknown, match="traced by process 99"):
        members.gone()
    assert not members.ended()
