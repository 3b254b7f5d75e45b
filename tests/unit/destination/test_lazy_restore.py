"""When a restore is lazy, and what becomes of one that cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from phaul_runtime.destination import lazy_restore
from phaul_runtime.destination.lazy_restore import AUTO_FROM, LazyRestore
from phaul_runtime.destination.restored import by_image
from phaul_runtime.errors import DestinationError
from phaul_runtime.memory.fill_plan import PAGE, FillPlan, Run, Runs
from phaul_runtime.postcopy.pages import RemotePages

MIB = 1 << 20
ROOT = 4711


class Pager:
    """A pager that only remembers what it was told."""

    state = "waiting"
    missing: Sequence[int] = ()
    remote_missing = 0
    broken = ""

    def __init__(self) -> None:
        self.said: list[str] = []
        self._left = list(self.missing)

    @classmethod
    def start(cls, workdir: Path, **_: Any) -> Pager:
        if cls.broken == "start":
            raise DestinationError("no python there")
        return cls()

    def plan(self, path: Path, **_: Any) -> None:
        if self.broken == "plan":
            raise DestinationError("both are dead")
        self.said.append(f"plan {FillPlan.load(path).pages}")

    def verify(self, pids: dict[int, int], **_: Any) -> dict[str, Any]:
        if self.broken == "verify":
            raise DestinationError("the area at 0x1000 of process 1 does not exist")
        self.said.append(f"verify {pids}")
        return {"verified": True, "registered": 1, "overwritten": 0}

    def status(self, **_: Any) -> dict[str, Any]:
        if self.broken == "status":
            raise DestinationError("both are dead")
        missing = self._left.pop(0) if self._left else 0
        state = self.state if not self.missing or self._left else "done"
        return {
            "state": state,
            "pids": [0, 0],
            "pages": 9,
            "missing": missing,
            "remote_missing": self.remote_missing,
            "faults": 1,
            "worst_fault_ms": 2.0,
            "ms": 3.0,
        }

    def connected(self) -> bool:
        return self.broken != "status"

    def stop(self) -> None:
        self.said.append("stop")

    def close(self) -> None:
        self.said.append("close")


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> type[Pager]:
    """Pages as many as `AUTO_FROM`, and a pager that works unless it is told not to."""

    def plan(*_: Any) -> FillPlan:
        runs = Runs()
        runs.append(Run(PAGE, AUTO_FROM // PAGE, 0, 0))
        return FillPlan(["/pages-1.img"], {1: runs})

    class Fresh(Pager):
        pass

    monkeypatch.setattr(lazy_restore, "plan_lazy", plan)
    monkeypatch.setattr(lazy_restore, "PagerClient", Fresh)
    monkeypatch.setattr(lazy_restore, "_POLL_S", 0)
    monkeypatch.setattr(lazy_restore, "by_image", lambda root: {1: root})
    return Fresh


def begun(mode: str, directory: Path, cannot: str = "") -> LazyRestore:
    found = LazyRestore(mode, directory, "1f-pager", lambda: cannot)
    found.begin()
    (directory / "3").mkdir()
    return found


def test_the_pager_gets_its_plan_and_criu_its_socket(tmp_path: Path, planned: type[Pager]) -> None:
    restore = begun("auto", tmp_path)
    assert restore.plan(tmp_path / "3")
    assert restore.why_not == ""
    socket = tmp_path / "3/lazy-pages.socket"
    assert socket.readlink() == tmp_path / "pager/lazy-pages.socket"


@pytest.mark.parametrize("broken", ["start", "plan"])
def test_without_a_pager_auto_is_full_and_lazy_fails(
    tmp_path: Path, planned: type[Pager], broken: str
) -> None:
    planned.broken = broken
    (tmp_path / "auto").mkdir()
    auto = begun("auto", tmp_path / "auto")
    # CRIU starts while the pager is given its plan.
    assert auto.plan(tmp_path / "auto/3") == (broken == "plan")
    assert not auto.handed(ROOT)
    assert "no python" in auto.why_not or "both are dead" in auto.why_not
    (tmp_path / "lazy").mkdir()
    must = begun("lazy", tmp_path / "lazy")
    with pytest.raises(DestinationError, match="no lazy restore"):
        _ = must.plan(tmp_path / "lazy/3") and must.handed(ROOT)


def test_the_copy_is_verified_while_it_is_held(tmp_path: Path, planned: type[Pager]) -> None:
    restore = begun("auto", tmp_path)
    assert restore.plan(tmp_path / "3")
    assert restore.handed(ROOT)
    pager: Any = restore._pager
    assert pager.said == [f"plan {AUTO_FROM // PAGE}", f"verify {{1: {ROOT}}}"]


def test_what_cannot_be_verified_is_restored_in_full_or_fails(
    tmp_path: Path, planned: type[Pager]
) -> None:
    planned.broken = "verify"
    for mode in ("auto", "lazy"):
        (tmp_path / mode).mkdir()
        restore = begun(mode, tmp_path / mode)
        assert restore.plan(tmp_path / mode / "3")
        if mode == "auto":
            assert not restore.handed(ROOT)
            assert "area at 0x1000 of process 1 does not exist" in restore.why_not
        else:
            with pytest.raises(DestinationError, match=r"no lazy restore: .*not exist"):
                restore.handed(ROOT)


def test_a_tree_that_has_ended_meanwhile_is_no_lazy_restore(
    tmp_path: Path, planned: type[Pager], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy_restore, "by_image", by_image)
    restore = begun("lazy", tmp_path)
    assert restore.plan(tmp_path / "3")
    with pytest.raises(DestinationError, match=f"the restored process {1 << 30} has ended"):
        restore.handed(1 << 30)


def test_little_memory_is_restored_at_once(
    tmp_path: Path, planned: type[Pager], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy_restore, "AUTO_FROM", AUTO_FROM + 1)
    restore = begun("auto", tmp_path)
    assert not restore.plan(tmp_path / "3")
    assert restore.why_not == "16 MiB are restored as fast at once"


def test_full_starts_no_pager_and_what_cannot_be_lazy_says_why(
    tmp_path: Path, planned: type[Pager]
) -> None:
    planned.broken = "start"  # would be told if it were started
    full = LazyRestore("full", tmp_path, "1f-pager")
    full.begin()
    assert not full.plan(tmp_path)
    assert full.why_not == "restore: full"
    crun = begun("auto", tmp_path, "crun cannot")
    assert not crun.plan(tmp_path / "3")
    assert crun.why_not == "crun cannot"


def test_a_pager_that_died_before_the_copy_ran_is_noticed(
    tmp_path: Path, planned: type[Pager]
) -> None:
    restore = begun("auto", tmp_path)
    assert restore.plan(tmp_path / "3")
    assert not restore.lost()
    planned.broken = "status"
    assert restore.lost()


def test_it_is_watched_to_the_last_page(tmp_path: Path, planned: type[Pager]) -> None:
    planned.missing = (0, 8, 4, 0)  # the first answer is asked for at the start
    planned.state = "filling"
    restore = begun("auto", tmp_path)
    assert restore.plan(tmp_path / "3")
    seen: list[int] = []
    restore.watch(lambda now: seen.append(now.missing))
    assert seen == [8, 4, 0]


def test_a_pager_that_does_nothing_is_told(
    tmp_path: Path, planned: type[Pager], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy_restore, "STALLED_S", -1.0)
    planned.missing = (0, 8, 8, 8, 8)
    planned.state = "filling"
    restore = begun("auto", tmp_path)
    assert restore.plan(tmp_path / "3")
    with pytest.raises(DestinationError, match="8 pages are missing"):
        restore.watch(lambda now: None)


# -- pages that are still at the source ----------------------------------------------------


@pytest.fixture
def far(planned: type[Pager], monkeypatch: pytest.MonkeyPatch) -> type[Pager]:
    """Three pages, as little as that is, and they are not here."""

    def plan(_index: object, _images_dir: Path, remote: Path) -> FillPlan:
        runs = Runs()
        runs.append(Run(PAGE, 3, 0, 0))
        return FillPlan([str(remote)], {1: runs}, str(remote.with_name("remote.map")), 0, 3)

    def of(_images_dir: Path) -> RemotePages:
        return RemotePages([(1, PAGE, 3)])

    monkeypatch.setattr(lazy_restore, "plan_lazy", plan)
    monkeypatch.setattr(RemotePages, "of", of)
    return planned


def test_little_memory_that_is_at_the_source_is_lazy_too(tmp_path: Path, far: type[Pager]) -> None:
    restore = begun("auto", tmp_path)
    for attempt in ("3", "4"):
        (tmp_path / attempt).mkdir(exist_ok=True)
        assert restore.plan(tmp_path / attempt)
        assert restore.handed(ROOT)
        assert restore.place == tmp_path / "pager"
        assert restore.store is not None
        assert restore.store.missing() == [(0, 3)]
        # Nothing of a failed attempt's is taken for the next one's.
        restore.store.put(0, bytes(PAGE))


@pytest.mark.parametrize("mode", ["auto", "full"])
def test_what_is_at_the_source_is_never_restored_in_full(
    tmp_path: Path, far: type[Pager], mode: str
) -> None:
    restore = begun(mode, tmp_path, "crun cannot")
    why = "restore: full" if mode == "full" else "crun cannot"
    with pytest.raises(DestinationError, match=f"pages are still at the source: {why}"):
        restore.plan(tmp_path / "3")


@pytest.mark.parametrize("broken", ["start", "plan", "verify"])
def test_without_a_pager_what_is_at_the_source_fails(
    tmp_path: Path, far: type[Pager], broken: str
) -> None:
    far.broken = broken
    restore = begun("auto", tmp_path)
    with pytest.raises(DestinationError, match=r"still at the source: .*(no python|both|exist)"):
        _ = restore.plan(tmp_path / "3") and restore.handed(ROOT)


def test_a_plan_that_fails_is_no_full_restore(
    tmp_path: Path, far: type[Pager], monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(*_: Any) -> FillPlan:
        raise DestinationError("no image has the page")

    monkeypatch.setattr(lazy_restore, "plan_lazy", plan)
    restore = begun("auto", tmp_path)
    with pytest.raises(DestinationError, match="still at the source: no image"):
        restore.plan(tmp_path / "3")


def test_a_cable_may_be_cut_for_long(
    tmp_path: Path, far: type[Pager], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy_restore, "STALLED_S", -1.0)
    far.missing = (3, 3, 3, 3, 3, 0)
    far.remote_missing = 3
    far.state = "filling"
    restore = begun("auto", tmp_path)
    assert restore.plan(tmp_path / "3")
    restore.watch(lambda now: None)
