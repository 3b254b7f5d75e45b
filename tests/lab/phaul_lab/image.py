"""The images, one for each suite: built once from the recipe, cached outside the repository."""

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
DEFAULT_SUITE = "trixie"
# What the project's own tests need, where the recipe wants them to run on a suite's Python.
TEST_VENV = "/opt/phaul-tests"
# Debian package > what it brings that is needed here.
NEEDED = {
    "qemu-system-x86": "qemu-system-x86_64",
    "qemu-utils": "qemu-img",
    "mmdebstrap": "mmdebstrap",
    "e2fsprogs": "mke2fs",
    "openssh-client": "ssh",
}
_IMAGE_FILES = ("labinit", "lab-reap.c")


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


def suites() -> list[str]:
    """The suites of software that the recipe has."""
    return [name for name in recipe().sections() if name != "emulated"]


def requirements(*extras: str) -> list[str]:
    """What the project needs from PyPI, as setup.cfg says."""
    parser = configparser.ConfigParser()
    parser.read(SOURCE / "setup.cfg")
    listed = [parser["options"]["install_requires"]]
    listed += [parser["options.extras_require"][extra] for extra in extras]
    return [line.strip() for lines in listed for line in lines.splitlines() if line.strip()]


def _needed(suite: str) -> dict[str, list[str]]:
    """Each virtual environment of the image, and what is installed in it."""
    found = {VENV: requirements()}
    if recipe()[suite].getboolean("test_requirements"):
        found[TEST_VENV] = requirements("test", "batch")
    return found


def image_key(suite: str) -> str:
    """A hash of everything that the image of a suite is made of."""
    settings = recipe()
    names = ("apt_options", "packages", "test_requirements")
    parts = [suite, *(f"{name}={settings[suite][name]}" for name in names)]
    parts += [settings["emulated"]["disk_gib"]]
    parts += [f"{venv} {' '.join(names)}" for venv, names in _needed(suite).items()]
    parts += [(HERE / name).read_text(encoding="utf-8") for name in _IMAGE_FILES]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def check_tools() -> None:
    """Name the Debian packages that are missing on this machine."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [package for package, tool in NEEDED.items() if not shutil.which(tool, path=path)]
    if missing:
        raise LabError(f"missing on this machine: apt-get install {' '.join(missing)}")


class Image:
    """One cached image: `root` (unpacked), `base.img`, `vmlinuz`, `initrd`."""

    def __init__(self, directory: Path) -> None:
        self.dir = directory
        self.root = directory / "root"
        self.base = directory / "base.img"
        self.kernel = directory / "vmlinuz"
        self.initrd = directory / "initrd"

    @property
    def suite(self) -> str:
        """The name of its suite of software."""
        return self.dir.name.partition("-")[0]


def ensure_image(suite: str = DEFAULT_SUITE) -> Image:
    """The image of a suite by the current recipe; built if it is not cached (minutes)."""
    check_tools()
    if suite not in suites():
        raise LabError(f"no suite {suite!r}: there are {', '.join(suites())}")
    directory = cache_dir() / "images" / f"{suite}-{image_key(suite)}"
    if directory.exists():  # it got its name when it was whole
        return Image(directory)
    with locked(cache_dir() / f"images-{suite}.lock"):
        if not directory.exists():
            directory.parent.mkdir(parents=True, exist_ok=True)
            work = Path(tempfile.mkdtemp(prefix=".building-", dir=directory.parent))
            try:
                work.chmod(0o755)
                _build(Image(work), suite)
                work.rename(directory)
            except BaseException:
                shutil.rmtree(work, ignore_errors=True)
                raise
    return Image(directory)


def ssh_key() -> Path:
    """The key by which the laboratories' hosts are entered and enter each other."""
    key = cache_dir() / "id_ed25519"
    with locked(cache_dir() / "key.lock"):
        if not key.exists():
            run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "laboratory", "-f", key])
    return key


def _build(image: Image, suite: str) -> None:
    settings = recipe()
    packages = ",".join(settings[suite]["packages"].split())
    options = settings[suite]["apt_options"].splitlines()
    run(
        [
            "mmdebstrap",
            "--variant=minbase",
            *(f"--aptopt={option}" for option in options if option),
            f"--include={packages}",
            suite,
            image.root,
        ],
        timeout=1500,
        log=image.dir / "debian.log",
    )
    root = image.root
    _configure(root)
    shutil.copy(HERE / "labinit", root / "sbin/labinit")
    (root / "sbin/labinit").chmod(0o755)
    shutil.copy(HERE / "lab-reap.c", root / "tmp/lab-reap.c")
    run(["chroot", root, "gcc", "-O2", "-o", "/sbin/lab-reap", "/tmp/lab-reap.c"])
    for venv, needed in _needed(suite).items():
        _dependencies(root, venv, needed)
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
            f"{settings['emulated']['disk_gib']}G",
        ],
        env={"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"},
    )


def _configure(root: Path) -> None:
    ssh = root / "root/.ssh"
    ssh.mkdir(mode=0o700, exist_ok=True)
    key = ssh_key()
    (ssh / "authorized_keys").write_text(key.with_suffix(".pub").read_text())
    shutil.copy(key, ssh / "id_ed25519")
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


def _dependencies(root: Path, venv: str, needed: list[str]) -> None:
    """A virtual environment that sees the system's pycriu, compiled ahead: hosts are slow."""
    wheels = root / "tmp/wheels"
    ask = "import sys; print('%d%d' % sys.version_info[:2])"
    version = run(["chroot", root, "python3", "-I", "-c", ask]).stdout.decode().strip()
    with tempfile.TemporaryDirectory() as tmp:
        python = Path(tmp) / "venv/bin/python"
        run(["python3", "-I", "-m", "venv", python.parent.parent])
        run(
            [
                python,
                "-I",
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
                *needed,
            ],
            timeout=900,
        )
    run(["chroot", root, "python3", "-I", "-m", "venv", "--system-site-packages", venv])
    run(
        [
            "chroot",
            root,
            f"{venv}/bin/pip",
            "-q",
            "install",
            "--no-index",
            "--find-links",
            "/tmp/wheels",
            "--ignore-installed",
            *needed,
        ],
        env={"PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": "/dev/null"},
    )
    compiling = ["python3", "-I", "-m", "compileall", "-q", venv, "/usr/lib/python3"]
    run(["chroot", root, *compiling], check=False)
    shutil.rmtree(wheels)
