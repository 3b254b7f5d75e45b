"""tls://: who is refused and why, and that nothing travels in the clear."""

from __future__ import annotations

import hashlib
import logging
import os
import select
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from phaul_runtime.config.model import AgentConfig, TransportConfig
from phaul_runtime.errors import DestinationUnreachable, Refused
from phaul_runtime.transport.handshake import _HELLO, SPEAKS_TLS, Deadline, cut
from phaul_runtime.transport.mutual_tls import Credentials, as_client, as_server
from tests.integration.fleet import CLIENT_ONLY, SERVER_ONLY, Fleet, tapped
from tests.integration.serving import (
    ID,
    Served,
    agent_behind,
    channel_to,
    exactly,
    gives_up_in_the_middle,
    memory,
    serving,
    wait,
)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    return Fleet(tmp_path_factory.mktemp("certs") / "fleet")


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    return Fleet(tmp_path_factory.mktemp("certs") / "strangers")


@pytest.fixture
def served(root: Path, fleet: Fleet) -> Iterator[Served]:
    with serving(root, fleet.there()) as found:
        yield found


def hello(url: str, root: Path, transport: TransportConfig) -> str:
    with channel_to(url, root, transport) as channel, agent_behind(channel) as remote:
        return remote.hello().hostname


def refusal(url: str, root: Path, transport: TransportConfig) -> str:
    """The one line of why a client does not get in."""
    (root / "work here").mkdir(exist_ok=True)
    with pytest.raises(DestinationUnreachable) as caught:
        hello(url, root, transport)
    assert "\n" not in caught.value.message
    return caught.value.message


# -- who is let in ---------------------------------------------------------------------------


def test_hosts_of_one_ca_reach_each_other(served: Served, root: Path, fleet: Fleet) -> None:
    assert hello(served.url, root, fleet.here()) == socket.gethostname()
    # The name that is verified is the one in the destination.
    assert hello(f"tls://127.0.0.1:{served.port}", root, fleet.here()) == socket.gethostname()


def test_streams_have_both_directions_and_each_ends_by_itself(
    served: Served, root: Path, fleet: Fleet
) -> None:
    with memory(served, served.url, root, fleet.here()) as (ours, theirs):
        page = os.urandom(1 << 20)
        for one, other in ((ours, theirs), (theirs, ours)):
            for size in (1, 7, 4096, 1 << 20):
                thread = threading.Thread(target=one.sendall, args=(page[:size],))
                thread.start()
                assert exactly(other, size) == page[:size]
                thread.join()
        ours.shutdown(socket.SHUT_WR)
        assert theirs.recv(1) == b""
        theirs.sendall(b"acknowledged")
        assert exactly(ours, 12) == b"acknowledged"
        theirs.shutdown(socket.SHUT_WR)
        assert ours.recv(1) == b""


def test_a_stream_that_is_not_read_holds_up_its_writer_only(
    served: Served, root: Path, fleet: Fleet
) -> None:
    with memory(served, served.url, root, fleet.here()) as (ours, theirs):
        ours.setblocking(False)
        sent = 0
        while select.select([], [ours], [], 1)[1]:
            sent += ours.send(bytes(1 << 16))
            assert sent < 1 << 30
        # The other direction goes on.
        theirs.sendall(b"now")
        ours.setblocking(True)
        assert exactly(ours, 3) == b"now"
        got = exactly(theirs, sent)
        assert got.count(0) == sent


def test_an_agent_that_gives_up_ends_a_writer_in_the_middle(
    served: Served, root: Path, fleet: Fleet
) -> None:
    with memory(served, served.url, root, fleet.here()) as (ours, theirs):
        gives_up_in_the_middle(ours, theirs)


def test_a_connection_that_is_cut_is_no_end(served: Served, root: Path, fleet: Fleet) -> None:
    with (
        tapped(served.port) as tap,
        memory(served, f"tls://127.0.0.1:{tap.port}", root, fleet.here()) as (ours, theirs),
    ):
        ours.sendall(b"half a page")
        assert exactly(theirs, 11) == b"half a page"
        tap.cut()
        for end in (ours, theirs):
            # Both ways are over: neither side waits for more, or writes to nobody.
            assert end.recv(1) == b""
            with pytest.raises(OSError, match="pipe"):
                wait(lambda end=end: end.send(b"x") < 0)  # type: ignore[misc]


