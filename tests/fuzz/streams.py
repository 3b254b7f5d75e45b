"""Pages and framings: what comes on a connection."""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import zstandard

from phaul_runtime.criu.page_format import PageFormat
from phaul_runtime.errors import PhaulError
from phaul_runtime.files.tree_server import checked_arguments
from phaul_runtime.memory.page_receiver import Aborted, Listed, PageReceiver
from phaul_runtime.postcopy import protocol
from phaul_runtime.postcopy.receiver import _Arriving
from phaul_runtime.postcopy.sender import _Serving
from phaul_runtime.postcopy.store import PageStore
from phaul_runtime.transport import handshake, image_proxy, tls_relay
from phaul_runtime.transport.handshake import Deadline
from tests.fuzz.mutation import EDGES, Random, fed, mutated
from tests.fuzz.target import Target, Uncaught

PAGE = 4096
_TARGETS = (257, 513, 258, 1793, (1 << 64) - 255, 0, 3, 511)
_WITHIN_S = 10.0
_BIG = 64 << 20


def page_session(rng: Random, form: PageFormat) -> tuple[bytes, int]:
    """What a source's CRIU might send in a round, and how many headers it has."""
    out: list[bytes] = []
    address, target = 0x1000, rng.choice(_TARGETS[:3])
    narrow = (1 << (32 if form is PageFormat.NARROW else 64)) - 1

    def header(command: int, pages: int, vaddr: int, to: int) -> None:
        out.append(form.header.pack(command & 0xFFFFFFFF, pages & narrow, vaddr, to))

    header(4, 0, 0, target)
    count = 1
    honest = rng.random() < 0.5
    for _ in range(rng.randrange(40)):
        kind = rng.random() * (0.55 if honest else 1.0)
        count += 1
        if kind < 0.55:
            pages = rng.choice((1, 1, 1, 2, 3, 17))
            flags = 4 if honest else rng.choice((4, 4, 4, 1, 6, 2, 0, 5, 15))
            header(6 | flags << 16, pages, address, target)
            if flags in (4, 6):
                out.append(rng.randbytes(1) * (pages * PAGE))
            address += pages * PAGE + rng.choice((0, 0, PAGE, 1 << 20))
        elif kind < 0.65:
            header(5, 0, 0, rng.choice(_TARGETS))
        elif kind < 0.75:
            target, address = rng.choice(_TARGETS), 0x1000
            header(4, rng.choice(EDGES), rng.choice(EDGES), target)
        elif kind < 0.95:
            command = rng.choice((0, 1, 2, 3, 6, 7, 8, 0x1023, 0x1024, 0xFFFF))
            command |= rng.choice((0, 4 << 16, rng.randrange(1 << 16) << 16))
            header(command, rng.choice(EDGES), rng.choice(EDGES), rng.choice(_TARGETS))
        else:
            out.append(rng.randbytes(rng.randrange(64)))
    if honest or rng.random() < 0.7:
        header(rng.choice((0x1023, 0x1024)), 0, 0, 0)
        count += 1
    data = b"".join(out)
    return (mutated(rng, data) if rng.random() < 0.5 else data), count


class Pages(Target):
    """The receiver of an iteration's pages."""

    name = "pages"
    share = 560

    def case(self, rng: Random) -> tuple[int, bool]:
        """See `Target`."""
        form = rng.choice(list(PageFormat))
        data, count = page_session(rng, form)
        parent: dict[str, Listed] = {}
        if rng.random() < 0.5:
            listed = Listed()
            listed.add(0x1000, 0x100000)
            parent = {f"pagemap-{pid}.img": listed for pid in (1, 2)}
        place = self.root / "round"
        place.mkdir()
        try:
            with fed(data) as channel:
                sink = PageReceiver(
                    channel.fileno(), place, wire=form, images=rng.choice(list(PageFormat)),
                    parent=parent,
                )  # fmt: skip
                try:
                    sink.run()
                    taken = True
                except (PhaulError, Aborted):
                    taken = False
                finally:
                    sink.close()
            self._look_at(place)
        finally:
            shutil.rmtree(place)
        return count, taken

    def _look_at(self, place: Path) -> None:
        for found in os.scandir(place):
            if not (found.name.startswith(("pagemap-", "pages-")) and found.name.endswith(".img")):
                raise Uncaught(f"a file {found.name!r}")
            if found.stat().st_size > _BIG:
                raise Uncaught(f"a file of {found.stat().st_size} bytes")


