"""Who speaks to an agent, which migrations are theirs, and what they may send.

A connection through the port of a service (`transport.listener`) has shown a certificate, and what
it opens belongs to that certificate's name: the journals of both hosts say so (OWNER), and a
recovery by another certificate is refused. A client that reaches the agent's own sockets needs no
name: that is root of this host, at its terminal or by ssh. So is every client of a `tcp://` port.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phaul_runtime.errors import DestinationError, Refused

if TYPE_CHECKING:
    from phaul_runtime.engine.interface import Claim

# A fact of both ends' journals: the certificate of the other host; empty where there was none.
OWNER = "owner"
_UNNAMED = "unix:"
_SOCKET = "peer-"


@dataclass(frozen=True)
class Peer:
    """Somebody at the other end of a connection.

    Attributes:
        certificate: the name of the certificate that was shown; empty for a client that needs none.
        address: where a connection came from; empty if it is of this host.
    """

    certificate: str = ""
    address: str = ""

    def __str__(self) -> str:
        if self.certificate:
            return f"{self.certificate} ({self.address})"
        return self.address or "this host"

    @property
    def account(self) -> str:
        """What its calls are counted by."""
        return self.certificate or self.address

    def owns(self, owner: str) -> bool:
        """Whether what belongs to the certificate `owner` is this one's to end."""
        return not self.certificate or self.certificate == owner

    def require(self, migration_id: str, owner: str) -> None:
        """Refuse anybody but the owner of a migration.

        Raises:
            Refused: it belongs to another certificate, or to none.
        """
        if not self.owns(owner):
            raise Refused(
                f"migration {migration_id} does not belong to the certificate {self.certificate!r}",
                hint=f"as root of this host, or by ssh: phaul-runtime recover {migration_id}",
            )


NOBODY = Peer()
"""Root of this host."""


def certificate_name(shown: Mapping[str, Any] | None) -> str:
    """The name of a certificate as `ssl` describes it: its common name, else its first DNS name.

    Raises:
        Refused: it has neither.
    """
    told = shown or {}
    common = [value for rdn in told.get("subject", ()) for key, value in rdn if key == "commonName"]
    names = [value for kind, value in told.get("subjectAltName", ()) if kind == "DNS"]
    for name in (*common, *names):
        if isinstance(name, str) and name and name.isprintable():
            return name
    raise Refused(
        "the certificate has neither a common name nor a DNS name",
        hint="phaul-runtime cert init makes certificates with both",
    )


@dataclass(frozen=True)
class Rule:
    """What certificates of a name may send; see `agent.allow` of the configuration.

    Attributes:
        name: a pattern of the certificates' names, as `*.example.org`.
        engines: None for every one.
        targets: patterns of the names that targets have at this host; None for every one.
        hooks: also what brings programs that are run outside of it.
    """

    name: str
    engines: Sequence[str] | None = None
    targets: Sequence[str] | None = None
    hooks: bool = True

    def refusal(self, engine: str, claim: Claim | None) -> str:
        """Why it does not allow that; empty if it does."""
        if self.engines is not None and engine not in self.engines:
            return f"engine {engine[:40]!r}"
        if self.targets is not None and not self._named(claim):
            named = claim is not None and claim.name
            return f"target {named[:80]!r}" if named else "a target that has no name here"
        if not self.hooks and claim is None:
            return f"engine {engine[:40]!r}, which does not say what programs a target brings"
        if not self.hooks and claim and claim.programs:
            return f"a target with hooks of its own ({claim.programs[0][:80]!r})"
        return ""

    def _named(self, claim: Claim | None) -> bool:
        if claim is None or not claim.name:
            return False
        return any(fnmatchcase(claim.name, pattern) for pattern in self.targets or ())


@dataclass(frozen=True)
class Allowed:
    """The rules of this host; None allows every certificate of the CA everything."""

    rules: Sequence[Rule] | None = None

    def enter(self, peer: Peer) -> None:
        """Refuse a certificate that no rule is about.

        Raises:
            Refused: as said.
        """
        self._rules_for(peer)

    def send(self, peer: Peer, engine: str, find: Callable[[], Claim | None]) -> None:
        """Refuse what no rule of the peer's certificate allows.

        Args:
            peer: who wants to send it.
            engine: by which.
            find: what is claimed of this host; not asked where nothing is limited.

        Raises:
            Refused: the message has the first rule's reason.
            DestinationError: the manifest is malformed.
        """
        rules = self._rules_for(peer)
        if rules is None:
            return
        try:
            claim = find()
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise DestinationError("malformed manifest") from error
        reasons = [rule.refusal(engine, claim) for rule in rules]
        if all(reasons):
            raise Refused(
                f"agent.allow lets the certificate {peer.certificate!r} not send {reasons[0]}",
                hint="the administrator of that host can allow it there, in agent.allow",
            )

    def _rules_for(self, peer: Peer) -> Sequence[Rule] | None:
        if self.rules is None or not peer.certificate:
            return None
        found = [rule for rule in self.rules if fnmatchcase(peer.certificate, rule.name)]
        if not found:
            raise Refused(
                f"agent.allow has no rule for the certificate {peer.certificate!r}",
                hint="the administrator of that host can allow it there, in agent.allow",
            )
        return found


class Callers:
    """Who is behind each control connection, as gRPC names it.

    gRPC's own side of a connection is a unix socket of this host. The one that the listener joins
    with a connection is bound to a name before, which gRPC tells with each call and no client can
    choose.

    Args:
        directory: private, where the names are for the moment of binding.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._known: dict[str, Peer] = {}

    @contextlib.contextmanager
    def known(self, inner: socket.socket, peer: Peer) -> Iterator[None]:
        """While in here, calls by the unix socket `inner`, not connected yet, are `peer`'s.

        Raises:
            OSError: it cannot be bound.
        """
        name = f"{_SOCKET}{secrets.token_hex(8)}"
        path = self._directory / name
        self._known[name] = peer
        try:
            inner.bind(str(path))
            # The name stays the socket's; nobody is to connect to it.
            path.unlink()
            yield
        finally:
            del self._known[name]

    def of(self, name: str) -> Peer:
        """Whose call it is, by what gRPC calls its peer.

        Raises:
            Refused: the connection has ended, so it cannot be told.
        """
        if name == _UNNAMED:
            return NOBODY
        peer = self._known.get(name.rpartition("/")[2])
        if peer is None:
            raise Refused("the connection has ended")
        return peer
