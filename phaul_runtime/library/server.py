"""PhaulServer: a directory and a receiver of pages an iteration, on the destination.

The receiver is this process (`memory.page_receiver`), or, by `page_server`, CRIU's own page server.
The client's CRIU and the one here may be of different versions (`pageformat`): what comes is
written as the one here reads it, and what goes back as the client's does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from phaul_runtime.criu.page_format import OTHER_RECEIVER, PageFormat, unknown_format
from phaul_runtime.criu.session import Criu, CriuNotify, criu_opts, error_lines, read_log
from phaul_runtime.errors import DestinationError, PhaulError, Refused
from phaul_runtime.library.api import PhaulConfig
from phaul_runtime.memory.hard_close import hang_up
from phaul_runtime.memory.image_dirs import ImageDirs, directory_bytes
from phaul_runtime.memory.page_receiver import Aborted, Listed, PageReceiver
from phaul_runtime.memory.pagemap import convert_page_maps, page_maps, pagemap_image, read_pagemap
from phaul_runtime.memory.preallocate import Preallocation
from phaul_runtime.system.poll import readable

log = logging.getLogger(__name__)

LOG_FILE = "page-server.log"
# A receiver that is told to end does so at once, unless a file system does not answer.
_KILL_S = 30.0


class _ServerCriu(Criu):
    """The session factory that a server hands out: a restore waits for the last pages first.

    CRIU acknowledges a page session before it has flushed it; the ancestor's programs restore
    right then.
    """

    def __init__(self, server: PhaulServer, factory: Criu) -> None:
        super().__init__(factory.binary, pass_fds=factory.pass_fds, deadline_s=factory.deadline_s)
        self._server = server

    def restore(self, opts: Any, notify: CriuNotify | None = None) -> int:
        """See `Criu`; the iteration is stopped first."""
        self._server.stop_iter()
        return super().restore(opts, notify)


class PhaulServer:
    """Takes memory from `config.memfd` into numbered directories under `config.wdir`.

    Args:
        config: `memfd` is duplicated, and handed to CRIU as `ps.fd`: nobody else may read from
            it. `pid` is ignored.
        criu: a session factory; by default the `criu` on PATH.
        log_level: of the logs of CRIU's page servers.
        page_server: `phaul` to receive in this process, `criu` to let CRIU do it.
        ahead: room for the first iteration's pages, if any was made; from now on this object's.
        client: how the client's CRIU sends pages and writes page maps; by default as the one here.
    """

    def __init__(
        self,
        config: PhaulConfig,
        criu: Criu | None = None,
        *,
        log_level: int = 4,
        page_server: Literal["phaul", "criu"] = "phaul",
        ahead: Preallocation | None = None,
        client: PageFormat | None = None,
    ) -> None:
        self.config = config
        # A hand of its own on the connection: a number alone may become somebody else's.
        self._memory = socket.socket(fileno=os.dup(config.memfd))
        factory = criu or Criu()
        self.criu: Criu = _ServerCriu(self, factory)
        self._version = factory.known_version
        self._client = client
        self._log_level = log_level
        self._by_criu = page_server == "criu"
        self._ahead = ahead
        self._dirs = ImageDirs(config.wdir)
        self._page_server: _PageServer | _Receiver | None = None
        self._listed: dict[str, Listed] = {}
        self._failure: PhaulError | None = None
        self._local = False

    @property
    def last_images_dir(self) -> str | None:
        """The directory of the newest iteration, or None before the first."""
        last = self._dirs.last
        return None if last is None else str(last)

    @property
    def failure(self) -> PhaulError | None:
        """Why the chain is worthless, once it is; the client's CRIU knows no more than that its
        channel was closed.
        """
        return self._failure

    @property
    def received(self) -> int:
        """Bytes of the newest iteration that have arrived."""
        if isinstance(self._page_server, _Receiver):
            return self._page_server.received
        last = self._dirs.last
        return 0 if last is None else directory_bytes(last)

    def start_iter(self) -> None:
        """Begin a directory and a receiver into it; it awaits memory on return.

        A receiver that fails closes `config.memfd` for both sides: nobody would read what the
        client's CRIU still sends, and it waits for an answer without an end.

        Raises:
            DestinationError: the iteration before was not stopped, or it failed.
            CriuError: CRIU's page server did not start, or CRIU does not say its version.
            Refused: it is of a version whose page format is not known, and pages are received here.
        """
        if self._page_server is not None:
            raise DestinationError("start_iter: the iteration before was not stopped")
        if self._failure is not None:
            raise self._failure
        images = None if self._by_criu else self._format()
        directory = self._dirs.open_next()
        self._local = False
        if images is not None:
            try:
                self._page_server = self._receiver(directory, images)
            finally:
                os.close(directory)
            return
        self._drop_ahead()
        # A swrk of its own for each: WAIT_PID ends it, and that is the only way to learn that
        # the page server has flushed everything.
        session = Criu(
            self.criu.binary, pass_fds=(self._memory.fileno(),), deadline_s=self.criu.deadline_s
        )
        try:
            opts = criu_opts(
                images_dir_fd=directory,
                log_level=self._log_level,
                log_file=LOG_FILE,
                parent_img=self._dirs.parent,
            )
            opts.ps.fd = self._memory.fileno()
            self._page_server = _PageServer(session, opts, self._ended)
        except BaseException:
            session.cleanup()
            raise
        finally:
            os.close(directory)

    def start_local(self) -> dict[str, bytes]:
        """Begin a directory that gets its images from elsewhere, and no page server.

        `stop_iter` then has its page maps as the CRIU here reads them.

        Returns:
            the page maps of the iteration before it, by file name, as the client's CRIU reads them.

        Raises:
            DestinationError: as `start_iter`; or the directory cannot be made.
        """
        if self._page_server is not None:
            raise DestinationError("start_local: the iteration before was not stopped")
        if self._failure is not None:
            raise self._failure
        try:
            os.close(self._dirs.open_next())
            self._local = True
            directory, parent = self._dirs.path(self._dirs.count), self._dirs.parent
            if parent is None:
                return {}
            # As CRIU's page server does.
            (directory / "parent").symlink_to(parent)
            before = self._dirs.path(self._dirs.count - 1)
            return {path.name: self._as_the_client(path) for path in page_maps(before)}
        except OSError as error:
            raise DestinationError(
                f"cannot begin the final images in {self.config.wdir}: {error.strerror}"
            ) from error

    def _as_the_client(self, path: Path) -> bytes:
        """A page map of this host."""
        if self._client is None:
            return path.read_bytes()
        pagemap = read_pagemap(path)
        pagemap.format = self._client
        return pagemap_image(pagemap)

    def _format(self) -> PageFormat:
        """How the CRIU here reads page maps."""
        if self._version is None:
            asked = Criu(self.criu.binary, deadline_s=self.criu.deadline_s)
            self._version = asked.version()
        known = self._version.page_format
        if known is None:
            raise Refused(unknown_format(self._version), hint=OTHER_RECEIVER)
        return known

    def _drop_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead.drop()
            self._ahead = None

    def _receiver(self, directory: int, images: PageFormat) -> _Receiver:
        parent = self._dirs.parent
        if parent is not None:
            # As CRIU's page server does: a restore follows it.
            os.symlink(parent, "parent", dir_fd=directory)
        else:
            self._listed = {}
        sink = PageReceiver(
            self._memory.fileno(),
            Path(str(self._dirs.last)),
            wire=self._client or images,
            images=images,
            parent=self._listed,
            ahead=self._ahead,
        )
        self._ahead = None
        return _Receiver(sink, self._taken)

    def _taken(self, result: dict[str, Listed] | PhaulError) -> None:
        """The receiver is through; from its own thread, unless `abort` ended it."""
        if isinstance(result, dict):
            self._listed = result
            return
        result.message = (
            f"taking the pages of iteration {self._dirs.count} failed: "
            f"{result.message}{self._space()}"
        )
        self._ended(result)

    def _ended(self, status: int | PhaulError) -> None:
        """The page server has ended; from its own thread, unless `abort` ended it."""
        if status == 0:
            return
        if isinstance(status, PhaulError):
            self._failure = status
        else:
            self._failure = DestinationError(
                f"the page server of iteration {self._dirs.count} failed "
                f"({_describe(status)}{self._space()})",
                log=error_lines(self._log_text()),
            )
        hang_up(self._memory)

    def stop_iter(self) -> None:
        """Wait until the page server has written everything and ended well; may be repeated.

        Raises:
            DestinationError: none was ever started, or it failed: the chain is worthless then; or
                a page map that came from elsewhere is malformed.
        """
        page_server = self._page_server
        if page_server is not None:
            if not page_server.wait(self.criu.deadline_s):
                raise DestinationError(
                    f"the page server of iteration {self._dirs.count} has not ended within "
                    f"{self.criu.deadline_s:g} s"
                )
            self._page_server = None
        if self._failure is not None:
            raise self._failure
        if self._dirs.last is None:
            raise DestinationError("stop_iter: no iteration was started")
        if self._local and self._client not in (None, self._format()):
            convert_page_maps(self._dirs.last, self._format())

    def end_chain(self) -> None:
        """After a failed migration: the next iteration holds all of memory and has no parent."""
        self.abort()
        self._failure = None
        self._dirs.end_chain()

    def abort(self) -> None:
        """End whatever runs; idempotent. The directories stay."""
        self._drop_ahead()
        page_server, self._page_server = self._page_server, None
        if page_server is not None:
            page_server.kill()
            if self._failure is None:
                self._failure = DestinationError("the last iteration was aborted")

    def close(self) -> None:
        """`abort`, and nothing more follows; idempotent."""
        self.abort()
        self._memory.close()

    def _space(self) -> str:
        """A full file system keeps CRIU from telling that it is one; ours says which."""
        try:
            left = os.statvfs(self.config.wdir).f_bavail
        except OSError:
            return ""
        return "" if left else f", no space left in {self.config.wdir}"

    def _log_text(self) -> str:
        if self._dirs.last is None:
            return ""
        try:
            directory = os.open(self._dirs.last, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return ""
        try:
            return read_log(criu_opts(images_dir_fd=directory, log_file=LOG_FILE))
        finally:
            os.close(directory)


def _describe(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"exit {code}" if code >= 0 else signal.Signals(-code).name


class _PageServer:
    """One page server, and the thread that learns at once how it ended.

    Args:
        session: a swrk of its own, from now on this object's.
        opts: of the request.
        on_end: told the wait status, or why there is none; not after `kill`.
    """

    def __init__(
        self, session: Criu, opts: Any, on_end: Callable[[int | PhaulError], object]
    ) -> None:
        self._session = session
        self._on_end = on_end
        self._killed = False
        self._pid, _port = session.start_page_server_chld(opts)
        self._pidfd = os.pidfd_open(self._pid)
        self._thread = threading.Thread(target=self._watch, name="page-server", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        readable(self._pidfd)
        status: int | PhaulError
        try:
            status = self._session.wait_pid(self._pid)
        except PhaulError as error:
            status = error
        self._session.cleanup()
        if not self._killed:
            self._on_end(status)

    def wait(self, seconds: float) -> bool:
        """Until it has ended and `on_end` was told; False if that lasts longer."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            return False
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        return True

    def kill(self) -> None:
        """End it, whatever it does."""
        self._killed = True
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self.wait(self._session.deadline_s)


