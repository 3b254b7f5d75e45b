"""One migration as the destination sees it: from Open to Commit or Abort."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from phaul_runtime.api import PhaulConfig
from phaul_runtime.criu import Criu
from phaul_runtime.engine import DestinationHalf, load_engine
from phaul_runtime.errors import DestinationError, PhaulError
from phaul_runtime.filecarry import FileStage
from phaul_runtime.images import directory_bytes, remove_tree
from phaul_runtime.rpc import phaul_pb2 as pb
from phaul_runtime.server import PhaulServer

log = logging.getLogger(__name__)

_ID = re.compile(r"[0-9a-f]{8,64}")
_IMAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.img")
MEMORY_WITHIN_S = 30.0


def checked_id(text: str) -> str:
    """A migration id that is safe as a directory's name.

    Raises:
        DestinationError: it is not.
    """
    if not _ID.fullmatch(text):
        raise DestinationError(f"malformed migration id {text[:80]!r}")
    return text


def checked_json(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object sent by the other side.

    Raises:
        DestinationError: it is none.
    """
    try:
        value = json.loads(data or b"{}")
    except ValueError as error:
        raise DestinationError(f"malformed {what}") from error
    if not isinstance(value, dict):
        raise DestinationError(f"malformed {what}")
    return value


class Incoming:
    """A migration that arrives at this host.

    Calls may come from several threads; steps exclude each other.

    Args:
        request: what the client opened it with.
        workdir: private directory under which this migration gets one of its own.
        criu: a session factory.
    """

    def __init__(self, request: pb.OpenRequest, workdir: Path, criu: Criu) -> None:
        self.id = checked_id(request.id)
        self.lost_s = request.lost_s
        self.seen = time.monotonic()
        self._dir = workdir / self.id
        self._criu = criu
        self._step = threading.RLock()
        self._memory: socket.socket | None = None
        self._memory_here = threading.Event()
        self._server: PhaulServer | None = None
        self._log_level = min(4, request.criu_log_level)
        self._stage = FileStage(self.id)
        self._manifest = checked_json(request.manifest, "manifest")
        engine = load_engine(request.engine)
        options = engine.options_model.model_validate(checked_json(request.options, "options"))
        self._engine: DestinationHalf = engine.destination(
            options, criu_log_level=self._log_level, hold_s=request.commit_s
        )
        self._pid = 0
        self.state = "open"
        try:
            self._dir.mkdir(mode=0o700)
        except OSError as error:
            raise DestinationError(f"cannot create {self._dir}: {error.strerror}") from error
        self._engine.prepare(self._manifest, self.id)

    def connect_memory(self, channel: socket.socket) -> None:
        """The memory channel has arrived."""
        self._memory = channel
        self._memory_here.set()

    def beat(self) -> pb.BeatReply:
        """The client lives."""
        self.seen = time.monotonic()
        last = self._server.last_images_dir if self._server else None
        return pb.BeatReply(bytes=directory_bytes(Path(last)) if last else 0, state=self.state)

    def _expect(self, *states: str) -> None:
        if self.state not in states:
            raise DestinationError(f"the migration is {self.state}")

    def start_iter(self) -> None:
        """A directory and a page server for the next iteration."""
        with self._step:
            self._expect("open", "iterating")
            if not self._memory_here.wait(MEMORY_WITHIN_S) or self._memory is None:
                raise DestinationError("the memory channel did not arrive")
            if self._server is None:
                config = PhaulConfig(0, self._memory.fileno(), str(self._dir))
                self._server = PhaulServer(config, self._criu, log_level=self._log_level)
            self._server.start_iter()
            self.state = "iterating"

    def stop_iter(self) -> None:
        """The iteration's page server has ended well; a repetition changes nothing."""
        with self._step:
            if self.state == "committed":
                return
            self._expect("iterating")
            self._require_server().stop_iter()

    def _require_server(self) -> PhaulServer:
        if self._server is None:
            raise DestinationError("no iteration was started")
        return self._server

    def put_files(self, parts: Iterable[pb.FilePart]) -> None:
        """Stage files."""
        with self._step:
            self._expect("open", "iterating")
            try:
                for part in parts:
                    self._stage.take(part)
            finally:
                self._stage.end_stream()

    def prepare(self, parts: Iterable[pb.PreparePart]) -> pb.PrepareReply:
        """Take the final images, restore, hold.

        Raises:
            PhaulError: nothing of it is left but the directory, which `abort` removes.
        """
        with self._step:
            self._expect("iterating")
            self.state = "preparing"
            begun = time.monotonic()
            server = self._require_server()
            images_dir = Path(server.last_images_dir or "")
            write_images(images_dir, parts)
            # CRIU acknowledges pages before it has flushed them: only now is the chain whole.
            server.stop_iter()
            self._stage.install()
            written = time.monotonic()
            self._pid = self._engine.restore(self._criu, images_dir)
            self.state = "prepared"
            return pb.PrepareReply(
                pid=self._pid,
                images_ms=(written - begun) * 1000,
                restore_ms=(time.monotonic() - written) * 1000,
            )

    def commit(self) -> pb.CommitReply:
        """Let it run; a repetition only answers again."""
        with self._step:
            if self.state != "committed":
                self._expect("prepared")
                self._resumed_at = self._engine.resume()
                self.state = "committed"
                threading.Thread(target=self._settle, name="settle").start()
            since = (time.monotonic() - self._resumed_at) * 1000
            return pb.CommitReply(pid=self._pid, since_resume_ms=since)

    _resumed_at = 0.0

    def _settle(self) -> None:
        """After the commit, when time no longer matters."""
        with self._step:
            self._stage.keep()
            self._close(keep_images=False)

    def abort(self, *, client_lost: bool = False) -> None:
        """Discard everything, unless it was committed; idempotent.

        A held copy whose client is lost never runs, but it may be the only one: the source may
        have been killed already. Its images are kept.
        """
        if self._memory is not None:
            # Ends a page server that waits for memory, and so whoever waits for it.
            with contextlib.suppress(OSError):
                self._memory.shutdown(socket.SHUT_RDWR)
        with self._step:
            if self.state in ("committed", "aborted"):
                return
            keep = client_lost and self.state == "prepared"
            self.state = "aborted"
            with contextlib.suppress(PhaulError):
                self._engine.discard()
            if not keep:
                self._stage.undo()
            self._close(keep_images=keep)
            if keep:
                log.error(
                    "%s: the client was lost while the copy was held; images kept in %s",
                    self.id,
                    self._dir,
                )

    def _close(self, *, keep_images: bool) -> None:
        if self._server is not None:
            self._server.abort()
        if self._memory is not None:
            self._memory.close()
        if not keep_images:
            remove_tree(self._dir)


def write_images(images_dir: Path, parts: Iterable[pb.PreparePart]) -> None:
    """Write images by name into `images_dir`, mode 0600; names that lead elsewhere are refused."""
    name, fd = "", -1
    try:
        for part in parts:
            if not part.name:
                continue
            if not _IMAGE_NAME.fullmatch(part.name):
                raise DestinationError(f"malformed image name {part.name[:80]!r}")
            if part.name != name:
                if fd >= 0:
                    os.close(fd)
                name = part.name
                flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
                fd = os.open(images_dir / name, flags, 0o600)
            os.write(fd, part.data)
    except OSError as error:
        raise DestinationError(f"cannot write {name}: {error.strerror}") from error
    finally:
        if fd >= 0:
            os.close(fd)