def test_what_is_cut_by_another_thread_sends_nothing_in_the_clear(fleet: Fleet) -> None:
    # As `close` and `stop` do it, while a pump may be about to write.
    one, other = socket.socketpair()
    deadline = Deadline.within(20)
    theirs = Credentials(**fleet.files("there"))
    thread = threading.Thread(target=lambda: as_server(theirs, other, deadline).detach())
    thread.start()
    secured = as_client(Credentials(**fleet.files("here")), one, "127.0.0.1", deadline)
    thread.join()
    with secured:
        cut(secured)
        assert secured.version() == "TLSv1.3"
        with pytest.raises(OSError, match=r"(?i)pipe|EOF|protocol"):
            secured.send(b"a page")


@pytest.mark.parametrize("clear", [False, True])
def test_nothing_is_in_the_clear(root: Path, fleet: Fleet, clear: bool) -> None:
    # Pages as a process would have them: each may be told from random bytes by its contents.
    pages = [hashlib.sha256(str(n).encode()).hexdigest().encode() * 64 for n in range(64)]
    there, here = fleet.there(), fleet.here()
    if clear:  # what the tap sees if it can see
        there = AgentConfig(listen="tcp://127.0.0.1:0", insecure=True)
        here = TransportConfig(insecure=True)
    with serving(root, there) as served, tapped(served.port) as tap:
        url = served.url.replace(str(served.port), str(tap.port))
        with memory(served, url, root, here) as (ours, theirs):
            thread = threading.Thread(target=ours.sendall, args=(b"".join(pages),))
            thread.start()
            assert exactly(theirs, 64 * 4096) == b"".join(pages)
            thread.join()
        seen = bytes(tap.seen)
    assert len(seen) > 64 * 4096
    # Neither a page nor a part of one, nor what the channels are for, nor the migration's id.
    told = [page[:16] in seen for page in pages]
    words = [word in seen for word in (b"phaul-runtime 1 stream", b"control", ID.encode())]
    assert told == [clear] * 64
    assert words == [clear] * 3


# -- who is refused by the agent -------------------------------------------------------------