class _Receiver:
    """One session of a `PageReceiver`, in a thread; the same for it as `_PageServer` for CRIU's.

    Args:
        sink: from now on this object's.
        on_end: told what it has taken, or why not; not after `kill`.
    """

    def __init__(
        self, sink: PageReceiver, on_end: Callable[[dict[str, Listed] | PhaulError], object]
    ) -> None:
        self._sink = sink
        self._on_end = on_end
        self._killed = False
        self._thread = threading.Thread(target=self._run, name="pages", daemon=True)
        self._thread.start()

    @property
    def received(self) -> int:
        """Bytes so far."""
        return self._sink.received

    def _run(self) -> None:
        result: dict[str, Listed] | PhaulError
        try:
            result = self._sink.run()
        except Aborted:
            return
        except PhaulError as error:
            result = error
        except Exception as error:
            log.exception("the receiver of pages failed")
            result = DestinationError(f"{type(error).__name__}: {error}")
        if not self._killed:
            self._on_end(result)

    def wait(self, seconds: float) -> bool:
        """Until it has ended and `on_end` was told; False if that lasts longer."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            return False
        self._sink.close()
        return True

    def kill(self) -> None:
        """End it, whatever it does."""
        self._killed = True
        self._sink.stop()
        self.wait(_KILL_S)
