"""A move on this machine's own kernel, with or without dirty tracking."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from phaul_lab.image import ensure_image
from phaul_lab.payload import ensure_payload

from phaul_runtime.images import remove_tree

SCRIPT = Path(__file__).parent / "native.sh"


@pytest.mark.skipif(os.geteuid() != 0, reason="requires root: namespaces and CRIU")
def test_one_move_within_this_host() -> None:
    image = ensure_image()
    argv = [str(SCRIPT), str(image.root), str(ensure_payload(image))]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    text, _, numbers = done.stdout.partition("numbers\n")
    lines = [json.loads(line) for line in text.splitlines()]
    report = lines[-1]
    assert report["result"] == "moved"
    counted = [int(number) for number in numbers.split()]
    assert counted == list(range(len(counted)))
    levels = {line["check"]: line["level"] for line in lines if line.get("event") == "checked"}
    if levels["dirty-tracking"] == "ok":
        assert report["iterations"]
    else:
        # One stop-and-copy round, and the report says so.
        assert report["iterations"] == []
        assert "no dirty tracking" in report["pre_copy"]
        assert [line["event"] for line in lines[:-1]].count("pre_copy_skipped") == 1
        assert report["final_pages_written"] > 0


@pytest.mark.skipif(os.geteuid() != 0, reason="requires root: a mount")
def test_what_is_mounted_in_a_removed_tree_is_not_reached_into(tmp_path: Path) -> None:
    precious = tmp_path / "host"
    (precious / "empty").mkdir(parents=True)
    place = tmp_path / "images" / "with space"
    place.mkdir(parents=True)
    subprocess.run(["mount", "--bind", precious, place], check=True)
    remove_tree(tmp_path / "images")
    assert not (tmp_path / "images").exists()
    assert (precious / "empty").is_dir()
