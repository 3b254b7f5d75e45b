"""A mark stays the same for as long as the file is the same."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from phaul_runtime.system.filemark import Mark, mark_of


def mark(path: Path) -> Mark:
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return mark_of(fd)
    finally:
        os.close(fd)


def test_a_directory_of_an_overlay_in_which_the_first_file_is_written(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "none", tmp_path], check=True)
    try:
        for name in ("lower/d", "upper", "work", "merged"):
            (tmp_path / name).mkdir(parents=True)
        layers = ",".join(f"{n}dir={tmp_path / n}" for n in ("lower", "upper", "work"))
        argv = ["mount", "-t", "overlay", "none", "-o", layers, str(tmp_path / "merged")]
        if subprocess.run(argv, check=False, stderr=subprocess.DEVNULL).returncode:
            pytest.skip("overlayfs cannot be mounted here")
        try:
            before = mark(tmp_path / "merged/d")
            (tmp_path / "merged/d/file").touch()
            assert mark(tmp_path / "merged/d") == before
        finally:
            subprocess.run(["umount", tmp_path / "merged"], check=True)
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)
