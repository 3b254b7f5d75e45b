"""Lifecycle hooks: what they are told, and what their failure does."""

from __future__ import annotations

from pathlib import Path

import pytest

from phaul_runtime.errors import MigrationFailed
from phaul_runtime.lifecycle import COMMITTED, PRE_FREEZE, Hooks, Move
from phaul_runtime.states import Role

MOVE = Move("1f1f1f1f", Role.SOURCE, "runc", "web", "ssh://root@b")


def test_they_are_told_what_it_is_about(tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = f"env | grep ^PHAUL_ | sort > {out}"
    Hooks({PRE_FREEZE: [["sh", "-c", script]]}).run(PRE_FREEZE, MOVE, 7)
    assert out.read_text().split() == [
        "PHAUL_ENGINE=runc", "PHAUL_EVENT=pre_freeze", "PHAUL_ID=1f1f1f1f",
        "PHAUL_PEER=ssh://root@b", "PHAUL_PID=7", "PHAUL_ROLE=source", "PHAUL_TARGET=web",
    ]  # fmt: skip


def test_the_first_failure_ends_it_with_its_words(tmp_path: Path) -> None:
    after = ["touch", str(tmp_path / "after")]
    hooks = Hooks({PRE_FREEZE: [["sh", "-c", "echo no luck >&2; exit 3"], after]})
    with pytest.raises(MigrationFailed, match="hook pre_freeze: sh ended with 3") as caught:
        hooks.run(PRE_FREEZE, MOVE)
    assert caught.value.log == ("no luck",)
    assert not (tmp_path / "after").exists()
    hooks.run(COMMITTED, MOVE)  # there is none


def test_where_it_is_too_late_a_failure_is_a_warning() -> None:
    hooks = Hooks({COMMITTED: [["no-such-program-here"]]})
    (warning,) = hooks.try_to(COMMITTED, MOVE)
    assert "no-such-program-here" in warning


def test_a_hook_has_its_time() -> None:
    with pytest.raises(MigrationFailed, match="did not end within"):
        Hooks({PRE_FREEZE: [["sleep", "30"]]}, timeout_s=0.2).run(PRE_FREEZE, MOVE)