def test_clients_without_the_right_certificate_get_nothing(
    served: Served,
    root: Path,
    fleet: Fleet,
    strangers: Fleet,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cases = [
        (
            fleet.here(**strangers.pair("here")),
            "does not know the CA of this host's certificate",
            "the certificate of the client is not of this CA",
        ),
        (
            fleet.here(**fleet.expired("old-client")),
            "says that this host's certificate has expired",
            "the certificate of the client has expired",
        ),
        (
            fleet.here(**fleet.only("server-only", SERVER_ONLY)),
            "this host's certificate is not for that",
            "the certificate of the client is not for that",
        ),
    ]
    for transport, told, logged in cases:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert told in refusal(served.url, root, transport)
            wait(lambda: caplog.messages)
        assert [logged in line for line in caplog.messages] == [True]
        assert hello(served.url, root, fleet.here())


def test_a_client_without_a_certificate_gets_nothing(
    served: Served, root: Path, fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(fleet.files("here")["ca"])
    with context.wrap_socket(served.raw(), server_hostname="127.0.0.1") as channel:
        # In TLS 1.3 a client is told only once it reads; what it sends is not listened to.
        channel.sendall(_HELLO + b"stream\n" + ID.encode())
        with pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"):
            channel.recv(1)
    wait(lambda: caplog.messages)
    assert "the client showed no certificate" in caplog.text
    assert hello(served.url, root, fleet.here())


def test_older_tls_is_not_spoken(served: Served, fleet: Fleet) -> None:
    files = fleet.files("here")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(files["ca"])
    context.load_cert_chain(files["cert"], files["key"])
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with served.raw() as channel, pytest.raises(ssl.SSLError):
        context.wrap_socket(channel, server_hostname="127.0.0.1")


def test_plain_clients_are_told_to_speak_tls(
    served: Served, root: Path, fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    url = served.url.replace("tls://", "tcp://")
    assert "that port speaks TLS" in refusal(url, root, TransportConfig(insecure=True))
    wait(lambda: caplog.messages)
    assert "the client speaks no TLS" in caplog.text
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"\0" * 300, b"x"):
        with served.raw() as channel:
            channel.sendall(words)
            channel.shutdown(socket.SHUT_WR)
            answer = channel.recv(4096)
            # One line at the most, or an alert.
            assert not answer or answer[0] == 0x15 or answer == SPEAKS_TLS
    assert hello(served.url, root, fleet.here())


# -- whom the client refuses -----------------------------------------------------------------


def test_agents_that_are_not_the_right_ones_are_refused(
    root: Path, fleet: Fleet, strangers: Fleet
) -> None:
    cases = [
        (fleet.there(**strangers.pair("there")), "is not of this CA"),
        (fleet.there(**fleet.expired("old-agent")), "has expired"),
        (fleet.there(**fleet.only("client-only", CLIENT_ONLY)), "is not for that"),
    ]
    for there, told in cases:
        with serving(root, there) as served:
            message = refusal(served.url, root, fleet.here())
            assert message == f"the certificate of the agent at 127.0.0.1 {told}"
            wait(lambda served=served: not served.service._front._lobby.waiting)  # type: ignore[misc]


def test_an_agent_of_another_name_is_refused(root: Path, fleet: Fleet) -> None:
    with serving(root, fleet.there()) as served:
        told = "the certificate of the agent at localhost has another name"
        assert refusal(f"tls://localhost:{served.port}", root, fleet.here()) == told
    with serving(root, fleet.there(**fleet.at("elsewhere", "10.9.9.9"))) as other:
        assert "has another address" in refusal(other.url, root, fleet.here())


def test_an_agent_that_speaks_no_tls_is_refused(root: Path, fleet: Fleet) -> None:
    with serving(root, AgentConfig(listen="tcp://127.0.0.1:0", insecure=True)) as served:
        url = served.url.replace("tcp://", "tls://")
        assert "speaks no TLS" in refusal(url, root, fleet.here())
        assert hello(served.url, root, TransportConfig(insecure=True))


# -- files -----------------------------------------------------------------------------------


def test_files_that_will_not_do_are_named(root: Path, fleet: Fleet) -> None:
    garbage, opened = root / "garbage.pem", root / "open.key"
    garbage.write_text("no certificate\n")
    opened.write_bytes(Path(fleet.files("here")["key"]).read_bytes())
    opened.chmod(0o644)
    locked = root / "locked.key"
    key = load_pem_private_key(Path(fleet.files("here")["key"]).read_bytes(), None)
    pem = (Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    locked.write_bytes(key.private_bytes(*pem))
    locked.chmod(0o600)
    cases: list[tuple[dict[str, str], str]] = [
        ({"key": str(locked)}, "has a passphrase"),
        ({"ca": str(root / "none.pem")}, "none.pem: No such file"),
        ({"ca": str(garbage)}, "garbage.pem is no certificate of a CA"),
        ({"cert": str(garbage)}, "are not a certificate and its key"),
        ({"key": str(fleet.root / "ca.key")}, "are not a certificate and its key"),
        ({"key": str(opened)}, "open.key is open to others"),
    ]
    for changes, told in cases:
        with (
            pytest.raises(Refused, match=told),
            channel_to("tls://127.0.0.1", root, fleet.here(**changes)),
        ):
            pass
        with pytest.raises(Refused, match=told), serving(root, fleet.there(**changes)):
            pass


def test_renewed_certificates_count_at_once(root: Path, fleet: Fleet) -> None:
    place = root / "tls"
    place.mkdir()
    files = {name: str(place / name) for name in ("ca", "cert", "key")}

    def install(found: dict[str, str]) -> None:
        for name, path in found.items():
            Path(files[name]).write_bytes(Path(path).read_bytes())
            Path(files[name]).chmod(0o600)

    install(fleet.expired("old-agent"))
    with serving(root, fleet.there(**files)) as served:
        assert "has expired" in refusal(served.url, root, fleet.here())
        install(fleet.files("there"))
        assert hello(served.url, root, fleet.here())
        # And one that cannot be read ends nothing.
        Path(files["cert"]).write_text("")
        refusal(served.url, root, fleet.here())
        install(fleet.files("there"))
        assert hello(served.url, root, fleet.here())
