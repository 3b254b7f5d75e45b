"""The conformance suite on the engines shipped here; both halves on one host of the laboratory.

    conformance.py ENGINE DIRECTORY [CHECK...]      prints a JSON line for each check

The name of a check and null, or why the engine failed it. make_bundle.py lies beside it; for docker
its daemon runs, and has the image phaul-test:1.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from phaul_runtime.engine import load_engine
from phaul_runtime.testing import CHECKS, Bench, Case, Place, Told

# A page is rewritten every ten seconds: what a wrong chain of images loses is not soon made good.
VICTIM = ("--mib", "4", "--hot-mib", "4", "--writes", "100", "--verifies", "4000")
# A dirtier tells ten times a second; an emulated host may be slow.
PAUSE_S = 1.0
MAKER = Path(__file__).with_name("make_bundle.py")
CGROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")
DOCKER = Path("/var/lib/docker")
# What this host's docker can restore: see tests/e2e/docker_hosts.py.
DOCKER_NETWORK = os.environ.get("DOCKER_NETWORK", "--network none").split()
DOCKER_IMAGE = "phaul-test:1"
# Where its runtime and its containerd keep what they know of a container that runs.
DOCKER_STATE = (
    Path("/run/docker/runtime-runc/moby"),
    Path("/run/containerd/io.containerd.runtime.v2.task/moby"),
)
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def read_status(path: Path) -> Told | None:
    with contextlib.suppress(OSError, ValueError):
        status = json.loads(path.read_text())
        return Told(status["tick"], status["passes"], status["wrong"])
    return None


def names_and_words() -> Iterator[tuple[int, str, str]]:
    """Pid, name and command line of everything that is no zombie."""
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                stat = (entry / "stat").read_text(errors="replace")
                if stat.rpartition(") ")[2][0] not in "ZX":
                    words = (entry / "cmdline").read_bytes().decode(errors="replace")
                    name = stat[stat.index("(") + 1 : stat.rindex(")")]
                    yield int(entry.name), name, words


@contextlib.contextmanager
def small_pages() -> Iterator[None]:
    """All of so small a victim would fit into huge pages, and be dirty as a whole all the time:
    whatever a wrong chain of images loses would be carried again.
    """
    text = HUGE_PAGES.read_text()
    HUGE_PAGES.write_text("never")
    try:
        yield
    finally:
        HUGE_PAGES.write_text(text[text.index("[") + 1 : text.index("]")])


def criu_runs() -> list[str]:
    return [f"criu, pid {pid}" for pid, name, _ in names_and_words() if name == "criu"]


class ProcessCase(Case):
    """A dirtier in a pid namespace of its own; its copy writes to the same status file."""

    pause_s = PAUSE_S

    def __init__(self, directory: Path) -> None:
        self.engine = load_engine("process")
        self._status = directory / "status"
        self._pid = 0
        self._unshare: subprocess.Popen[bytes] | None = None

    def start(self) -> str:
        argv = ["unshare", "--pid", "--fork", "setsid", "piggie-dirty", "--status"]
        null = subprocess.DEVNULL
        self._unshare = subprocess.Popen(
            [*argv, str(self._status), *VICTIM],
            stdin=null,
            stdout=null,
            stderr=null,
            start_new_session=True,
        )
        while not (pids := self._dirtiers()) or self.told(Place.SOURCE) is None:
            time.sleep(0.05)
        self._pid = pids[0]
        return str(self._pid)

    def _dirtiers(self) -> list[int]:
        return [
            pid
            for pid, name, words in names_and_words()
            if name.startswith("piggie") and str(self._status) in words
        ]

    def missing(self) -> str:
        pid = int((PROC / "sys/kernel/pid_max").read_text()) - 1
        while (PROC / str(pid)).exists():
            pid -= 1
        return str(pid)

    def told(self, place: Place) -> Told | None:
        return read_status(self._status)

    def alive(self, place: Place) -> bool:
        pids = self._dirtiers()
        return self._pid in pids if place is Place.SOURCE else bool({*pids} - {self._pid})

    def leftovers(self, *, undone: bool) -> Sequence[str]:
        found = [f"dirtier, pid {pid}" for pid in self._dirtiers() if pid != self._pid]
        found += [str(group) for group in (CGROUPS / "phaul-runtime").glob("*/")]
        # In the freeze the final dump's own CRIU waits for the verdict.
        return found + (criu_runs() if undone else [])

    def clear(self) -> None:
        for pid in self._dirtiers():
            os.kill(pid, signal.SIGKILL)
        while self._dirtiers():
            time.sleep(0.05)
        if self._unshare is not None:
            self._unshare.wait(30)
            self._unshare = None
        self._status.unlink(missing_ok=True)
        for group in (CGROUPS / "phaul-runtime").glob("*/"):
            with contextlib.suppress(OSError):
                group.rmdir()

    def taken(self, manifest: Mapping[str, Any]) -> Mapping[str, Any] | None:
        return {**manifest, "own_pid_namespace": False}


class ContainerCase(Case):
    """A container with a dirtier; its copy has another name, bundle and cgroup."""

    pause_s = PAUSE_S

    def __init__(self, directory: Path, runtime: str) -> None:
        self.engine = load_engine(runtime)
        self._runtime = runtime
        self._directory = directory
        self._count = 0

    def _name(self, place: Place) -> str:
        name = f"conform-{self._runtime}-{self._count}"
        return name if place is Place.SOURCE else f"{name}-there"

    def _bundle(self, place: Place) -> Path:
        return self._directory / self._name(place)

    def _run(self, *words: str, check: bool = True) -> str:
        """Its output; a container that it starts must not have our pipes."""
        with (self._directory / "out").open("w+") as out:
            done = subprocess.run(
                [self._runtime, *words], stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                check=False,
            )  # fmt: skip
            out.seek(0)
            said = out.read()
        if check and done.returncode != 0:
            raise RuntimeError(f"{self._runtime} {' '.join(words)}: {said}")
        return said if done.returncode == 0 else ""

    def start(self) -> str:
        self._count += 1
        bundle = self._bundle(Place.SOURCE)
        args = ["piggie-dirty", "--status", "/data/status", *VICTIM]
        spec = json.dumps({"path": str(bundle), "args": args})
        subprocess.run([sys.executable, MAKER, spec], check=True)
        log = str(self._directory / "log")
        null = subprocess.DEVNULL
        words = ["--log", log, "run", "-d", "--bundle", str(bundle), self._name(Place.SOURCE)]
        done = subprocess.run(
            [self._runtime, *words], stdin=null, stdout=null, stderr=null, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(Path(log).read_text())
        return self._name(Place.SOURCE)

    def missing(self) -> str:
        return "conform-missing"

    def told(self, place: Place) -> Told | None:
        return read_status(self._bundle(place) / "rootfs/data/status")

    def _pids(self, place: Place) -> list[str]:
        group = CGROUPS / self._name(place)
        return [pid for file in group.rglob("cgroup.procs") for pid in file.read_text().split()]

    def alive(self, place: Place) -> bool:
        return bool(self._pids(place))

    def leftovers(self, *, undone: bool) -> Sequence[str]:
        there = Place.DESTINATION
        found = [f"pid {pid} in its cgroup" for pid in self._pids(there)]
        if self._run("state", self._name(there), check=False):
            found.append(f"{self._runtime} knows {self._name(there)}")
        groups = [CGROUPS / self._name(there), *(CGROUPS / "phaul-runtime").glob("*/")]
        found += [str(group) for group in groups if group.exists()]
        if undone:
            found += [str(self._bundle(there))] if self._bundle(there).exists() else []
            found += criu_runs()
        return found

    def clear(self) -> None:
        for place in Place:
            self._run("delete", "--force", self._name(place), check=False)
            for pid in self._pids(place):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            while self._pids(place):
                time.sleep(0.05)
            with contextlib.suppress(OSError):
                (CGROUPS / self._name(place)).rmdir()
            shutil.rmtree(self._bundle(place), ignore_errors=True)

    def there(self, manifest: Mapping[str, Any]) -> Mapping[str, Any]:
        name = self._name(Place.DESTINATION)
        # CRIU rebuilds the cgroup of the images, which the source's copy has: a file of its
        # configuration, which the annotation names, gives it another root.
        options = self._directory / f"{name}.conf"
        options.write_text(f"cgroup-root /{name}\n")
        config = {**manifest["config"], "annotations": {"org.criu.config": str(options)}}
        return {
            **manifest,
            "name": name,
            "bundle": str(self._bundle(Place.DESTINATION)),
            "cgroup": f"/{name}",
            "config": config,
        }

    def taken(self, manifest: Mapping[str, Any]) -> Mapping[str, Any] | None:
        return manifest


class DockerCase(Case):
    """A container of docker with a dirtier; its copy has another name.

    Everything is looked up in the file system: docker itself answers nothing about a container that
    is being started, and so about none that is held.
    """

    pause_s = PAUSE_S
    within_s = 120.0

    def __init__(self, directory: Path) -> None:
        self.engine = load_engine("docker")
        self._directory = directory
        self._count = 0

    def _name(self, place: Place) -> str:
        name = f"conform-docker-{self._count}"
        return name if place is Place.SOURCE else f"{name}-there"

    def _ids(self, place: Place) -> list[str]:
        """Of the containers of that name; one that moved away was removed, or has another."""
        found = []
        for path in (DOCKER / "containers").glob("*/config.v2.json"):
            with contextlib.suppress(OSError, ValueError):
                facts = json.loads(path.read_text())
                if facts["Name"] == f"/{self._name(place)}":
                    found.append(facts["ID"])
        return found

    def _layers(self, place: Place) -> list[str]:
        mounts = DOCKER / "image/overlay2/layerdb/mounts"
        found = []
        for container in self._ids(place):
            with contextlib.suppress(OSError):
                layer = (mounts / container / "mount-id").read_text()
                found.append(str(DOCKER / "overlay2" / layer / "diff"))
        return found

    def start(self) -> str:
        self._count += 1
        name = self._name(Place.SOURCE)
        argv = ["docker", "run", "--detach", "--name", name, *DOCKER_NETWORK, DOCKER_IMAGE]
        words = ["piggie-dirty", "--status", "/data/status", *VICTIM]
        done = subprocess.run(
            [*argv, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        return name

    def missing(self) -> str:
        return "conform-missing"

    def told(self, place: Place) -> Told | None:
        return next((read_status(Path(at, "data/status")) for at in self._layers(place)), None)

    def _pids(self, place: Place) -> list[int]:
        """What has a layer of that copy for its root, wherever its cgroup is."""
        layers = self._layers(place)
        found = []
        for pid, name, _ in names_and_words():
            with contextlib.suppress(OSError):
                root = (PROC / str(pid) / "mountinfo").read_text().partition("\n")[0]
                if name.startswith("piggie") and any(f"upperdir={at}" in root for at in layers):
                    found.append(pid)
        return found

    def alive(self, place: Place) -> bool:
        return bool(self._pids(place))

    def leftovers(self, *, undone: bool) -> Sequence[str]:
        there = Place.DESTINATION
        found = [f"pid {pid} with its root" for pid in self._pids(there)]
        found += [str(path) for path in (DOCKER / "containers").glob("*/checkpoints/*")]
        found += [str(path) for path in Path("/tmp").glob("ctrd-checkpoint*")]
        found += [str(path) for path in (DOCKER / "tmp").glob("phaul-*")]
        for container in self._ids(there):
            found += [f"container {container}"] if undone else []
            state = [at / container for at in (*DOCKER_STATE, CGROUPS / "docker")]
            found += [str(path) for path in state if path.exists()]
        if undone:
            found += [str(path) for path in Path("/run/phaul-runtime/docker").glob("*")]
            found += criu_runs()
        return found

    def clear(self) -> None:
        for place in Place:
            for container in self._ids(place):
                subprocess.run(
                    ["docker", "rm", "--force", "--volumes", container],
                    stdin=subprocess.DEVNULL, capture_output=True, check=False,
                )  # fmt: skip
        shutil.rmtree("/run/phaul-runtime/docker", ignore_errors=True)

    def there(self, manifest: Mapping[str, Any]) -> Mapping[str, Any]:
        name = self._name(Place.DESTINATION)
        return {
            **manifest,
            "name": name,
            # Create is told what inspect said.
            "facts": {**manifest["facts"], "Name": f"/{name}"},
        }

    def taken(self, manifest: Mapping[str, Any]) -> Mapping[str, Any] | None:
        return manifest


def case_of(engine: str, directory: Path) -> Case:
    match engine:
        case "process":
            return ProcessCase(directory)
        case "docker":
            return DockerCase(directory)
    return ContainerCase(directory, engine)


def main(engine: str, directory: Path) -> None:
    directory.mkdir(mode=0o700)
    victims = directory / "victims"
    victims.mkdir()
    case = case_of(engine, victims)
    only = sys.argv[3:]
    with small_pages(), Bench(case, directory / "bench") as bench:
        for check in CHECKS:
            if only and check.__name__ not in only:
                continue
            begun = time.monotonic()
            failure = None
            try:
                bench.run(check)
            except Exception:  # noqa: BLE001 - each check is told by itself
                failure = traceback.format_exc()
            seconds = round(time.monotonic() - begun, 1)
            line = {"check": check.__name__, "failure": failure, "seconds": seconds}
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()
    shutil.rmtree(directory)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
