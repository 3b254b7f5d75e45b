"""PhaulServer: a directory and a page server an iteration, on the destination."""

from __future__ import annotations

import os
import signal
from typing import Any

from phaul_runtime.api import PhaulConfig
from phaul_runtime.criu import Criu, CriuNotify, criu_opts, error_lines, read_log
from phaul_runtime.errors import DestinationError
from phaul_runtime.images import ImageDirs

LOG_FILE = "page-server.log"


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
        config: `memfd` is handed to CRIU as `ps.fd`: nobody else may read from it. `pid` is
            ignored.
        criu: a session factory; by default the `criu` on PATH.
        log_level: of the page servers' logs.
    """

    def __init__(
        self, config: PhaulConfig, criu: Criu | None = None, *, log_level: int = 4
    ) -> None:
        self.config = config
        self.criu: Criu = _ServerCriu(self, criu or Criu())
        self._log_level = log_level
        self._dirs = ImageDirs(config.wdir)
        self._session: Criu | None = None
        self._failed = False
        self._page_server: tuple[int, int] | None = None  # pid, pidfd

    @property
    def last_images_dir(self) -> str | None:
        """The directory of the newest iteration, or None before the first."""
        last = self._dirs.last
        return None if last is None else str(last)

    def start_iter(self) -> None:
        """Begin a directory and start a page server into it; it awaits memory on return.

        Raises:
            DestinationError: the iteration before was not stopped.
            CriuError: the page server did not start.
        """
        if self._session is not None:
            raise DestinationError("start_iter: the iteration before was not stopped")
        directory = self._dirs.open_next()
        # A swrk of its own for each: WAIT_PID ends it, and that is the only way to learn that
        # the page server has flushed everything.
        session = Criu(
            self.criu.binary, pass_fds=(self.config.memfd,), deadline_s=self.criu.deadline_s
        )
        try:
            opts = criu_opts(
                images_dir_fd=directory,
                log_level=self._log_level,
                log_file=LOG_FILE,
                parent_img=self._dirs.parent,
            )
            opts.ps.fd = self.config.memfd
            pid, _port = session.start_page_server_chld(opts)
            self._page_server = (pid, os.pidfd_open(pid))
        except BaseException:
            session.cleanup()
            raise
        finally:
            os.close(directory)
        self._session = session

    def stop_iter(self) -> None:
        """Wait until the page server has written everything and ended well; may be repeated.

        Raises:
            DestinationError: none was ever started, or it failed: the chain is worthless then.
        """
        session, self._session = self._session, None
        if session is None or self._page_server is None:
            if self._dirs.last is None or self._failed:
                raise DestinationError("stop_iter: no iteration was started, or it failed")
            return
        pid, pidfd = self._page_server
        try:
            status = session.wait_pid(pid)
        finally:
            session.cleanup()
            self._page_server = None
            os.close(pidfd)
        if status != 0:
            self._failed = True
            text = self._log_text()
            raise DestinationError(
                f"the page server of iteration {self._dirs.count} failed (wait status {status})",
                log=error_lines(text),
            )

    def end_chain(self) -> None:
        """After a failed migration: the next iteration holds all of memory and has no parent."""
        self.abort()
        self._failed = False
        self._dirs.end_chain()

    def abort(self) -> None:
        """End whatever runs; idempotent. The directories stay."""
        if self._page_server is not None:
            _pid, pidfd = self._page_server
            self._page_server = None
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it has ended by itself
            finally:
                os.close(pidfd)
        if self._session is not None:
            session, self._session = self._session, None
            session.cleanup()

    def _log_text(self) -> str:
        if self._dirs.last is None:
            return ""
        directory = os.open(self._dirs.last, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return read_log(criu_opts(images_dir_fd=directory, log_file=LOG_FILE))
        finally:
            os.close(directory)
