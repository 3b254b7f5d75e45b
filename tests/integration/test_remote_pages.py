"""Pages that come over a channel while the process runs, against the kernel's userfaultfd.

The source is a stopped process on this host, whose memory is read as on another one. Its pages come
over a channel that is slow and that is cut, to agents that are killed, for a pager whose processes
are killed.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from phaul_runtime.destination.lazy_restore import LazyRestore
from phaul_runtime.errors import ChannelError, DestinationError, MigrationFailed
from phaul_runtime.memory.fill_plan import PAGE, FillPlan, Run, Runs
from phaul_runtime.pager import WANTED
from phaul_runtime.pager.client import PagerClient
from phaul_runtime.postcopy.pages import RemotePages
from phaul_runtime.postcopy.receiver import Receiver
from phaul_runtime.postcopy.sender import PageSender
from phaul_runtime.postcopy.store import PageStore
from tests.integration.test_pager import (  # noqa: F401
    BASE,
    PAGES,
    accounted,
    alive,
    gone,
    kill_one,
    pytestmark,
)

ROOT = Path(__file__).parents[2]
TASK = [sys.executable, "-m", "tests.integration.remote_task"]
AGENT = Path(__file__).with_name("remote_agent.py")
PID = 42


class Channel:
    """From a source to a destination, a piece every few milliseconds."""

    def __init__(self, pause_s: float) -> None:
        self._pause_s = pause_s
        self.source, ours = socket.socketpair()
        self.destination, theirs = socket.socketpair()
        self._inner = ours, theirs
        self._threads = [
            threading.Thread(target=self._carry, args=pair, daemon=True)
            for pair in ((ours, theirs, True), (theirs, ours, False))
        ]
        for thread in self._threads:
            thread.start()

    def _carry(self, a: socket.socket, b: socket.socket, slow: bool) -> None:
        with contextlib.suppress(OSError):
            while data := a.recv(70_001):
                b.sendall(data)
                if slow:
                    time.sleep(self._pause_s)
        self.cut()

    def cut(self) -> None:
        for end in self._inner:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.cut()
        for thread in self._threads:
            thread.join(20)
        for end in (self.source, self.destination, *self._inner):
            end.close()


class Place:
    """A working directory with a plan, of which most is remote, and what was started in it."""

    def __init__(self, path: Path, *, local: bool = True) -> None:
        self.workdir = path / "pager"
        self.workdir.mkdir(mode=0o700)
        self.plan = path / "plan"
        rng = random.Random(7)
        runs, remote, at, number = Runs(), [], 0, 0
        with (path / "pages-1.img").open("wb") as file:
            while at < PAGES:
                count = min(rng.choice((1, 2, 40, 300)), PAGES - at)
                if local and rng.random() < 0.4:
                    runs.append(Run(BASE + at * PAGE, count, 0, file.tell()))
                    for page in range(at, at + count):
                        file.write(struct.pack("=Q", page + 1) * 512)
                else:
                    runs.append(Run(BASE + at * PAGE, count, 1, number * PAGE))
                    remote.append((PID, BASE + at * PAGE, count))
                    number += count
                at += count
        self.pages = RemotePages(remote)
        self.store = PageStore.create(self.workdir, number)
        files = [str(path / "pages-1.img"), str(self.workdir / "remote.pages")]
        FillPlan(files, {PID: runs}, str(self.workdir / "remote.map"), 1, number).save(self.plan)
        self.clients: list[PagerClient] = []
        self.tasks: list[subprocess.Popen[str]] = []
        self.other = self._start("--source", str(BASE), str(PAGES))
        assert self.other.stdout is not None
        assert self.other.stdout.readline() == "runs\n"
        self.other.send_signal(signal.SIGSTOP)
        self.source = PageSender(self.pages, {PID: self.other.pid})
        self.told: list[int] = []

    def _start(self, *args: str) -> subprocess.Popen[str]:
        task = subprocess.Popen([*TASK, *args], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        self.tasks.append(task)
        return task

    def pager(self, *extra: str) -> PagerClient:
        client = PagerClient.start(self.workdir, extra=extra)
        client.plan(self.plan)
        self.clients.append(client)
        return client

    def held(self) -> subprocess.Popen[str]:
        """One that waits for a line before it runs."""
        argv = [sys.executable, "-m", "tests.integration.held_task", str(self.workdir)]
        task = subprocess.Popen(
            [*argv, str(BASE), str(PAGES), "look"],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.tasks.append(task)
        assert task.stdout is not None
        assert task.stdout.readline() == "held\n"
        return task

    def begin(self, *, early: int) -> subprocess.Popen[str]:
        return self._start(str(self.workdir), *map(str, (BASE, PAGES, 1, 50, 4, early)))

    def task(self, seed: int = 1, steps: int = 200, threads: int = 4) -> subprocess.Popen[str]:
        numbers = map(str, (BASE, PAGES, seed, steps, threads))
        task = self._start(str(self.workdir), *numbers)
        assert task.stdout is not None
        assert task.stdout.readline() == "runs\n"
        return task

    def serve(self, channel: socket.socket) -> threading.Thread:
        def run() -> None:
            with contextlib.suppress(ChannelError):
                self.source.serve(channel, self.told.append, silent_s=20)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    @contextlib.contextmanager
    def channel(self, pause_s: float) -> Iterator[Channel]:
        channel = Channel(pause_s)
        serving = self.serve(channel.source)
        try:
            yield channel
        finally:
            # What was said at last is still on its way.
            serving.join(1)
            channel.close()
            serving.join(20)
            assert not serving.is_alive()

    def arrive(self, pause_s: float = 0.0) -> bool:
        """Over one channel, in this process, to the end."""
        with self.channel(pause_s) as channel:
            return Receiver(self.store, self.workdir).serve(channel.destination)

    @contextlib.contextmanager
    def asked(self) -> Iterator[socket.socket]:
        """In an agent's place: each datagram says that somebody waits, and for what."""
        path = self.workdir / "wants.socket"
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as agent:
            agent.bind(str(path))
            agent.settimeout(60)
            try:
                yield agent
            finally:
                path.unlink()

    def is_waited_for(self) -> None:
        """Return once somebody has come to a page that is missing, and waits."""
        with self.asked() as agent:
            agent.recv(1000)

    def all_came(self) -> None:
        # Until here nobody has looked but the pager.
        store = PageStore.open(self.workdir)
        assert store.complete
        at = 0
        data = (self.workdir / "remote.pages").read_bytes()
        for _, vaddr, count in self.pages.runs:
            for page in range(count):
                number = (vaddr - BASE) // PAGE + page + 1
                assert data[at : at + PAGE] == struct.pack("=Q", number) * 512
                at += PAGE
        store.close()
        if self.told[-1]:
            # It was cut before the source had heard that all is there: it hears it the next time.
            assert self.arrive()
        assert self.told[-1] == 0


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    yield from kept_place(tmp_path)


