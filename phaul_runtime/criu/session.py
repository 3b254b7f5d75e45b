"""One session with `criu swrk`: requests, notifications, feature checks, log excerpts.

pycriu brings the messages (`pycriu.rpc_pb2`); its own class `criu` is not used, since it takes the
first notification for the final reply and knows neither features nor deadlines.

Facts that shape this module (CRIU v4.1.1, read in its source):

- swrk speaks SOCK_SEQPACKET, a message a packet. After any request without `keep_open` (allowed for
  PAGE_SERVER_CHLD, CPUINFO_*, FEATURE_CHECK and VERSION only) it answers and ends: hence a new swrk
  for each request, unless requests are chained on purpose.
- `images_dir_fd` and `work_dir_fd` are numbers in *our* table (CRIU opens /proc/<peer>/fd/N);
  `ps.fd` and `inherit_fd` are numbers in *swrk's* table: those are passed on under the same number.
- The end of our socket is a "no" to any notification: a dead phaul-runtime leaves no frozen tree.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from phaul_runtime.criu.hints import advice
from phaul_runtime.criu.page_format import PageFormat
from phaul_runtime.criu.swrk import End, Swrk
from phaul_runtime.errors import CriuError, PhaulError, Refused

try:
    from pycriu import rpc_pb2 as rpc
except ImportError as _error:
    _IMPORT_ERROR: ImportError | None = _error
    rpc = None
else:
    _IMPORT_ERROR = None

LOG_LINES = 6
LOG_TAIL = 1 << 20
DEFAULT_DEADLINE_S = 3600.0
_ERROR_LINE = re.compile(r"Error \(")
_STAMP = re.compile(r"^\(\d+\.\d+\)\s*")


def require_pycriu() -> None:
    """Say how to get pycriu where it is missing or does not fit.

    Raises:
        Refused: the module cannot be imported, or is older than what this project speaks.
    """
    if rpc is None:
        raise Refused(
            f"pycriu cannot be imported: {_IMPORT_ERROR}",
            hint="install the distribution's package (Debian: python3-pycriu) and let the virtual "
            "environment see it (python3 -m venv --system-site-packages)",
        )
    missing = [
        n
        for n in ("pidfd_store_sk", "network_lock", "orphan_pts_master")
        if n not in rpc.criu_opts.DESCRIPTOR.fields_by_name
    ]
    if missing:
        raise Refused(
            f"pycriu is too old: its criu_opts lacks {', '.join(missing)}",
            hint="install the pycriu that belongs to CRIU 4.1 or later",
        )


def criu_opts(**fields: Any) -> Any:
    """A `criu_opts` message; `None` leaves a field unset."""
    require_pycriu()
    return rpc.criu_opts(**{k: v for k, v in fields.items() if v is not None})


class CriuNotify:
    """What CRIU tells in the middle of a DUMP or a RESTORE; override what matters.

    Returning lets CRIU go on; raising answers "no". After `post_dump` a "no" lets the tree run
    again; after `post_restore` everything is rebuilt and nothing runs yet: it is the last veto.
    """

    def pre_dump(self) -> None:
        """DUMP: the tree still runs."""

    def network_lock(self) -> None:
        """DUMP: the tree is frozen, its own network namespace about to be locked."""

    def query_ext_files(self) -> None:
        """DUMP: the tree is frozen; external files may be named."""

    def post_dump(self) -> None:
        """DUMP: the images are complete, the tree frozen. Returning kills it."""

    def network_unlock(self) -> None:
        """DUMP after a failure, or RESTORE: the network is released."""

    def status_ready(self) -> None:
        """DUMP with lazy pages: the page server listens."""

    def pre_restore(self) -> None:
        """RESTORE: nothing is rebuilt yet."""

    def setup_namespaces(self, pid: int) -> None:
        """RESTORE: the root task's namespaces exist."""

    def post_setup_namespaces(self) -> None:
        """RESTORE: the namespaces are populated."""

    def orphan_pts_master(self, fd: int) -> None:
        """RESTORE: the master end of the tree's console; the descriptor is the callee's."""

    def post_restore(self, pid: int) -> None:
        """RESTORE: everything is rebuilt and held. Returning lets it run."""

    def pre_resume(self) -> None:
        """RESTORE: about to be resumed."""

    def post_resume(self) -> None:
        """RESTORE: the tree runs."""


