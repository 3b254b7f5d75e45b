"""PhaulServer with its own receiver: its contract whatever the source's CRIU does."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from phaul_runtime.criu.page_format import PageFormat
from phaul_runtime.criu.session import Criu, CriuVersion
from phaul_runtime.errors import DestinationError, Refused
from phaul_runtime.library.api import PhaulConfig
from phaul_runtime.library.server import PhaulServer
from phaul_runtime.memory.pagemap import IN_PARENT, PRESENT
from phaul_runtime.memory.preallocate import Preallocation
from tests.processes import open_descriptors
from tests.unit.memory.test_page_index import BASE, pagemap_image
from tests.unit.memory.test_page_receiver import PAGE, Map, Wire, same, session


class Served:
    """A server, and the source's end of its memory channel."""

    def __init__(
        self,
        root: Path,
        *,
        version: tuple[int, int] = (4, 1),
        client: PageFormat | None = None,
        **more: object,
    ) -> None:
        self.root = root
        self.criu = Criu("no-such-criu", deadline_s=5)
        self.criu.known_version = CriuVersion(*version)
        self.wire = client or self.criu.known_version.page_format or 0
        self.ours, self.theirs = socket.socketpair()
        self.ours.settimeout(10)
        config = PhaulConfig(0, self.theirs.fileno(), str(root))
        self.server = PhaulServer(config, self.criu, client=client, **more)  # type: ignore[arg-type]

    def send(self, sent: Wire) -> None:
        for data, answer in sent.parts:
            self.ours.sendall(data)
            assert self.ours.recv(len(answer), socket.MSG_WAITALL) == answer

    def round(self, maps: list[Map], known: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        self.server.start_iter()
        self.send(session(maps, known, self.wire))
        self.server.stop_iter()

    def close(self) -> None:
        self.server.abort()
        self.ours.close()
        self.theirs.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    found = Served(tmp_path)
    before = open_descriptors()
    yield found
    found.server.abort()
    assert open_descriptors() - before == set()
    found.close()


MAP = Map(1, 1).add(PAGE, 5, PRESENT)
HOLE = Map(1, 1).add(PAGE, 4, IN_PARENT).add(5 * PAGE, 1, PRESENT)
KNOWN = {"pagemap-1.img"}


@pytest.mark.parametrize("version", [(4, 1), (4, 2)])
def test_rounds_make_a_chain(tmp_path: Path, version: tuple[int, int]) -> None:
    served = Served(tmp_path, version=version)
    with pytest.raises(DestinationError, match="no iteration was started"):
        served.server.stop_iter()
    served.round([MAP])
    served.round([HOLE], KNOWN)
    served.server.stop_iter()
    assert served.server.last_images_dir == str(tmp_path / "2")
    for number, each in ((1, MAP), (2, HOLE)):
        same(tmp_path / str(number), [each], served.wire)
    assert not (tmp_path / "1" / "parent").is_symlink()
    assert (tmp_path / "2" / "parent").readlink() == Path("../1")
    served.close()


def test_bytes_are_counted_as_they_come(served: Served) -> None:
    assert served.server.received == 0
    served.server.start_iter()
    with pytest.raises(DestinationError, match="was not stopped"):
        served.server.start_iter()
    *opening, end = session([MAP]).parts
    served.send(Wire(parts=opening))
    served.ours.sendall(end[0][: 2 * PAGE])
    deadline = time.monotonic() + 10
    while served.server.received != 24 + 2 * PAGE:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    served.ours.sendall(end[0][2 * PAGE :])
    assert served.ours.recv(4) == bytes(4)
    served.server.stop_iter()
    assert served.server.received > 5 * PAGE


def test_a_failure_ends_the_channel_and_is_told(served: Served) -> None:
    served.server.start_iter()
    served.ours.sendall(Wire().say(99).pending)
    assert served.ours.recv(1) == b""
    with pytest.raises(DestinationError) as caught:
        served.server.stop_iter()
    assert "iteration 1" in caught.value.message
    assert "unknown command 99" in caught.value.message
    assert served.server.failure is caught.value
    with pytest.raises(DestinationError, match="unknown command 99"):
        served.server.start_iter()


def test_a_writer_is_not_left_waiting(served: Served) -> None:
    served.server.start_iter()
    served.send(Wire().map(Map(1, 1), set()))
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        served.ours.sendall(b"\xff" * (64 << 20))
    with pytest.raises(DestinationError, match="unknown command"):
        served.server.stop_iter()


def test_a_full_file_system_is_named(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(28, os.strerror(28))

    class Full:
        f_bavail = 0

    monkeypatch.setattr(os, "pwritev", full)
    monkeypatch.setattr(os, "statvfs", lambda _: Full)
    served.server.start_iter()
    *opening, end = session([MAP]).parts
    served.send(Wire(parts=opening))
    served.ours.sendall(end[0])
    assert served.ours.recv(1) == b""
    with pytest.raises(DestinationError, match=f"no space left in {served.root}"):
        served.server.stop_iter()


def test_a_failed_chain_can_be_begun_anew(served: Served) -> None:
    """The memory channel is whole, so the next attempt uses it."""
    served.round([MAP])
    served.server.start_iter()
    served.server.end_chain()
    served.round([MAP])
    assert not (served.root / "3" / "parent").is_symlink()
    served.round([HOLE], KNOWN)
    assert (served.root / "4" / "parent").readlink() == Path("../3")


@pytest.mark.parametrize("sent", [0, 10, 24, 3000, 4 * PAGE])
def test_it_is_aborted_wherever_it_is(served: Served, sent: int) -> None:
    served.server.start_iter()
    *opening, end = session([MAP]).parts
    if sent:
        served.send(Wire(parts=opening))
        served.ours.sendall(end[0][:sent])
    for _ in range(2):
        served.server.abort()
    with pytest.raises(DestinationError, match="aborted"):
        served.server.start_iter()
    # Nobody but the server has ended: the channel is the caller's.
    served.theirs.sendall(b"x")
    assert served.ours.recv(1) == b"x"


def test_a_round_that_does_not_end_is_told(served: Served) -> None:
    served.server.criu.deadline_s = 0.1
    served.server.start_iter()
    with pytest.raises(DestinationError, match=r"has not ended within 0\.1 s"):
        served.server.stop_iter()


MIXED = [((4, 1), PageFormat.WIDE), ((4, 2), PageFormat.NARROW)]


@pytest.mark.parametrize(("version", "client"), MIXED)
def test_a_client_of_another_version(
    tmp_path: Path, version: tuple[int, int], client: PageFormat
) -> None:
    """Rounds of its CRIU, a final dump of its CRIU beside them: the one here reads them all."""
    served = Served(tmp_path, version=version, client=client)
    here = CriuVersion(*version).page_format
    assert here is not None
    served.round([MAP])
    served.round([HOLE], KNOWN)
    for number, each in ((1, MAP), (2, HOLE)):
        same(tmp_path / str(number), [each], here)
    back = served.server.start_local()
    assert back == {"pagemap-1.img": image_of(HOLE, client)}
    for name in ("pagemap-1.img", "pagemap-shmem-2.img"):
        (tmp_path / "3" / name).write_bytes(image_of(MAP, client))
    for _ in range(2):
        served.server.stop_iter()
        for name in ("pagemap-1.img", "pagemap-shmem-2.img"):
            assert (tmp_path / "3" / name).read_bytes() == image_of(MAP, here)
    served.close()


def image_of(what: Map, written: PageFormat) -> bytes:
    """A page map as CRIU writes it."""
    pieces = [((vaddr - BASE) // PAGE, pages, flags) for vaddr, pages, flags, _ in what.runs]
    return pagemap_image(1, pieces, wide=written is PageFormat.WIDE)


def test_between_equal_versions_page_maps_are_left_alone(served: Served) -> None:
    served.round([MAP])
    sent = served.server.start_local()
    assert sent == {"pagemap-1.img": (served.root / "1" / "pagemap-1.img").read_bytes()}
    (served.root / "2" / "pagemap-1.img").write_bytes(b"CRIU's alone")
    served.server.stop_iter()


def test_a_page_map_of_no_known_format_is_refused_on_arrival(tmp_path: Path) -> None:
    served = Served(tmp_path, version=(4, 1), client=PageFormat.WIDE)
    served.server.start_local()
    (tmp_path / "1" / "pagemap-1.img").write_bytes(
        pagemap_image(1, [(0, 1, PRESENT | 8)], wide=True)
    )
    with pytest.raises(DestinationError, match=r"pagemap-1\.img is malformed"):
        served.server.stop_iter()
    served.close()


def test_pages_for_a_criu_of_no_known_format_are_refused_by_name(tmp_path: Path) -> None:
    served = Served(tmp_path, version=(4, 3))
    with pytest.raises(Refused, match=r"page format of CRIU 4\.3 is not known") as caught:
        served.server.start_iter()
    assert "criu.page_server: criu" in caught.value.hint
    assert served.server.last_images_dir is None
    served.close()


@pytest.mark.parametrize("version", [(4, 1), (4, 3)])
def test_criu_does_it_where_it_is_asked_to(tmp_path: Path, version: tuple[int, int]) -> None:
    pytest.importorskip("pycriu")
    room = Preallocation(tmp_path / "ahead.img", PAGE)
    served = Served(tmp_path, version=version, page_server="criu", ahead=room)
    with pytest.raises(Refused, match="no-such-criu"):
        served.server.start_iter()
    assert not room.path.exists()
    served.close()
