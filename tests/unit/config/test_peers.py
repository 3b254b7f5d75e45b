"""Who may send what, and whose a migration is."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from phaul_runtime.config.model import AgentConfig, Config
from phaul_runtime.config.peers import NOBODY, Allowed, Callers, Peer, Rule, certificate_name
from phaul_runtime.engine import Claim
from phaul_runtime.errors import DestinationError, PhaulError, Refused

A, B = Peer("a", "10.0.0.1"), Peer("b", "10.0.0.2")
WEB = Claim("web")
HOOKED = Claim("web", ("/usr/bin/hook",))


def test_a_migration_is_its_certificate_s_and_root_s() -> None:
    A.require("1f", "a")
    NOBODY.require("1f", "a")
    Peer("", "10.0.0.1").require("1f", "a")  # tcp://
    for owner in ("a", ""):
        with pytest.raises(Refused, match="does not belong to the certificate 'b'") as caught:
            B.require("1f", owner)
        assert caught.value.hint.endswith("phaul-runtime recover 1f")


@pytest.mark.parametrize(
    ("rules", "engine", "claim", "said"),
    [
        (None, "docker", None, ""),
        ([], "docker", WEB, "no rule for the certificate 'a'"),
        ([Rule("b")], "docker", WEB, "no rule"),
        ([Rule("a")], "docker", HOOKED, ""),
        ([Rule("*")], "docker", None, ""),
        ([Rule("a.*")], "docker", WEB, "no rule"),
        ([Rule("a", engines=["runc"])], "docker", WEB, "not send engine 'docker'"),
        ([Rule("a", engines=["runc"])], "runc", WEB, ""),
        ([Rule("a", targets=["w*", "db"])], "docker", WEB, ""),
        ([Rule("a", targets=["db"])], "docker", WEB, "not send target 'web'"),
        ([Rule("a", targets=["*"])], "process", Claim(), "a target that has no name here"),
        ([Rule("a", targets=["*"])], "third", None, "a target that has no name here"),
        ([Rule("a", hooks=False)], "runc", WEB, ""),
        ([Rule("a", hooks=False)], "runc", HOOKED, "hooks of its own ('/usr/bin/hook')"),
        ([Rule("a", hooks=False)], "third", None, "does not say what programs"),
        ([Rule("a", hooks=False), Rule("a")], "runc", HOOKED, ""),
        ([Rule("a", engines=["runc"]), Rule("*", targets=["db"])], "docker", Claim("db"), ""),
    ],
)
def test_what_a_rule_lets_through(
    rules: list[Rule] | None, engine: str, claim: Claim | None, said: str
) -> None:
    allowed = Allowed(rules)
    allowed.send(NOBODY, engine, lambda: claim)
    if not said:
        allowed.enter(A)
        allowed.send(A, engine, lambda: claim)
        return
    with pytest.raises(Refused) as caught:
        allowed.send(A, engine, lambda: claim)
    assert said in caught.value.message
    assert "agent.allow" in caught.value.hint


@pytest.mark.parametrize("error", [KeyError("name"), TypeError("x"), AttributeError("get")])
def test_a_manifest_that_claims_nonsense(error: Exception) -> None:
    def claim() -> Claim | None:
        raise error

    Allowed().send(A, "runc", claim)
    with pytest.raises(DestinationError, match="malformed manifest"):
        Allowed([Rule("a")]).send(A, "runc", claim)


def test_rules_come_from_the_configuration() -> None:
    assert AgentConfig().allowed() == Allowed()
    found = AgentConfig.model_validate(
        {"allow": [{"name": "a", "targets": ["web"]}, {"name": "*.lan", "hooks": False}]}
    )
    assert found.allowed().rules == [
        Rule("a", targets=["web"]),
        Rule("*.lan", hooks=False),
    ]
    wrong: Any
    for wrong in ([{}], [{"name": "a", "target": ["web"]}], "a"):
        with pytest.raises(ValueError, match="allow"):
            Config.model_validate({"agent": {"allow": wrong}})


def shown(common: list[str], dns: list[str]) -> dict[str, Any]:
    """As `ssl` describes it."""
    return {
        "subject": ((("countryName", "DE"),), *((("commonName", name),) for name in common)),
        "subjectAltName": (("IP Address", "10.0.0.1"), *(("DNS", name) for name in dns)),
    }


def test_the_name_of_a_certificate() -> None:
    assert certificate_name(shown(["a"], ["b"])) == "a"
    assert certificate_name(shown([], ["b", "c"])) == "b"
    assert certificate_name(shown(["a\nforged"], ["b"])) == "b"
    for nameless in (shown([], []), None, {}):
        with pytest.raises(Refused, match="neither a common name nor a DNS name"):
            certificate_name(nameless)


def test_who_is_behind_a_socket(tmp_path: Path) -> None:
    callers = Callers(tmp_path)
    assert callers.of("unix:") is NOBODY
    with socket.socket(socket.AF_UNIX) as inner:
        with callers.known(inner, A):
            name = f"unix:{inner.getsockname().replace(' ', '%20')}"
            assert callers.of(name) is A
            assert not list(tmp_path.iterdir())
            for other in (f"{name}0", "unix:/somewhere/peer-0", "ipv4:127.0.0.1:1", ""):
                with pytest.raises(PhaulError):
                    callers.of(other)
        # A call that outlives its connection is nobody's, and not root's.
        with pytest.raises(Refused, match="has ended"):
            callers.of(name)