class Proxy(Target):
    """Compressed pieces of the memory channel."""

    name = "proxy"
    share = 70

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._small = zstandard.ZstdCompressor(level=1)
        self._nameless = zstandard.ZstdCompressor(level=1, write_content_size=False)
        self._bomb = zstandard.ZstdCompressor(level=9).compress(bytes(16 << 20))

    def case(self, rng: Random) -> tuple[int, bool]:
        """See `Target`."""
        out: list[bytes] = []
        for _ in range(rng.randrange(1, 12)):
            raw = rng.choice(
                (bytes(rng.randrange(1, 300_000)), rng.randbytes(rng.randrange(1, 3000)))
            )
            kind = rng.random()
            if kind < 0.7:
                piece = self._small.compress(raw)
                if kind < 0.1:
                    piece = self._nameless.compress(raw)
                elif kind < 0.2:
                    piece = self._bomb
                elif kind < 0.3:
                    piece += self._small.compress(bytes(200_000))
                out.append((1 << 31 | len(piece)).to_bytes(4, "big") + piece)
            elif kind < 0.9:
                out.append(len(raw).to_bytes(4, "big") + raw)
            else:
                size = rng.choice((0, 1 << 31, 1 << 31 | 1 << 18, (1 << 18) + 1, (1 << 32) - 1))
                out.append(size.to_bytes(4, "big"))
        if rng.random() < 0.5:
            out.append(bytes(4))
        with fed(mutated(rng, b"".join(out))) as channel:
            try:
                for piece in image_proxy._unpacked(channel):
                    if len(piece) > image_proxy._PIECE:
                        raise Uncaught(f"a piece of {len(piece)} bytes")
                taken = True
            except (OSError, PhaulError):
                taken = False
        return len(out), taken


class Pump(Target):
    """What a TLS connection carries: pieces that may be split anywhere."""

    name = "pump"
    share = 100

    def case(self, rng: Random) -> tuple[int, bool]:
        """See `Target`."""
        pump = tls_relay._Pump.__new__(tls_relay._Pump)
        pump._undelivered, pump._header = deque(), bytearray()
        pump._left, pump._secured_ended = 0, False
        sizes = [rng.choice((0, 1, 5, 100, (1 << 32) - 1)) for _ in range(rng.randrange(1, 30))]
        data = b"".join(
            size.to_bytes(4, "big") + rng.randbytes(rng.randrange(120)) for size in sizes
        )
        count = 0
        try:
            while data:
                size = rng.randrange(1, 50)
                pump._take_apart(memoryview(bytearray(data[:size])))
                data = data[size:]
                count += 1
        except tls_relay._Broken:
            return max(1, count), False
        return count, True