@dataclass(frozen=True)
class CriuFeatures:
    """What FEATURE_CHECK says of kernel and CRIU."""

    mem_track: bool
    lazy_pages: bool
    pidfd_store: bool


@dataclass(frozen=True, order=True)
class CriuVersion:
    """CRIU's version."""

    major: int
    minor: int
    sublevel: int = 0

    def __str__(self) -> str:
        text = f"{self.major}.{self.minor}"
        return f"{text}.{self.sublevel}" if self.sublevel else text

    @property
    def page_format(self) -> PageFormat | None:
        """How it sends pages and writes page maps; None if that is not known."""
        return PageFormat.of_version(self.major, self.minor)


class Criu:
    """CRIU over its RPC; the counterpart of go-criu's `Criu`.

    Each request starts a `criu swrk` of its own, unless `prepare` was called: then requests go to
    the one that it started, until one of them ends it, or `cleanup`. Without `prepare` an object is
    good for any number of threads at once.

    Args:
        binary: name or path of CRIU.
        pass_fds: descriptors that a prepared swrk shall own (`ps.fd`, `inherit_fd`); those of a
            request that starts its own swrk are found in the request.
        deadline_s: longest time to wait for any one message, seconds.
    """

    def __init__(
        self,
        binary: str = "criu",
        *,
        pass_fds: Sequence[int] = (),
        deadline_s: float = DEFAULT_DEADLINE_S,
    ) -> None:
        self.binary = binary
        self.pass_fds = tuple(pass_fds)
        self.deadline_s = deadline_s
        self._prepared: Swrk | None = None
        self.known_version: CriuVersion | None = None
        """What `version` said last."""

    # -- life of a swrk --------------------------------------------------------------------

    def prepare(self, extra_fds: Iterable[int] = ()) -> None:
        """Start a swrk for the requests that follow; idempotent while one is alive.

        Raises:
            Refused: CRIU or pycriu is missing.
        """
        if self._prepared is None:
            self._prepared = self._started(extra_fds)

    def _started(self, extra_fds: Iterable[int]) -> Swrk:
        require_pycriu()
        return Swrk(self.binary, {*self.pass_fds, *extra_fds}, self.deadline_s)

    def cleanup(self) -> None:
        """End the prepared swrk, if any; idempotent.

        Closing the socket answers "no" to a notification that is under way.
        """
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            prepared.close()

    def __enter__(self) -> Criu:
        self.prepare()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cleanup()

    @property
    def swrk_pid(self) -> int | None:
        """The pid of the prepared swrk."""
        return None if self._prepared is None else self._prepared.pid

    # -- requests --------------------------------------------------------------------------

    def dump(self, opts: Any, notify: CriuNotify | None = None) -> None:
        """Dump a tree; returns when it is dead (or runs on, with `leave_running`).

        Raises:
            CriuError: the dump failed or was vetoed; the tree runs on. A veto's own exception is
                its `__cause__`.
        """
        self._call(rpc.DUMP, opts, notify)

    def pre_dump(self, opts: Any, notify: CriuNotify | None = None) -> None:
        """Dump memory only and let the tree run on; one round of pre-copy.

        Ask `feature_check` first: without dirty tracking CRIU hits a BUG.
        """
        self._call(rpc.SINGLE_PRE_DUMP, opts, notify)

    def restore(self, opts: Any, notify: CriuNotify | None = None) -> int:
        """Restore a tree; returns the pid of its root once it runs."""
        response = self._call(rpc.RESTORE, opts, notify)
        return int(response.restore.pid)

    def check(self, opts: Any) -> None:
        """Ask CRIU whether this kernel has what it needs; its log goes to the images directory."""
        self._call(rpc.CHECK, opts)

    def start_page_server_chld(self, opts: Any) -> tuple[int, int]:
        """Start a page server as a child of the prepared swrk; returns its pid and port.

        `wait_pid` is then the last request to that swrk.
        """
        self.prepare(_wanted_fds(opts))
        response = self._call(rpc.PAGE_SERVER_CHLD, opts, keep_open=True)
        return int(response.ps.pid), int(response.ps.port)

    def wait_pid(self, pid: int) -> int:
        """Wait for the page server `pid` of this swrk; returns its wait status (0: all is well).

        CRIU acknowledges a session before it has flushed the pagemap: only the exit says that
        the images are complete.
        """
        message = rpc.criu_req(type=rpc.WAIT_PID, pid=pid)
        response = self._exchange(self._prepared, message, None)
        if response.type != rpc.WAIT_PID:
            raise CriuError(f"CRIU answered WAIT_PID with type {response.type}", request="WAIT_PID")
        return int(response.status)

    def feature_check(self) -> CriuFeatures:
        """Ask what kernel and CRIU can do together."""
        wanted = rpc.criu_features(mem_track=True, lazy_pages=True, pidfd_store=True)
        response = self._call(rpc.FEATURE_CHECK, None, features=wanted)
        got = response.features
        return CriuFeatures(bool(got.mem_track), bool(got.lazy_pages), bool(got.pidfd_store))

    def version(self) -> CriuVersion:
        """CRIU's version."""
        got = self._call(rpc.VERSION, None).version
        self.known_version = CriuVersion(
            int(got.major_number), int(got.minor_number), int(got.sublevel)
        )
        return self.known_version

    def cpuinfo_dump(self, opts: Any) -> None:
        """Write this CPU's features to cpuinfo.img in the images directory."""
        self._call(rpc.CPUINFO_DUMP, opts)

    def cpuinfo_check(self, opts: Any) -> None:
        """Hold cpuinfo.img in the images directory against this CPU.

        Raises:
            CriuError: a feature that the other CPU has is missing here.
        """
        self._call(rpc.CPUINFO_CHECK, opts)

    # -- the exchange ----------------------------------------------------------------------

    def _call(
        self,
        kind: int,
        opts: Any,
        notify: CriuNotify | None = None,
        *,
        keep_open: bool = False,
        features: Any = None,
    ) -> Any:
        require_pycriu()
        message = rpc.criu_req(type=kind)
        if opts is not None:
            message.opts.CopyFrom(opts)
            message.opts.notify_scripts = notify is not None
        if features is not None:
            message.features.CopyFrom(features)
        if keep_open:
            message.keep_open = True
        prepared = self._prepared
        swrk = prepared or self._started(_wanted_fds(opts))
        try:
            response = self._exchange(swrk, message, notify)
        finally:
            if prepared is None:
                swrk.close()
        name = rpc.criu_req_type.Name(kind)
        # PAGE_SERVER_CHLD is answered as PAGE_SERVER.
        answer = rpc.PAGE_SERVER if kind == rpc.PAGE_SERVER_CHLD else kind
        if response.type != answer or not response.success:
            raise self._failure(name, opts, response, swrk.end)
        return response

    def _exchange(self, swrk: Swrk | None, message: Any, notify: CriuNotify | None) -> Any:
        """One request and all that CRIU asks meanwhile; a swrk that fails it is closed."""
        name = rpc.criu_req_type.Name(message.type)
        if swrk is None:
            raise self._failure(name, message.opts, None, End())
        veto: Exception | None = None
        try:
            swrk.send(message.SerializeToString())
            while True:
                data, fds = swrk.receive()
                response = rpc.criu_resp.FromString(data)
                if response.type != rpc.NOTIFY:
                    break
                try:
                    _dispatch(notify, response.notify, fds)
                except Exception as error:  # noqa: BLE001 - any error in a callback is a veto
                    veto = error
                answer = rpc.criu_req(type=rpc.NOTIFY, notify_success=veto is None)
                swrk.send(answer.SerializeToString())
        except TimeoutError as error:
            self._drop(swrk)
            failure = self._failure(name, message.opts, None, swrk.end)
            failure.message = f"CRIU did not answer {name} within {self.deadline_s:g} s"
            raise failure from error
        except (OSError, EOFError) as error:
            self._drop(swrk)
            raise self._failure(name, message.opts, None, swrk.end) from (veto or error)
        if veto is not None and not response.success:
            failure = self._failure(name, message.opts, response, swrk.end, vetoed=True)
            raise failure from veto
        return response

    def _drop(self, swrk: Swrk) -> None:
        swrk.close()
        if self._prepared is swrk:
            self._prepared = None

    def _failure(
        self,
        name: str,
        opts: Any,
        response: Any,
        end: End,
        *,
        vetoed: bool = False,
    ) -> CriuError:
        text = read_log(opts)
        lines = error_lines(text)
        said = response.cr_errmsg if response is not None and response.HasField("cr_errmsg") else ""
        if said:
            lines = lines or [line for line in said.splitlines() if line.strip()]
        lines = lines or list(end.said)
        hint = advice(lines)
        if vetoed:
            reason = "was vetoed"
        elif response is None:
            reason = f"ended without an answer{end}"
            if not text:
                # It may not have come as far as its log: a loader, or another program.
                hint = hint or f"try by hand: {self.binary} --version"
        else:
            errno = response.cr_errno if response.HasField("cr_errno") else 0
            reason = f"failed ({os.strerror(errno)})" if errno else "failed"
        return CriuError(
            f"CRIU's {name} {reason}", request=name, hint=hint, log=lines, log_text=text
        )