def kept_place(tmp_path: Path, *, local: bool = True) -> Iterator[Place]:
    place = Place(tmp_path, local=local)
    yield place
    for task in place.tasks:
        if task.poll() is None:
            task.kill()
        task.communicate()
    for client in place.clients:
        try:
            client.stop()
        except DestinationError:  # it has not seen yet that nobody is left, or has ended
            with contextlib.suppress(DestinationError):
                client.wait(10)
    place.source.close()
    place.store.close()


def test_a_page_that_has_not_come_blocks(place: Place) -> None:
    pager = place.pager()
    task = place.task(steps=50)
    assert task.stdout is not None
    place.is_waited_for()
    assert not select.select([task.stdout], [], [], 1)[0]
    assert task.poll() is None
    # All that is here is filled, and asked is for what the threads wait for.
    now = pager.status()
    assert now["state"] == "filling"
    assert now["remote_missing"] == place.pages.total
    assert place.arrive(0.001)
    said, _ = task.communicate(timeout=60)
    assert (task.returncode, said) == (0, "")
    result = pager.wait(30)
    assert (result["state"], result["missing"], result["remote_missing"]) == ("done", 0, 0)
    # Who waited for the network is counted from when it began to.
    assert result["worst_fault_ms"] > 1000
    assert gone(result["pids"])
    assert not list(place.workdir.glob("*.socket"))
    place.all_came()