class _NoWants:
    """Nobody waits for a page."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()

    def fileno(self) -> int:
        return self._reader

    def take(self) -> Iterator[tuple[int, int]]:
        return iter(())

    def arrived(self) -> None:
        pass

    def close(self) -> None:
        os.close(self._reader)
        os.close(self._writer)


class Arriving(Target):
    """Post-copy at the destination: pages that come."""

    name = "arriving"
    share = 60

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._wants = _NoWants()
        self._bell = os.eventfd(0)

    def case(self, rng: Random) -> tuple[int, bool]:
        """See `Target`."""
        place = self.root / "late"
        place.mkdir()
        store = PageStore.create(place, 64)
        out: list[bytes] = []
        for _ in range(rng.randrange(1, 40)):
            kind = rng.random()
            if kind < 0.8:
                out.append(
                    protocol.message(protocol.Kind.PAGES, rng.randrange(64), 1) + bytes(PAGE)
                )
            elif kind < 0.9:
                count = rng.choice((0, 1, 2, 5, 64, 65, (1 << 32) - 1))
                head = struct.pack("!IIQ", rng.choice(range(6)), count, rng.choice(EDGES))
                out.append(head + bytes(PAGE * min(count, 2)))
            else:
                out.append(rng.randbytes(rng.randrange(40)))
        try:
            with fed(mutated(rng, b"".join(out))) as channel, protocol.unblocked(channel) as linked:
                _Arriving(store, linked, cast(Any, self._wants), self._bell).run(_WITHIN_S)
            taken = True
        except PhaulError:
            taken = False
        finally:
            store.close()
            shutil.rmtree(place)
        return len(out), taken

    def close(self) -> None:
        """See `Target`."""
        self._wants.close()
        os.close(self._bell)


class _TwoHundred:
    """Pages of a tree that nobody dumped."""

    total = 200
    runs: tuple[Any, ...] = ()
    bytes_sent = 0

    @property
    def pages(self) -> _TwoHundred:
        return self

    def pieces(self, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        if not 0 <= first <= first + count <= self.total:
            raise Uncaught(f"pages {first} and {count} more are asked for")
        yield 1, first * PAGE, count

    def read(self, first: int, count: int) -> memoryview:
        if not 0 <= first <= first + count <= self.total:
            raise Uncaught(f"pages {first} and {count} more are read")
        return memoryview(bytes(count * PAGE))


class Serving(Target):
    """Post-copy at the source: what is wanted."""

    name = "serving"
    share = 60

    def case(self, rng: Random) -> tuple[int, bool]:
        """See `Target`."""
        bitmap = rng.choice((bytes(25), b"\xff" * 25, rng.randbytes(25), b"\xff" * 24))
        total = rng.choice((200, 200, 200, 199, 0, 1 << 60))
        out = [protocol.HEAD.pack(protocol.MAGIC, total) + bitmap]
        for _ in range(rng.randrange(30)):
            kind, count = rng.choice((1, 1, 1, 2, 3, 0, 9)), rng.choice((0, 1, 2, 32, 33))
            first = rng.choice((0, 1, 100, 168, 199, 200, (1 << 64) - 1))
            out.append(struct.pack("!IIQ", kind, count, first))
        if rng.random() < 0.4:
            out.append(protocol.message(protocol.Kind.DONE))
        with fed(mutated(rng, b"".join(out))) as channel:
            try:
                with protocol.unblocked(channel) as linked:
                    source = cast(Any, _TwoHundred())
                    _Serving(source, linked, lambda _: None, _WITHIN_S, lambda: True).run()
                taken = True
            except PhaulError:
                taken = False
        return len(out), taken


class Greeting(Target):
    """The first line on the agent's port."""

    name = "greeting"
    share = 20
    _KNOWN = (
        b"phaul-runtime 1 control\n", b"phaul-runtime 1 stream\n", b"\x16\x03\x01\x02\x00\x01",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"phaul-runtime 1 \xff\n", b"a" * 600, b"\n",
    )  # fmt: skip

    def case(self, rng: Random) -> tuple[int, bool]:
        """See `Target`."""
        with fed(mutated(rng, rng.choice(self._KNOWN))) as channel:
            try:
                handshake.receive(channel, Deadline.within(_WITHIN_S))
            except (OSError, PhaulError):
                return 1, False
        return 1, True


class Arguments(Target):
    """A client's rsync command line."""

    name = "arguments"
    share = 40
    _GOOD = "--server -logDtpAXRre.iLsfxCIvu --delete-during --timeout=20 . rootfs"
    _EVIL = (
        "--sender", "--daemon", "--config=/x", "--log-file=/etc/x", "--temp-dir=/etc", "-e", "sh",
        "--rsh=sh", "--files-from=/etc/shadow", "--copy-dest=/etc", "--link-dest=/", "-K",
        "--write-devices", "--fake-super", "--filter=x", "--inplace", "--numeric-ids", ".", "/etc",
        "rootfs", "..", "", " ",
    )  # fmt: skip
    _ALLOWED = ("--delete-during", "--stats", "--numeric-ids", "--inplace", "-@-1",
                "--modify-window=-1")  # fmt: skip

    def case(self, rng: Random) -> tuple[int, bool]:
        """See `Target`."""
        words = self._GOOD.split(" ")
        for _ in range(rng.randrange(4)):
            kind = rng.random()
            if kind < 0.6:
                words.insert(rng.randrange(len(words) + 1), rng.choice(self._EVIL))
            elif kind < 0.8 and words:
                del words[rng.randrange(len(words))]
            elif words:
                at = rng.randrange(len(words))
                spot = rng.randrange(len(words[at]) + 1)
                extra = rng.choice("abcKsLkeEvw.-=\n\0/ ;é")
                words[at] = words[at][:spot] + extra + words[at][spot:]
        try:
            found = checked_arguments(" ".join(words), "rootfs")
        except PhaulError:
            return 1, False
        for option in found[2:]:
            timeout = option.removeprefix("--timeout=")
            if option not in self._ALLOWED and not (timeout.isascii() and timeout.isdigit()):
                raise Uncaught(f"the option {option!r} is let pass")
        with contextlib.suppress(ValueError):
            if set(found[1][: found[1].index("e.")]) - set("-AHIDSXglopRrtx"):
                raise Uncaught(f"the flags {found[1]!r} are let pass")
        return 1, True


STREAMS: tuple[type[Target], ...] = (
    Pages, Proxy, Pump, Arriving, Serving, Greeting, Arguments,
)  # fmt: skip