def _wanted_fds(opts: Any) -> set[int]:
    """The descriptors of a request that must be in swrk's own table."""
    if opts is None:
        return set()
    wanted = {entry.fd for entry in opts.inherit_fd}
    if opts.HasField("ps") and opts.ps.HasField("fd"):
        wanted.add(opts.ps.fd)
    return {fd for fd in wanted if fd >= 0}


def _dispatch(notify: CriuNotify | None, note: Any, fds: list[int]) -> None:
    """Call the method that belongs to a notification; unknown ones are let through."""
    script = note.script.replace("-", "_")
    if script == "orphan_pts_master":
        if notify is None:
            for fd in fds:
                os.close(fd)
        else:
            notify.orphan_pts_master(fds[0])
        return
    if notify is None:
        return
    if script in ("setup_namespaces", "post_restore"):
        getattr(notify, script)(int(note.pid))
    elif script in _PLAIN_NOTES:
        getattr(notify, script)()


_PLAIN_NOTES = frozenset(name for name in vars(CriuNotify) if not name.startswith("_")) - {
    "setup_namespaces",
    "post_restore",
    "orphan_pts_master",
}


def read_log(opts: Any) -> str:
    """The end of the log that a request wrote (1 MiB at most); empty when there is none."""
    if opts is None or not opts.log_file:
        return ""
    directory = opts.work_dir_fd if opts.HasField("work_dir_fd") else opts.images_dir_fd
    try:
        fd = os.open(opts.log_file, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    except OSError:
        return ""
    with os.fdopen(fd, "rb") as log:
        size = os.fstat(fd).st_size
        log.seek(max(0, size - LOG_TAIL))
        return log.read().decode(errors="replace")


def error_lines(text: str) -> list[str]:
    """The first lines of a CRIU log that name an error, without their time stamps."""
    found = [_STAMP.sub("", line.strip()) for line in text.splitlines() if _ERROR_LINE.search(line)]
    return found[:LOG_LINES]


__all__ = [
    "Criu",
    "CriuFeatures",
    "CriuNotify",
    "CriuVersion",
    "PhaulError",
    "criu_opts",
    "error_lines",
    "read_log",
    "require_pycriu",
    "rpc",
]
