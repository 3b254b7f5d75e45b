"""Two hosts in this process: the real commands, agents and journals, over a `World`.

Real are `Migration`, `CutOver`, `Session`, `RemoteAgent`, `AgentService`, `Incoming`, `Settler`,
`Recovery`, and the journals on a disk. Stand-ins are what they stand on: the engine, CRIU, the
page server, the cgroup of a post-copy move and its pages, gRPC's transport, the clock.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from phaul_runtime.agent import calls as agent_module
from phaul_runtime.agent.calls import AgentService
from phaul_runtime.config.model import Config
from phaul_runtime.cutover import cutover, journal, journal_file, journal_format
from phaul_runtime.cutover.journal import Journal, journal_path, read_records, replay
from phaul_runtime.cutover.states import Role
from phaul_runtime.destination import copy, incoming
from phaul_runtime.destination.incoming import Incoming
from phaul_runtime.destination.lazy_restore import Filled
from phaul_runtime.errors import DestinationError, MigrationFailed, PhaulError
from phaul_runtime.hooks.lifecycle import Hooks
from phaul_runtime.memory import image_dirs
from phaul_runtime.postcopy.transfer import Transfer
from phaul_runtime.preflight.wiring import Wiring
from phaul_runtime.recovery import recover, resolve
from phaul_runtime.recovery.recover import Recovery
from phaul_runtime.rpc import client as remote_module
from phaul_runtime.rpc import phaul_pb2 as pb
from phaul_runtime.rpc import phaul_pb2_grpc
from phaul_runtime.rpc.protocol import PROTOCOL
from phaul_runtime.source import migration, outcome, preflight
from phaul_runtime.source.migration import Migration
from phaul_runtime.testing.bench import NoCriu
from phaul_runtime.transport import Transport
from tests.contract.wholemove import _PageServer
from tests.explorer.world import (
    DISK,
    LOST,
    NO_REPLY,
    TWICE,
    Crash,
    ModelEngine,
    ModelHold,
    Process,
    World,
    close_in,
)

ID = "ab" * 8
# Calls whose loss, repetition or missing answer may change what becomes of a move.
_RISKY = ("Open", "Prepare", "Commit", "Abort", "Look", "Settle")


class NoAnswer(grpc.RpcError):
    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "the connection is gone"


class _Context:
    def invocation_metadata(self) -> Any:
        return (("phaul-protocol", str(PROTOCOL)),)

    def peer(self) -> str:
        return "unix:"

    def time_remaining(self) -> float:
        return 60.0

    def is_active(self) -> bool:
        return True


class Hosts:
    """Two hosts, from the beginning of one move of one victim."""

    def __init__(self, root: Path, mode: str, patch: pytest.MonkeyPatch) -> None:
        self.root, self.mode = root, mode
        self.world = World()
        self.agents: list[_Agent] = []
        # Ends whose disk refuses everything, until the command is over.
        self.full: set[Role] = set()
        self._patch(patch)

    # -- what the commands stand on --------------------------------------------------------

    def _patch(self, patch: pytest.MonkeyPatch) -> None:
        world, engine = self.world, ModelEngine(self.world)
        for module in (migration, outcome, incoming, agent_module, cutover, journal, remote_module):
            patch.setattr(module, "time", world)
        facts = pb.HostFacts(hostname="here", boot_id="one", page_format=1)
        self.wiring = Wiring(
            engine=lambda _: engine,
            transport=lambda _: cast(Transport, self),
            criu=lambda *_, **__: NoCriu(),
            facts=lambda *_: facts,
        )
        patch.setattr(preflight, "compare_hosts", lambda *_: [])
        patch.setattr(preflight, "check_lazy", lambda *_: _fine())
        patch.setattr(preflight, "check_hold", lambda *_: _fine())
        patch.setattr(migration, "await_filled", lambda *_: None)
        patch.setattr(migration, "Transfer", self._transfer)
        for module in (outcome, recover, resolve, cutover):
            patch.setattr(module, "Freezer", self._holds())
        patch.setattr(recover, "Transfer", self._transfer)
        patch.setattr(recover, "attend", lambda agent, migration_id, _: agent.take_up(migration_id))
        patch.setattr(agent_module, "check_space", lambda *_: _fine())
        # Nothing is mounted here, and no journal needs the room that a long move's does.
        patch.setattr(image_dirs, "mounts_below", lambda _: [])
        for module in (journal, journal_file, journal_format):
            patch.setattr(module, "STEP", 4096)
        patch.setattr(incoming, "PhaulServer", _Pages)
        patch.setattr(copy, "LazyRestore", self._lazy)
        patch.setattr(incoming, "Preallocation", _NoRoom)
        patch.setattr(Incoming, "_settle_soon", _settle_later)
        patch.setattr(Incoming, "wait_settled", lambda self, *_: _settle_now(self))
        self._owners: dict[int, Process] = {}
        opened = os.open

        def watched(*args: Any, **named: Any) -> int:
            fd = opened(*args, **named)
            self._owners[fd] = world.process
            return fd

        patch.setattr(os, "open", watched)
        patch.setattr(phaul_pb2_grpc, "AgentStub", lambda channel: channel)
        patch.setattr(grpc, "insecure_channel", self._dialled)
        patch.setattr(remote_module.RemoteAgent, "beat_every", lambda *_: None)
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, lambda _fd: None)
        for name in ("enter", "pass_through", "note", "add"):
            patch.setattr(Journal, name, self._watched(getattr(Journal, name)))
        patch.setattr(Journal, "close", self._closing(Journal.close))
        announce = Hooks.try_to

        def told(hooks: Hooks, event: str, move: Any, *args: Any, **named: Any) -> list[str]:
            world.point(f"tells {event}")
            if event == "committed":
                world.announced.add(move.role.value)
            return announce(hooks, event, move, *args, **named)

        patch.setattr(Hooks, "try_to", told)

    def _watched(self, real: Callable[..., None]) -> Callable[..., None]:
        world, full = self.world, self.full

        def write(journal: Journal, *args: Any, **facts: Any) -> None:
            what = " ".join(str(getattr(arg, "value", arg)) for arg in args) or " ".join(facts)
            if world.point(f"{journal.role.value}'s journal: {what}", DISK):
                full.add(journal.role)
            if journal.role in full:
                raise MigrationFailed("cannot write: Input/output error")
            real(journal, *args, **facts)
            world.point(f"{journal.role.value}'s journal has: {what}")

        return write

    def _closing(self, real: Callable[[Journal], None]) -> Callable[[Journal], None]:
        def close(journal: Journal) -> None:
            if self.world.process.alive:
                real(journal)

        return close

    def _holds(self) -> Any:
        world = self.world
        return types.SimpleNamespace(
            plan=lambda *_: ModelHold(world),
            recall=lambda facts: ModelHold(world) if facts else None,
        )

    def _lazy(self, mode: str, *_: object, **__: object) -> Any:
        return _Lazy(self.world, mode)

    def _transfer(self, *args: Any, **named: Any) -> Transfer:
        return _Transfer(self, *args, **named)

    # -- the network -----------------------------------------------------------------------

    def open(self, destination: Any, *_: object) -> _Channel:
        """As a transport does."""
        if self.world.point("opens a channel", LOST):
            from phaul_runtime.errors import DestinationUnreachable

            raise DestinationUnreachable("no route to host")
        agent = _Agent(self, "here" if destination.host == "here" else "there")
        self.agents.append(agent)
        return _Channel(self, agent)

    def _dialled(self, target: str, **_: object) -> Any:
        return _Stub(self, self.agents[int(target)])

    def orphans_notice(self) -> None:
        """Agents whose client is gone find that out."""
        for agent in list(self.agents):
            if agent.orphan:
                agent.end()

    # -- commands --------------------------------------------------------------------------

    def config(self, side: str = "here", to: str = "there") -> Config:
        below = self.root / side
        places = {
            "workdir": str(below / "work"),
            "state_dir": str(below / "state"),
            "log_dir": str(below / "logs"),
        }
        return _config(self.mode, to).model_copy(update=places)

    def run(self, command: str, fault: tuple[int, str] | None = None) -> str:
        """One command to its end, or to its death; returns what came of it."""
        world = self.world
        world.fault, world.points = fault, []
        self.full.clear()
        process = Process(command)
        world.on_sleep = [self.orphans_notice]
        try:
            with world.running(process):
                return self._run(command)
        except Crash:
            return "killed"
        except PhaulError as error:
            return f"{type(error).__name__}: {error.message}"
        finally:
            if not process.alive:
                self.closed(process)
            for agent in self.agents:
                agent.orphan = True
            world.fault = None
            world.check()

    def closed(self, process: Process) -> None:
        """What the kernel does when a process dies: its descriptors close, their locks go."""
        close_in(self.root, {fd for fd, owner in self._owners.items() if owner is process})

    def _run(self, command: str) -> str:
        if command == "migrate":
            move = Migration(self.config(), "victim", id=ID, wiring=self.wiring)
            return move.run().result
        if command == "the lost are noticed":
            self.orphans_notice()
            return "noticed"
        side, other = ("here", "there") if command == "recover here" else ("there", "here")
        return Recovery(self.config(side, other), wiring=self.wiring).recover(ID).verdict.value

    # -- what came of it -------------------------------------------------------------------

    def standing(self, role: Role) -> tuple[object, ...]:
        state_dir = self.root / ("here" if role is Role.SOURCE else "there") / "state"
        if not journal_path(state_dir, ID, role).exists():
            return ()
        state, facts = replay(read_records(state_dir, ID, role))
        told = tuple(name for name in ("runs", "announced", "hold") if facts.get(name))
        images = Path(str(facts.get("images_dir", "/none")))
        return (state and state.value, *told, images.is_dir(), (images / "stats-restore").exists())

    def signature(self) -> tuple[object, ...]:
        """Where all stands between two commands: the same again needs no second look."""
        world = self.world
        agents = tuple(sorted(agent.signature() for agent in self.agents if agent.process.alive))
        return (
            *world.members.values(), world.frozen, world.copy, world.whole,
            self.standing(Role.SOURCE), self.standing(Role.DESTINATION), agents,
        )  # fmt: skip

    def settled(self) -> bool:
        """Each end that was begun is over."""
        ends = [self.standing(role) for role in Role]
        return all(not end or end[0] in (None, "done", "aborted") for end in ends)


@functools.cache
def _config(mode: str, to: str) -> Config:
    """All but the places; loaded once, since thousands of commands have the same."""
    return Config.model_validate(
        {
            "engine": "model",
            "mode": mode,
            "restore": "full" if mode == "pre-copy" else "auto",
            "criu": {"page_server": "criu"},
            "transport": {"to": f"ssh://root@{to}"},
            "hooks": {"directory": "/none"},
            "timeouts": {"lost_s": 3, "heartbeat_s": 1, "commit_s": 5, "call_s": 2},
        }
    )


class _Agent:
    """An agent of one side, for one channel."""

    def __init__(self, hosts: Hosts, side: str) -> None:
        self.hosts = hosts
        self.side = side
        self.process = Process(f"agent {side}")
        self.orphan = False
        root = hosts.root / side
        (root / "work").mkdir(parents=True, exist_ok=True)
        self.service = AgentService(
            root / "work", root / "state", NoCriu(), Hooks(), wiring=hosts.wiring
        )

    def call(self, name: str, request: Any) -> Any:
        """One call, as the agent's process."""
        world = self.hosts.world
        try:
            with world.running(self.process):
                return getattr(self.service, name)(request, _Context())
        except Crash:
            self._died()
            raise NoAnswer from None

    def _died(self) -> None:
        if self.process.alive:
            raise AssertionError("it lives")
        self.hosts.closed(self.process)
        self.hosts.agents.remove(self)

    def work(self) -> None:
        """What its threads do beside calls."""
        try:
            with self.hosts.world.running(self.process):
                for migration in self.service.all():
                    _settle_now(migration)
        except Crash:
            self._died()

    def end(self) -> None:
        """Its client is gone, or says that it is done: settle what runs, then go."""
        world = self.hosts.world
        try:
            with world.running(self.process):
                for migration in self.service.close():
                    migration.abort(client_lost=True)
                    _settle_now(migration)
            self.process.alive = False
            self.process.at_death.clear()
            self.hosts.agents.remove(self)
        except Crash:
            self._died()

    def signature(self) -> tuple[object, ...]:
        found = [
            (m.state.value, m.copy.life.value, m.given_up, getattr(m, "_due", False))
            for m in self.service.all()
        ]
        return (self.side, *found)


