"""Runs on a host of the laboratory: imports an image of the host's own programs into docker.

make_image.py NAME PROGRAM...
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from make_bundle import TOOLS, copy_program  # type: ignore[import-not-found]


def main(name: str, programs: list[str]) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as made:
        root = Path(made)
        for directory in ("bin", "dev", "proc", "sys", "tmp", "etc", "run", "data"):
            (root / directory).mkdir()
        for program in {*TOOLS, *programs}:
            copy_program(root, program)
        tar = subprocess.Popen(["tar", "-C", made, "-c", "."], stdout=subprocess.PIPE)
        subprocess.run(["docker", "import", "-", name], stdin=tar.stdout, check=True)
        if tar.wait() != 0:
            raise RuntimeError("tar failed")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
