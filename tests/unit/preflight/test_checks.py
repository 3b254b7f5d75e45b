"""Two hosts held against each other: which pairs of CRIU are refused, and by what name."""

from __future__ import annotations

import pytest

from phaul_runtime.criu.session import CriuVersion
from phaul_runtime.engine import OK, REFUSED, Finding
from phaul_runtime.preflight.checks import check_lazy, compare_hosts
from phaul_runtime.rpc import phaul_pb2 as pb


def host(*version: int) -> pb.HostFacts:
    criu = CriuVersion(*version)
    return pb.HostFacts(criu_version=str(criu), page_format=criu.page_format or 0, lazy_pages=True)


def found(source: pb.HostFacts, destination: pb.HostFacts, page_server: str) -> Finding:
    findings = compare_hosts(source, destination, ("here", "there"), page_server)
    (finding,) = (f.finding for f in findings if f.finding.check == "criu-version")
    return finding


@pytest.mark.parametrize("page_server", ["phaul", "criu"])
@pytest.mark.parametrize(
    ("source", "destination", "by"),
    [
        ((4, 1, 1), (4, 1, 1), ["phaul", "criu"]),
        ((4, 2), (4, 2, 1), ["phaul", "criu"]),
        ((4, 1, 1), (4, 2, 1), ["phaul"]),
        ((4, 2, 1), (4, 1, 1), ["phaul"]),
        # Equal ones understand each other; nobody else looks into what they send.
        ((4, 3), (4, 3), ["criu"]),
        ((4, 3), (4, 3, 1), []),
        ((4, 2, 1), (4, 3), []),
        ((4, 3), (4, 2, 1), []),
        ((4, 0), (4, 1, 1), []),
    ],
)
def test_which_criu_takes_pages_of_which(
    source: tuple[int, ...], destination: tuple[int, ...], by: list[str], page_server: str
) -> None:
    finding = found(host(*source), host(*destination), page_server)
    assert finding.level == (OK if page_server in by else REFUSED)
    both = f"CRIU {CriuVersion(*destination)}, here {CriuVersion(*source)}"
    assert finding.text.startswith(both)
    assert bool(finding.hint) == (finding.level == REFUSED)


def test_the_refusal_names_what_it_is_about() -> None:
    assert "criu.page_server: criu" in found(host(4, 1, 1), host(4, 2, 1), "criu").text
    for pair in ((host(4, 3), host(4, 2)), (host(4, 2), host(4, 3))):
        assert "the page format of CRIU 4.3 is not known" in found(*pair, "phaul").text


def test_page_maps_that_are_not_known_cannot_be_restored_lazily() -> None:
    assert check_lazy(host(4, 2)).level == OK
    finding = check_lazy(host(4, 3))
    assert finding.level == REFUSED
    assert "the page format of CRIU 4.3 is not known" in finding.text
    assert "--restore full" in finding.hint