def _settle_later(self: Incoming) -> None:
    self._due = True  # type: ignore[attr-defined]
    self._settler = threading.Thread()


def _settle_now(migration: Incoming) -> None:
    """The thread that works after the commit."""
    store = migration.copy.lazy.store
    whole = migration.state.value != "post-copy" or store is None or store.complete
    if getattr(migration, "_due", False) and whole and not migration.given_up:
        migration._due = False  # type: ignore[attr-defined]
        migration._settle()


class _Channel:
    """To an agent; the agent ends with it."""

    certificate = ""

    def __init__(self, hosts: Hosts, agent: _Agent) -> None:
        self.hosts, self.agent = hosts, agent
        self.name = agent.side

    def control_target(self) -> str:
        return str(self.hosts.agents.index(self.agent))

    def trouble(self) -> str:
        return ""

    def open_memory(self, migration_id: str) -> socket.socket:
        ours, theirs = socket.socketpair()
        self.agent.service.find(migration_id).memory.connect(theirs)
        return ours

    def close(self) -> None:
        if self.agent in self.hosts.agents and self.hosts.world.process.alive:
            self.agent.end()


class _Stub:
    """Calls the handlers of an agent, as gRPC would; a message may be lost."""

    def __init__(self, hosts: Hosts, agent: _Agent) -> None:
        self.hosts, self.agent = hosts, agent

    def close(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        def future(request: Any, **_: object) -> Any:
            return types.SimpleNamespace(
                result=lambda: self._call(name, request), cancel=lambda: None
            )

        return types.SimpleNamespace(future=future)

    def _call(self, name: str, request: Any) -> Any:
        risks = (LOST, NO_REPLY, TWICE) if name in _RISKY else ()
        what = self.hosts.world.point(f"asks for {name}", *risks)
        if self.agent not in self.hosts.agents or what == LOST:
            raise NoAnswer
        if what == TWICE:
            with contextlib.suppress(NoAnswer):
                self.agent.call(name, request)
        reply = self.agent.call(name, request)
        self.hosts.world.point(f"hears of {name}")
        if what == NO_REPLY:
            raise NoAnswer
        return reply


class _Pages(_PageServer):
    def start_local(self) -> dict[str, bytes]:
        self.start_iter()
        return {}


class _NoRoom:
    """As `Preallocation`, whose thread would open a file in the name of whoever runs just then."""

    def __init__(self, *_: object) -> None: ...
    def begin(self) -> None: ...
    def drop(self) -> None: ...


class _Store:
    """As `PageStore`."""

    def __init__(self, world: World) -> None:
        self._world = world

    @property
    def complete(self) -> bool:
        return self._world.whole

    @property
    def missing_pages(self) -> int:
        return 0 if self.complete else 9

    def close(self) -> None: ...


class _Lazy:
    """As `LazyRestore`: pages that are at the source, in a post-copy move."""

    def __init__(self, world: World, mode: str) -> None:
        self.world = world
        self.why_not = "" if mode == "lazy" else "restore: full"
        self.store: Any = None
        if mode == "lazy":
            self.store = _Store(world)

    def begin(self) -> None: ...
    def add(self, *_: object) -> None: ...
    def await_started(self) -> None: ...
    def follow(self, *_: object) -> None: ...

    def plan(self, _images_dir: Path) -> bool:
        return not self.why_not

    def handed(self, _root: int) -> bool:
        return True

    def stop(self, *_: object) -> None: ...

    def cut(self) -> None: ...

    def lost(self) -> bool:
        return False

    def resume(self) -> None:
        if self.world.copy != "runs":
            raise DestinationError("there is no pager")

    def filled(self) -> Filled:
        return Filled(self.world.whole, 9, 0 if self.world.whole else 9, 0, 0.0, 0.0)

    def watch(self, tell: Callable[[Filled], object]) -> None:
        tell(self.filled())


class _Transfer(Transfer):
    """The pages come in one step, or do not."""

    def __init__(self, hosts: Hosts, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._hosts = hosts

    def begin(self, agent: Any) -> None:
        self._agent = agent

    def run(self) -> Any:
        world = self._hosts.world
        if world.point("sends pages", LOST):
            from phaul_runtime.errors import OutcomeUnknown

            raise OutcomeUnknown("the channel of pages broke")
        if not world.source_lives:
            raise AssertionError("the memory is gone")
        world.whole = True
        for agent in list(self._hosts.agents):
            agent.work()
        world.point("has sent all pages")
        return self._agent

    def stop(self) -> None: ...


def _fine() -> Any:
    from phaul_runtime.engine import OK, Finding

    return Finding("fine", OK, "it is")


@contextlib.contextmanager
def hosts(root: Path, mode: str) -> Iterator[Hosts]:
    """Two fresh hosts, for as long as the block lasts."""
    with pytest.MonkeyPatch.context() as patch:
        yield Hosts(root, mode, patch)
    close_in(root)
