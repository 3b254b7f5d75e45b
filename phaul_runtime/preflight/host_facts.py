"""What a host is: gathered by the same code on both sides, compared by `checks`."""

from __future__ import annotations

import os
import platform
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phaul_runtime import __version__
from phaul_runtime.criu.session import Criu, criu_opts, require_pycriu
from phaul_runtime.cutover import orphans
from phaul_runtime.errors import PhaulError
from phaul_runtime.rpc import phaul_pb2 as pb
from phaul_runtime.system import proc
from phaul_runtime.system.host import boot_id, filesystem_of, memory_available
from phaul_runtime.system.pathwalk import private_problem

CPUINFO = "cpuinfo.img"


def gather_facts(workdir: str, state_dir: str, criu: Criu) -> pb.HostFacts:
    """The facts of this host; what cannot be found out is told in the `*_problem` fields."""
    facts = pb.HostFacts(
        hostname=socket.gethostname(),
        phaul_version=__version__,
        kernel=platform.release(),
        arch=platform.machine(),
        page_size=os.sysconf("SC_PAGE_SIZE"),
        root=os.geteuid() == 0,
        memory_available=memory_available(),
        workdir=workdir,
        boot_id=boot_id(),
        pid_namespace=Path("/proc/self/ns/pid").readlink().name,
        state_dir=state_dir,
        leftovers=orphans.find(Path(workdir), Path(state_dir)),
        rsync=proc.find("rsync") is not None,
    )
    _add_cpu(facts)
    _add_workdir(facts)
    _add_state_dir(facts)
    _add_criu(facts, criu)
    return facts


def one_host(here: pb.HostFacts, there: pb.HostFacts) -> bool:
    """Whether both are of one host: a pid names the same process for both.

    Hosts of namespaces share a kernel, and so its boot_id, but not their pids.
    """
    return (here.boot_id, here.pid_namespace) == (there.boot_id, there.pid_namespace)


def _add_cpu(facts: pb.HostFacts) -> None:
    for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            facts.cpu_model = value.strip()
        elif key.strip() in ("flags", "Features"):
            facts.cpu_flags.extend(value.split())
        if facts.cpu_model and facts.cpu_flags:
            return


def _add_workdir(facts: pb.HostFacts) -> None:
    path = Path(facts.workdir)
    facts.workdir_problem = private_problem(path)
    if not facts.workdir_problem:
        usage = os.statvfs(path)
        facts.workdir_free = usage.f_bavail * usage.f_frsize
        facts.workdir_fs = filesystem_of(path)


def _add_state_dir(facts: pb.HostFacts) -> None:
    path = Path(facts.state_dir)
    facts.state_problem = private_problem(path)
    if not facts.state_problem:
        facts.state_fs = filesystem_of(path)


def _add_criu(facts: pb.HostFacts, criu: Criu) -> None:
    try:
        require_pycriu()
        version = criu.version()
        facts.criu_version = str(version)
        facts.page_format = version.page_format or 0
        features = criu.feature_check()
        facts.dirty_tracking, facts.lazy_pages = features.mem_track, features.lazy_pages
        if not facts.workdir_problem:
            _add_criu_files(facts, criu)
    except PhaulError as error:
        facts.criu_problem = str(error)


def _add_criu_files(facts: pb.HostFacts, criu: Criu) -> None:
    """What CRIU can only say with a directory for its log and images."""
    with _scratch(facts.workdir) as (path, directory):
        criu.check(criu_opts(images_dir_fd=directory, log_file="check.log"))
        criu.cpuinfo_dump(criu_opts(images_dir_fd=directory, log_file="cpuinfo.log"))
        facts.cpuinfo = (path / CPUINFO).read_bytes()


@contextmanager
def _scratch(workdir: str) -> Iterator[tuple[Path, int]]:
    with tempfile.TemporaryDirectory(dir=workdir) as name:
        directory = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield Path(name), directory
        finally:
            os.close(directory)


def cpu_problem(workdir: str, criu: Criu, cpuinfo: bytes) -> tuple[str, ...]:
    """Hold another host's cpuinfo.img against this CPU; CRIU's lines, empty if it fits."""
    with _scratch(workdir) as (path, directory):
        (path / CPUINFO).write_bytes(cpuinfo)
        try:
            criu.cpuinfo_check(criu_opts(images_dir_fd=directory, log_file="cpuinfo.log"))
        except PhaulError as error:
            return error.log or (error.message,)
    return ()
