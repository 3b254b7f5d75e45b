"""What the hosts get of the project: its wheel, installed, and piggie's programs, compiled.

Both are made natively (in the image's unpacked root) and delivered as one tar.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from pathlib import Path

from phaul_lab.image import SOURCE, VENV, Image, cache_dir
from phaul_lab.shell import locked, run

_PARTS = (
    "setup.cfg",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "phaul_runtime",
    "engines",
    "hooks",
    "piggie",
)
_LAUNCHER = f"""#!{VENV}/bin/python3 -I
import sys
from phaul_runtime.cli.main import main
sys.exit(main())
"""


def _files() -> list[Path]:
    found = []
    for part in _PARTS:
        path = SOURCE / part
        if path.is_file():
            found.append(path)
        elif path.is_dir():
            found += [
                p
                for p in sorted(path.rglob("*"))
                if p.is_file()
                and "__pycache__" not in p.parts
                and ".egg-info" not in str(p)
                and p.name not in ("piggie", "piggie-dirty")
            ]
    return found


def payload_key(image: Image) -> str:
    """A hash of the sources and of the image that they are compiled in."""
    state = hashlib.sha256(image.dir.name.encode())
    for path in _files():
        mode = path.stat().st_mode & 0o111
        state.update(f"{path.relative_to(SOURCE)}\0{mode}\0".encode() + path.read_bytes())
    return state.hexdigest()[:16]


def ensure_payload(image: Image) -> Path:
    """A tar to be unpacked over a host's `/`; made if it is not cached (seconds)."""
    directory = cache_dir() / "payloads"
    tar = directory / f"{payload_key(image)}.tar"
    with locked(cache_dir() / "payloads.lock"):
        if not tar.exists():
            directory.mkdir(parents=True, exist_ok=True)
            _make(image, tar)
    return tar


def _make(image: Image, tar: Path) -> None:
    scratch = Path(tempfile.mkdtemp(prefix="payload-", dir=image.root / "tmp"))
    try:
        inside = "/" + str(scratch.relative_to(image.root))
        clean = scratch / "source"
        for path in _files():
            copy = clean / path.relative_to(SOURCE)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy)
        stage = scratch / "stage"
        packages = stage / VENV.lstrip("/") / "phaul"
        run([sys.executable, "-I", "-m", "pip", "-q", "wheel", "--no-deps", "-w", scratch, clean])
        wheel = next(scratch.glob("phaul_runtime-*.whl"))
        run(
            [
                sys.executable,
                "-I",
                "-m",
                "pip",
                "-q",
                "install",
                "--no-deps",
                "--no-index",
                "--no-compile",
                "--target",
                packages,
                wheel,
            ]
        )
        programs = stage / "usr/local/bin"
        programs.mkdir(parents=True)
        for hook in (packages / "bin").glob("phaul-move-*"):
            shutil.copy2(hook, programs)
        shutil.rmtree(packages / "bin")
        run(
            [
                "chroot",
                image.root,
                "python3",
                "-I",
                "-m",
                "compileall",
                "-q",
                "--invalidation-mode",
                "unchecked-hash",
                f"{inside}/stage{VENV}/phaul",
            ]
        )
        program = programs / "phaul-runtime"
        program.write_text(_LAUNCHER)
        program.chmod(0o755)
        if (clean / "piggie/Makefile").exists():
            run(
                [
                    "chroot",
                    image.root,
                    "make",
                    "-s",
                    "-C",
                    f"{inside}/source/piggie",
                    "install",
                    f"DESTDIR={inside}/stage",
                    "PREFIX=/usr/local",
                ]
            )
        made = tar.with_suffix(".part")
        run(["tar", "-C", stage, "--owner=0", "--group=0", "-cf", made, "."])
        made.rename(tar)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
