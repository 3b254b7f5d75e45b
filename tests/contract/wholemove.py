"""A whole migration of the fake engine: both hosts' code and the agent's sockets, without CRIU.

What CRIU and the two kernels would say is left out: the facts of the hosts, and the page server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from phaul_runtime.agent import calls as agent_module
from phaul_runtime.agent.server import Agent
from phaul_runtime.cli import migrate_cmd
from phaul_runtime.config.model import Config
from phaul_runtime.destination import incoming as incoming_module
from phaul_runtime.engine import DestinationHalf, Inspection, SourceHalf
from phaul_runtime.errors import DestinationError, PhaulError
from phaul_runtime.events import Event
from phaul_runtime.hooks.lifecycle import Hooks
from phaul_runtime.memory.image_dirs import ImageDirs
from phaul_runtime.preflight.wiring import Wiring
from phaul_runtime.report import MigrationReport
from phaul_runtime.rpc import phaul_pb2 as pb
from phaul_runtime.source import preflight
from phaul_runtime.source.migration import Migration
from phaul_runtime.testing import FakeCase, FakeEngine, Place
from phaul_runtime.testing.bench import NoCriu
from phaul_runtime.testing.fake import MADE, FakeDestination, FakeSource
from phaul_runtime.transport import Transport
from phaul_runtime.transport.agent_process import AgentProcess

_FACTS = pb.HostFacts(hostname="here", boot_id="one", page_format=1)


class _There(FakeDestination):
    """Takes the victim without the tree that goes first, which needs rsync."""

    def prepare(self, manifest: Mapping[str, Any], migration_id: str) -> None:
        super().prepare(manifest, migration_id)
        assert self.directory is not None
        made = f'{{"id": "{migration_id}", "image": "image"}}'
        (self.directory / MADE).write_text(made)


class _Here(FakeSource):
    def __init__(self, move: WholeMove) -> None:
        super().__init__(move.target)
        self.move = move

    def inspect(self) -> Inspection:
        found = super().inspect()
        manifest = self.move.case.there(found.manifest)
        return Inspection(found.pid, found.memory, manifest=manifest, findings=found.findings)


class _Engine(FakeEngine):
    def __init__(self, move: WholeMove) -> None:
        self.move = move

    def source(self, target: str, options: Any, *, criu_log_level: int) -> SourceHalf:
        return _Here(self.move)

    def destination(self, options: Any, *, criu_log_level: int, hold_s: float) -> DestinationHalf:
        return _There(hold_s)


class _PageServer:
    """Of which nothing is asked: the fake's memory is one image of the final dump."""

    failure = None
    received = 0

    def __init__(self, config: Any, criu: object, **_: object) -> None:
        self._dirs = ImageDirs(config.wdir)

    @property
    def last_images_dir(self) -> str | None:
        return str(self._dirs.last) if self._dirs.last else None

    def start_iter(self) -> None:
        import os

        os.close(self._dirs.open_next())

    def stop_iter(self) -> None:
        pass

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Channel(AgentProcess):
    """The sockets of an agent in this process."""

    def __init__(self, agent: Agent, sockets: Path) -> None:
        super().__init__("there", ["true"], sockets, owned=False, by_hand="")
        self.agent = agent

    def close(self) -> None:
        for migration in self.agent.service.all():
            migration.wait_settled()
        self.agent.stop()


class WholeMove:
    """A victim, two hosts in one process, and what is told of its move.

    Attributes:
        here, there: the hooks of the two hosts, as in the configuration.
        observe: as of `Hooks`, at the destination.
        events: told by the source.
    """

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tmp_path = tmp_path
        self.case = FakeCase(tmp_path / "victims")
        self.target = self.case.start()
        self.here: dict[str, Any] = {}
        self.there: dict[str, Any] = {}
        self.observe: Any = lambda *_: None
        self.events: list[Event] = []
        self.migration: Migration | None = None
        engine = _Engine(self)
        self.wiring = Wiring(
            engine=lambda _: engine,
            transport=lambda _: cast(Transport, self),
            criu=lambda *_, **__: NoCriu(),
            facts=lambda *_: _FACTS,
        )
        # Of the command line, too.
        monkeypatch.setattr(migrate_cmd, "Migration", partial(Migration, wiring=self.wiring))
        monkeypatch.setattr(preflight, "compare_hosts", lambda *_: [])
        monkeypatch.setattr(agent_module, "check_space", lambda *_: _finding())
        monkeypatch.setattr(incoming_module, "PhaulServer", _PageServer)

    def config(self, **more: Any) -> Config:
        return Config.model_validate(
            {
                "engine": "fake",
                "workdir": str(self.tmp_path / "work"),
                "state_dir": str(self.tmp_path / "state-here"),
                "log_dir": str(self.tmp_path / "logs"),
                "restore": "full",
                "transport": {"to": "ssh://root@there"},
                "hooks": {"directory": "/none", **self.here},
                **more,
            }
        )

    def open(self, *_: object) -> _Channel:
        """As a transport does."""
        sockets = self.tmp_path / "sockets"
        hooks = Config.model_validate({"hooks": {"directory": "/none", **self.there}}).hooks.hooks()
        hooks = Hooks(hooks.commands, hooks.timeout_s, None, hooks.timeouts, self.observe)
        state = self.tmp_path / "state-there"
        agent = Agent(
            sockets, self.tmp_path / "there", state, NoCriu(), hooks=hooks, wiring=self.wiring
        )
        agent.start()
        return _Channel(agent, sockets)

    def run(self, **more: Any) -> MigrationReport:
        self.migration = Migration(
            self.config(**more), self.target, self.events.append, wiring=self.wiring
        )
        return self.migration.run()

    def fail(self, **more: Any) -> PhaulError:
        with pytest.raises(PhaulError) as caught:
            self.run(**more)
        return caught.value

    def lives(self, place: Place) -> bool:
        return self.case.alive(place)

    def refuse_to_hold(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def restore(*_: object, **__: object) -> int:
            raise DestinationError("no room")

        monkeypatch.setattr(_There, "restore", restore)

    def names(self) -> Sequence[str]:
        return [event.name for event in self.events]


def _finding() -> Any:
    from phaul_runtime.engine import OK, Finding

    return Finding("space", OK, "it fits")