@pytest.mark.parametrize("seed", range(4))
def test_cuts_and_what_the_process_does_to_its_memory(place: Place, seed: int) -> None:
    rng = random.Random(seed)
    pager = place.pager()
    task = place.task(seed, steps=300)
    cuts, over = 0, False
    while not over:
        arrival = Receiver(place.store, place.workdir)
        with place.channel(0.005) as channel:
            how = rng.choice((channel.cut, arrival.stop))
            timer = threading.Timer(rng.random() * 0.3, how)
            timer.start()
            over = arrival.serve(channel.destination)
            timer.cancel()
            timer.join()
        cuts += 1
        if rng.random() < 0.3:
            place.store.close()
            place.store = PageStore.open(place.workdir)
    said, _ = task.communicate(timeout=60)
    assert (task.returncode, said) == (0, "")
    assert pager.wait(30)["state"] == "done"
    assert cuts > 1
    place.all_came()


@pytest.mark.parametrize("seed", range(6))
def test_kills_of_either_process_and_of_the_agent(place: Place, seed: int) -> None:
    rng = random.Random(seed)
    pager = place.pager()
    task = place.task(seed, steps=300)
    kills, over = 0, False
    while not over:
        with place.channel(0.01) as channel:
            fd = channel.destination.fileno()
            argv = [sys.executable, str(AGENT), str(place.workdir), str(fd)]
            agent = subprocess.Popen(argv, pass_fds=[fd])
            until = time.monotonic() + 0.4 + rng.random()
            while agent.poll() is None and time.monotonic() < until:
                kills += kill_one(pager, rng.randrange(2))
                time.sleep(rng.random() * 0.05)
            agent.kill()
            over = agent.wait(20) == 0
            assert agent.returncode in (0, -signal.SIGKILL)
    said, _ = task.communicate(timeout=60)
    assert (task.returncode, said) == (0, "")
    result = pager.wait(30)
    assert accounted(result)
    assert (result["state"], result["notes"]) == ("done", [])
    assert kills > 2
    place.all_came()


@pytest.mark.parametrize("killed", [None, 0, 1])
def test_the_restore_itself_waits_for_a_page(place: Place, killed: int | None) -> None:
    pager = place.pager()
    early = place.pages.runs[-1][1]
    task = place.begin(early=early)
    assert task.stdout is not None
    place.is_waited_for()
    assert not select.select([task.stdout], [], [], 0.2)[0]
    if killed is not None:
        kill_one(pager, killed)
        place.is_waited_for()
        assert not select.select([task.stdout], [], [], 0.2)[0]
    assert pager.status()["state"] == "restoring"
    assert place.arrive()
    said, _ = task.communicate(timeout=60)
    assert (task.returncode, said) == (0, "runs\n")
    assert pager.wait(30)["state"] == "done"


def test_what_the_restore_touched_comes_before_the_copy_runs(tmp_path: Path) -> None:
    """Areas that are not registered, with pages that are there and that are still at the source."""
    with contextlib.contextmanager(kept_place)(tmp_path, local=False) as place:
        pager = place.pager()
        task = place.held()
        with pytest.raises(DestinationError, match="3 pages that the restore has touched have not"):
            pager.verify({PID: task.pid}, timeout_s=0.5)
        with place.asked() as agent:
            with pytest.raises(DestinationError, match="have not come"):
                pager.verify({PID: task.pid}, timeout_s=0.5)
            assert list(WANTED.iter_unpack(agent.recv(1000))) == [(0, 1), (1, 1), (8, 1)]
        with place.channel(0) as channel:
            arriving = threading.Thread(
                target=Receiver(place.store, place.workdir).serve, args=(channel.destination,)
            )
            arriving.start()
            found = pager.verify({PID: task.pid})
            assert (found["registered"], found["overwritten"]) == (2, 3)
            said, _ = task.communicate("\n\n", timeout=60)
            assert (task.returncode, said) == (0, "runs\ndid\n")
            arriving.join(30)
        result = pager.wait(30)
        assert accounted(result)
        assert (result["lost"], result["notes"]) == (0, [])


