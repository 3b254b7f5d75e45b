"""The source's side of a post-copy move: its pages, over one page channel after the other.

It begins before the destination restores, since CRIU's restorer may touch pages that are still
here (a thread's rseq area, say): then only what is asked for is sent. Once the copy runs the rest
follows. A channel that breaks is opened anew, by a new agent if the old one is gone; only when the
destination has the last page is the held tree ended.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from phaul_runtime.cutover.freezer import Freezer
from phaul_runtime.cutover.journal import Journal
from phaul_runtime.cutover.progress import forget_progress, write_progress
from phaul_runtime.cutover.states import Role, State, Verdict
from phaul_runtime.engine.interface import SourceHalf
from phaul_runtime.errors import (
    ChannelError,
    DestinationError,
    DestinationUnreachable,
    MigrationFailed,
    OutcomeUnknown,
    PhaulError,
    StillUnderWay,
)
from phaul_runtime.events import Listener, Reconnecting, Serving, SourceDead, guarded
from phaul_runtime.postcopy.pages import RemotePages
from phaul_runtime.postcopy.sender import PageSender
from phaul_runtime.rpc.client import RemoteAgent
from phaul_runtime.rpc.connect import Transports, reach
from phaul_runtime.system.cancel import Cancellation
from phaul_runtime.transport.base import load_transport

if TYPE_CHECKING:
    from phaul_runtime.config.model import Config

log = logging.getLogger(__name__)

_EARLY_AGAIN_S = 0.2
_AGAIN_S = 1.0
_DEAD_WITHIN_S = 60.0
_STOP_S = 60.0
_POLL_S = 0.02
# Longer than an agent waits for its client: until then its journal is not free.
_MARGIN_S = 15.0


class Transfer:
    """The pages of one tree that stands still here, and the copy that needs them.

    Args:
        config: as loaded.
        journal: the source's.
        hold: what holds the tree, or is about to.
        images_dir: of the final dump.
        listener: told how far it is.
        cancellation: ends the waits for a new channel.
        transports: find one by a destination.

    Attributes:
        total: pages that no image has.
        bytes_sent: pages and their heads, over all channels.
        seconds: from the moment when the copy ran to its last page.
    """

    def __init__(
        self,
        config: Config,
        journal: Journal,
        hold: Freezer,
        images_dir: Path,
        *,
        listener: Listener,
        cancellation: Cancellation,
        transports: Transports = load_transport,
    ) -> None:
        self._transports = transports
        self._hold = hold
        self._config = config
        self._journal = journal
        self._images_dir = images_dir
        self._listener = guarded(listener)
        self._cancellation = cancellation
        self._url = config.transport.to or str(journal.facts["to"])
        self._agents = ExitStack()
        self._agent: RemoteAgent | None = None
        self._thread: threading.Thread | None = None
        self._error: PhaulError | None = None
        self._runs = threading.Event()
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._channel: socket.socket | None = None
        self._moved_at = 0.0
        self._whole = self._over = False
        self.total = 0
        self.bytes_sent = 0
        self.seconds = 0.0

    def __enter__(self) -> Transfer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def begin(self, agent: RemoteAgent) -> None:
        """Before the restore: serve what is asked for, from a thread, until `stop`.

        Args:
            agent: of the destination; its owner closes it after this object.
        """
        self._agent = agent
        self._thread = threading.Thread(target=self._work, name="pages", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Before the source is given up: its pages can be served.

        Raises:
            PhaulError: why they cannot.
        """
        if self._error is not None:
            raise self._error

    def run(self) -> RemoteAgent:
        """The copy runs: serve until the destination has all; returns the agent that answers now.

        Raises:
            OutcomeUnknown: for `timeouts.recover_s` no page could be brought over, or this host
                has lost them.
        """
        begun = self._moved_at = time.monotonic()
        self._runs.set()
        if self._thread is not None:
            self._thread.join()
        self.seconds = time.monotonic() - begun
        if isinstance(self._error, OutcomeUnknown):
            raise self._error
        if self._error is not None:
            raise OutcomeUnknown(
                f"pages of the destination's copy are lost here: {self._error.message}",
                hint="the destination's copy can never be whole: end it there",
            ) from self._error
        if self._agent is None or not self._over:
            raise OutcomeUnknown(
                "the transfer of pages was stopped, and the destination has not said that it has "
                "them all",
                hint=f"phaul-runtime recover {self._journal.id} on this host goes on",
            )
        return self._agent

    def stop(self) -> None:
        """Serve no more; idempotent."""
        self._stopped.set()
        with self._lock:
            if self._channel is not None:
                with contextlib.suppress(OSError):
                    self._channel.shutdown(socket.SHUT_RDWR)
        if self._thread is not None:
            self._thread.join(_STOP_S)
        self._agents.close()

    def conclude(self, half: SourceHalf) -> list[str]:
        """The destination has all: end the held tree, and what is left of it; returns warnings."""
        half.end_rest()
        self._hold.thaw_dying()
        deadline = time.monotonic() + _DEAD_WITHIN_S
        while self._hold.exists() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        self._listener(SourceDead())
        forget_progress(Path(self._config.state_dir), self._journal.id, Role.SOURCE)
        self._hold.remove()
        warnings = list(half.finish())
        if self._hold.exists():
            warnings.append(f"what was held in {self._hold.group} was killed and has not ended")
        try:
            self._journal.enter(State.DONE)
        except MigrationFailed as error:
            warnings.append(error.message)
        return warnings

    # -- in the thread: one channel after the other ----------------------------------------

    def _work(self) -> None:
        try:
            pages = RemotePages.of(self._images_dir)
            self.total = pages.total
            if not pages.total:
                self._over = True
                return
            source = PageSender(pages, self._hold.by_image)
            try:
                self._serve_all(source)
            finally:
                self.bytes_sent = source.bytes_sent
                source.close()
        except PhaulError as error:
            self._error = error
        except Exception as error:
            log.exception("the transfer of pages failed")
            self._error = MigrationFailed(f"{type(error).__name__}: {error}")

    def _serve_all(self, source: PageSender) -> None:
        while not self._stopped.is_set():
            try:
                if self._agent is None:
                    self._agent = self._reopened()
                if not self._whole:
                    self._serve(source, self._agent)
                # The destination has said so: on the channel of pages, or its agent.
                self._over = True
                return
            except (ChannelError, DestinationError, DestinationUnreachable, StillUnderWay) as error:
                self._after(error)

    def _serve(self, source: PageSender, agent: RemoteAgent) -> None:
        channel = agent.open_pages()
        with self._lock:
            if self._stopped.is_set():
                channel.close()
                raise ChannelError("the transfer of pages was stopped")
            self._channel = channel
        try:
            source.serve(
                channel,
                self._tell,
                silent_s=self._config.timeouts.lost_s,
                stream=self._runs.is_set,
            )
        finally:
            with self._lock:
                self._channel = None
            channel.close()

    def _tell(self, missing: int) -> None:
        self._moved_at = time.monotonic()
        if not self._runs.is_set():
            return
        self._listener(Serving(self.total, missing))
        write_progress(
            Path(self._config.state_dir),
            self._journal.id,
            Role.SOURCE,
            pages=self.total,
            missing=missing,
        )

    def _after(self, error: PhaulError) -> None:
        """What to go on with after a channel broke: the same agent, if it answers."""
        if not self._runs.is_set():
            # The migration may have failed, or the agent not know of it yet: others find out.
            self._runs.wait(_EARLY_AGAIN_S)
            return
        if time.monotonic() - self._moved_at > self._config.timeouts.recover_s:
            raise OutcomeUnknown(
                f"the destination's copy runs and waits for pages that are here: {error.message}",
                host=error.host,
                log=error.log,
                hint=f"phaul-runtime recover {self._journal.id} on this host goes on",
            ) from error
        self._listener(Reconnecting(error.message))
        self._stopped.wait(_AGAIN_S)
        agent = self._agent
        if agent is None or not agent.answers():
            self._agent = None
            return
        # Its last word may be what was lost.
        with contextlib.suppress(PhaulError):
            self._whole = agent.filled().over

    def _reopened(self) -> RemoteAgent:
        self._agents.close()
        return self._agents.enter_context(self._reached())

    @contextmanager
    def _reached(self) -> Iterator[RemoteAgent]:
        with reach(self._config, self._url, self._cancellation, self._transports) as agent:
            wait_s = self._config.timeouts.lost_s + _MARGIN_S
            agent.look(self._journal.id, wait_s)
            settled = agent.settle(self._journal.id, Role.DESTINATION, Verdict.RUN)
            self._whole = not settled.missing
            attend(agent, self._journal.id, self._config)
            yield agent


def attend(agent: RemoteAgent, migration_id: str, config: Config) -> None:
    """Be the client of an agent that has taken up a migration."""
    agent.take_up(migration_id)
    timeouts = config.timeouts
    agent.beat_every(timeouts.heartbeat_s, timeouts.lost_s, lambda _: None)


__all__ = ["Transfer", "attend"]
