"""The image: built once from its recipe, cached outside the repository."""

from __future__ import annotations

import configparser
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from phaul_lab.shell import LabError, locked, run

HERE = Path(__file__).resolve().parent.parent
SOURCE = HERE.parent.parent
VENV = "/opt/phaul-runtime"
# Debian package > what it brings that is needed here.
NEEDED = {
    "qemu-system-x86": "qemu-system-x86_64",
    "qemu-utils": "qemu-img",
    "mmdebstrap": "mmdebstrap",
    "e2fsprogs": "mke2fs",
    "openssh-client": "ssh",
}
_RECIPE_FILES = ("recipe.ini", "labinit", "lab-reap.c")


def cache_dir() -> Path:
    """Where images and running laboratories lie."""
    chosen = os.environ.get("PHAUL_LAB_CACHE")
    if chosen:
        return Path(chosen)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "phaul-runtime-lab"


def recipe() -> configparser.ConfigParser:
    """The recipe of the hosts."""
    parser = configparser.ConfigParser()
    parser.read(HERE / "recipe.ini")
    return parser


def requirements() -> list[str]:
    """What the project needs from PyPI, as setup.cfg says."""
    parser = configparser.ConfigParser()
    parser.read(SOURCE / "setup.cfg")
    lines = parser["options"]["install_requires"].splitlines()
    return [line.strip() for line in lines if line.strip()]


def image_key() -> str:
    """A hash of everything that the image is made of."""
    state = hashlib.sha256()
    for name in _RECIPE_FILES:
        state.update((HERE / name).read_bytes())
    state.update("\n".join(requirements()).encode())
    return state.hexdigest()[:16]


def check_tools() -> None:
    """Name the Debian packages that are missing on this machine."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [package for package, tool in NEEDED.items() if not shutil.which(tool, path=path)]
    if missing:
        raise LabError(f"missing on this machine: apt-get install {' '.join(missing)}")


class Image:
    """One cached image: `root` (unpacked), `base.img`, `vmlinuz`, `initrd`, `key` (ssh)."""

    def __init__(self, directory: Path) -> None:
        self.dir = directory
        self.root = directory / "root"
        self.base = directory / "base.img"
        self.kernel = directory / "vmlinuz"
        self.initrd = directory / "initrd"
        self.ssh_key = directory / "id_ed25519"


def ensure_image() -> Image:
    """The image for the current recipe; built if it is not cached (minutes)."""
    check_tools()
    directory = cache_dir() / "images" / image_key()
    with locked(cache_dir() / "images.lock"):
        if not directory.exists():
            directory.parent.mkdir(parents=True, exist_ok=True)
            work = Path(tempfile.mkdtemp(prefix=".building-", dir=directory.parent))
            try:
                work.chmod(0o755)
                _build(Image(work))
                work.rename(directory)
            except BaseException:
                shutil.rmtree(work, ignore_errors=True)
                raise
    return Image(directory)


def _build(image: Image) -> None:
    settings = recipe()
    packages = ",".join(settings["debian"]["packages"].split())
    run(
        [
            "mmdebstrap",
            "--variant=minbase",
            f"--include={packages}",
            settings["debian"]["suite"],
            image.root,
        ],
        timeout=1500,
        log=image.dir / "debian.log",
    )
    root = image.root
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "laboratory", "-f", image.ssh_key])
    _configure(root, image)
    shutil.copy(HERE / "labinit", root / "sbin/labinit")
    (root / "sbin/labinit").chmod(0o755)
    shutil.copy(HERE / "lab-reap.c", root / "tmp/lab-reap.c")
    run(["chroot", root, "gcc", "-O2", "-o", "/sbin/lab-reap", "/tmp/lab-reap.c"])
    _dependencies(root)
    kernel = next((root / "boot").glob("vmlinuz-*"))
    initrd = next((root / "boot").glob("initrd.img-*"))
    shutil.copy(kernel, image.kernel)
    shutil.copy(initrd, image.initrd)
    run(
        [
            "mke2fs",
            "-q",
            "-t",
            "ext4",
            "-d",
            root,
            "-E",
            "lazy_itable_init=1",
            image.base,
            f"{settings['host']['disk_gib']}G",
        ],
        env={"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"},
    )


def _configure(root: Path, image: Image) -> None:
    ssh = root / "root/.ssh"
    ssh.mkdir(mode=0o700, exist_ok=True)
    public = image.ssh_key.with_suffix(".pub").read_text()
    (ssh / "authorized_keys").write_text(public)
    shutil.copy(image.ssh_key, ssh / "id_ed25519")
    (ssh / "id_ed25519").chmod(0o600)
    (root / "etc/ssh/ssh_config.d/lab.conf").write_text(
        "Host a b c 10.77.0.*\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n"
        "  LogLevel ERROR\n"
    )
    (root / "etc/ssh/sshd_config.d/lab.conf").write_text(
        "UseDNS no\nUsePAM no\nPermitRootLogin yes\nMaxSessions 200\nMaxStartups 200\n"
        "PrintMotd no\nSetEnv PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n"
    )
    (root / "etc/hosts").write_text(
        "127.0.0.1 localhost\n10.77.0.1 a\n10.77.0.2 b\n10.77.0.3 c\n10.0.2.2 control\n"
    )
    (root / "etc/fstab").write_text("")


def _dependencies(root: Path) -> None:
    """A virtual environment that sees the system's pycriu, compiled ahead: hosts are slow."""
    wheels = root / "tmp/wheels"
    version = (
        run(["chroot", root, "python3", "-c", "import sys; print('%d%d' % sys.version_info[:2])"])
        .stdout.decode()
        .strip()
    )
    with tempfile.TemporaryDirectory() as tmp:
        python = Path(tmp) / "venv/bin/python"
        run(["python3", "-m", "venv", python.parent.parent])
        run(
            [
                python,
                "-m",
                "pip",
                "-q",
                "download",
                "--only-binary=:all:",
                "--python-version",
                version,
                "--implementation",
                "cp",
                "--abi",
                f"cp{version}",
                "--abi",
                "abi3",
                "--abi",
                "none",
                "--platform",
                "manylinux2014_x86_64",
                "--platform",
                "manylinux_2_17_x86_64",
                "--platform",
                "manylinux_2_28_x86_64",
                "-d",
                wheels,
                *requirements(),
            ],
            timeout=900,
        )
    run(["chroot", root, "python3", "-m", "venv", "--system-site-packages", VENV])
    run(
        [
            "chroot",
            root,
            f"{VENV}/bin/pip",
            "-q",
            "install",
            "--no-index",
            "--find-links",
            "/tmp/wheels",
            "--ignore-installed",
            *requirements(),
        ],
        env={"PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": "/dev/null"},
    )
    run(
        ["chroot", root, "python3", "-m", "compileall", "-q", VENV, "/usr/lib/python3"], check=False
    )
    shutil.rmtree(wheels)