@pytest.mark.parametrize("at", [0, 1])
def test_a_kill_while_all_wait_loses_nobody(place: Place, at: int) -> None:
    pager = place.pager()
    task = place.task(steps=20, threads=16)
    place.is_waited_for()
    time.sleep(0.5)
    for _ in range(3):
        assert kill_one(pager, at)
    assert place.arrive()
    said, _ = task.communicate(timeout=60)
    assert (task.returncode, said) == (0, "")
    result = pager.wait(30)
    assert result["state"] == "done"
    # A heir knows since when they waited.
    assert result["worst_fault_ms"] > 500


def test_each_agent_is_told_what_is_waited_for(place: Place) -> None:
    place.pager()
    early = place.pages.runs[-1][1]
    place.begin(early=early)
    # The last run of all: its pages have the highest numbers.
    count = place.pages.runs[-1][2]
    wanted = place.pages.total - count, min(32, count)
    for _ in range(2):
        with place.asked() as agent:
            assert list(WANTED.iter_unpack(agent.recv(1000))) == [wanted]
    assert place.arrive()


def switches(pid: int) -> int:
    words = Path(f"/proc/{pid}/status").read_text().split()
    return int(words[words.index("voluntary_ctxt_switches:") + 1])


def test_while_nothing_comes_the_pager_rests(place: Place) -> None:
    """It asks now and then, and looks hardly more often: time is counted in what it asks."""
    pager = place.pager()
    place.task()
    worker = pager.status()["pids"][0]
    with place.asked() as agent:
        for _ in range(20):
            before = switches(worker)
            for _ in range(10):
                agent.recv(1000)
            # Until it has filled what is here, and has looked in vain a few times, it is busy.
            if switches(worker) - before < 30:
                break
        else:
            raise AssertionError(f"{switches(worker) - before} looks within ten questions")
    assert place.arrive()


def test_a_process_that_is_killed_while_it_waits_ends_its_part(place: Place) -> None:
    pager = place.pager()
    task = place.task()
    place.is_waited_for()
    task.kill()
    result = pager.wait(60)
    assert result["state"] == "done"
    assert result["remote_missing"] == 0
    assert result["filled"] < PAGES


def test_what_is_given_up_before_it_has_come_needs_not_come(place: Place) -> None:
    """All of it unmapped, by one thread while others wait for pages of it."""
    half = BASE + PAGES * PAGE // 2
    far = [str(vaddr) for _, vaddr, _ in place.pages.runs if vaddr >= half]
    argv = [*TASK, "--give-up", str(place.workdir), str(BASE), str(PAGES)]
    pager = place.pager()
    subprocess.run([*argv, *far[:3]], cwd=ROOT, check=True, timeout=30)
    result = pager.wait(60)
    assert (result["state"], result["missing"]) == ("done", 0)


def test_the_source_is_killed(place: Place) -> None:
    place.other.kill()
    place.other.wait(10)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        said: list[bool] = []
        thread = threading.Thread(
            target=lambda: said.append(Receiver(place.store, place.workdir).serve(ours))
        )
        thread.start()
        with pytest.raises(MigrationFailed, match="cannot read the memory of process 42"):
            place.source.serve(theirs, place.told.append, silent_s=20)
        theirs.shutdown(socket.SHUT_RDWR)
        thread.join(20)
    assert said == [False]
    assert place.store.missing_pages == place.pages.total


def test_another_agent_takes_up_pager_and_store(place: Place, tmp_path: Path) -> None:
    pager = place.pager()
    task = place.task(steps=20)
    pager.close()
    restore = LazyRestore("full", tmp_path, "none")
    assert restore.place == place.workdir
    restore.resume()
    assert not restore.why_not
    assert not restore.lost()
    assert restore.store is not None
    assert restore.store.missing_pages == place.pages.total
    assert not restore.filled().over
    with place.channel(0) as channel:
        assert Receiver(restore.store, restore.place).serve(channel.destination)
    seen: list[int] = []
    restore.watch(lambda now: seen.append(now.missing))
    assert seen[-1] == 0
    assert task.wait(60) == 0
    restore.store.close()
    nobody = LazyRestore("auto", tmp_path / "nowhere", "none")
    with pytest.raises(DestinationError, match="no answer from the pager"):
        nobody.resume()
    assert alive(os.getpid())
