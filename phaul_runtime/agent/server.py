"""The destination's agent: control by gRPC, memory by a stream socket, both unix sockets.

A process that may open the sockets may restore processes as root: they lie in a directory of mode
0700, and are reached from other hosts only through ssh, or through the port of the `listener`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable
from concurrent import futures
from pathlib import Path

import grpc

from phaul_runtime.agent.calls import AgentService
from phaul_runtime.agent.watch import Watch, give_up
from phaul_runtime.config.peers import NOBODY, Allowed, Callers, Peer
from phaul_runtime.criu.session import Criu
from phaul_runtime.cutover.journal import (
    KEPT,
    lock_directory,
)
from phaul_runtime.errors import DestinationError, PhaulError, Refused
from phaul_runtime.hooks.lifecycle import Hooks
from phaul_runtime.preflight.wiring import STANDARD, Wiring
from phaul_runtime.rpc import phaul_pb2_grpc
from phaul_runtime.rpc.protocol import MAX_MESSAGE
from phaul_runtime.system import cgroup
from phaul_runtime.system.threads import keep_doing
from phaul_runtime.transport.image_proxy import restored
from phaul_runtime.transport.preamble import CONTROL, ID_BYTES, MEMORY, PAGES, ZSTD

log = logging.getLogger(__name__)

# Started as they are needed; a service may have many restores under way, and each keeps one.
WORKERS = 1024
_PREAMBLE_S = 10.0
_STOP_S = 5.0
_ABORTS_AT_ONCE = 32


class Agent:
    """Sockets, threads and the watch over lost clients around an `AgentService`.

    Args:
        sockets: directory for the two sockets; created with mode 0700, removed by `stop`.
        workdir: private directory for images, one below it for each migration.
        state_dir: of the journals.
        criu: a session factory.
        hooks: of this host.
        on_lost: called once a client was given up: what was started for it may end.
        history: how many settled migrations are remembered.
        allowed: who may send what; those who reach the sockets themselves may send everything.
        wiring: what migrations are made with.
    """

    def __init__(
        self,
        sockets: Path,
        workdir: Path,
        state_dir: Path,
        criu: Criu,
        *,
        on_lost: Callable[[], object] = lambda: None,
        hooks: Hooks | None = None,
        history: int = KEPT,
        allowed: Allowed | None = None,
        wiring: Wiring = STANDARD,
    ) -> None:
        self._sockets = sockets
        self._on_lost = on_lost
        self.callers = Callers(sockets)
        self.service = AgentService(
            workdir,
            state_dir,
            criu,
            hooks or Hooks(),
            history=history,
            callers=self.callers,
            allowed=allowed,
            wiring=wiring,
        )
        self._made = False
        self._lock = -1
        self._workdir = workdir
        self._server = grpc.server(
            futures.ThreadPoolExecutor(WORKERS, thread_name_prefix="call"),
            options=[("grpc.max_receive_message_length", MAX_MESSAGE)],
        )
        phaul_pb2_grpc.add_AgentServicer_to_server(self.service, self._server)
        self._stopping = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def start(self) -> None:
        """Listen on both sockets.

        Raises:
            Refused: the directories cannot be made or the sockets not be bound; nothing is left.
        """
        try:
            self._workdir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._sockets.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._sockets.mkdir(mode=0o700)
            self._made = True
            self._lock = lock_directory(self._sockets)
            self._listener.bind(str(self._sockets / MEMORY))
            self._listener.listen()
            self._server.add_insecure_port(f"unix:{self._sockets / CONTROL}")
        except (OSError, RuntimeError) as error:
            self._leave()
            raise Refused(f"cannot listen in {self._sockets}: {error}") from error
        # Of trees and pagers that ended while no agent was there.
        cgroup.sweep()
        self._server.start()
        keep_doing("accept", self._accept, self._stopping)
        Watch(self.service, self._on_lost, self._stopping).start()

    def stop(self, *, settle_within_s: float | None = None) -> None:
        """Discard what was not committed, and go; what was committed runs on. Idempotent.

        Args:
            settle_within_s: how long to wait for pagers whose copies still miss pages, to put away
                the images after them; None for as long as it takes. A pager goes on by itself.
        """
        self._stopping.set()
        with futures.ThreadPoolExecutor(_ABORTS_AT_ONCE, thread_name_prefix="abort") as pool:
            for migration in self.service.close():
                pool.submit(give_up, migration)
        self._server.stop(_STOP_S).wait(_STOP_S)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._leave()
        deadline = time.monotonic() + (settle_within_s or 0)
        for migration in self.service.all():
            left = None if settle_within_s is None else max(0.0, deadline - time.monotonic())
            if not migration.wait_settled(left):
                log.warning("%s: left to its pager; its images are put away later", migration.id)

    def _leave(self) -> None:
        """Give up the sockets and their directory; idempotent."""
        self._listener.close()
        if self._made:
            shutil.rmtree(self._sockets, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _accept(self) -> None:
        try:
            channel, _ = self._listener.accept()
        except OSError:
            if self._stopping.is_set():
                return
            raise
        threading.Thread(target=self.take_stream, args=(channel,), daemon=True).start()

    def take_stream(self, channel: socket.socket, peer: Peer = NOBODY) -> None:
        """Hand a connection to the migration that it names: for memory, a tree, or late pages.

        It has to be the peer's.

        Returns once it is handed over, or has ended; never raises.
        """
        try:
            deadline = time.monotonic() + _PREAMBLE_S
            name = b""
            while len(name) < ID_BYTES:
                channel.settimeout(max(0.001, deadline - time.monotonic()))
                data = channel.recv(ID_BYTES - len(name))
                if not data:
                    raise DestinationError("the memory channel closed before it named a migration")
                name += data
            channel.settimeout(None)
            words = name.decode("ascii", "replace").split()
            migration = self.service.find(words.pop(0) if words else "", peer)
            if words[-1:] == [ZSTD]:
                words.pop()
                try:
                    channel = restored(channel)
                except Refused as error:
                    migration.memory.refuse(error)
                    raise
            tree = " ".join(words)
            if tree == PAGES:
                migration.serve_pages(channel)
            elif tree:
                migration.serve_tree(tree, channel)
            else:
                migration.memory.connect(channel)
        except (OSError, PhaulError) as error:
            log.warning("memory channel refused: %s", error)
            channel.close()
        except Exception:
            log.exception("memory channel failed")
            channel.close()
