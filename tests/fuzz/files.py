"""What lies on a disk, or comes to lie there: images, plans, journals, statistics; and JSON."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

from phaul_runtime.criu.page_format import PageFormat
from phaul_runtime.criu.session import Criu
from phaul_runtime.criu.stats import read_dump_stats
from phaul_runtime.cutover import journal as journal_module
from phaul_runtime.cutover.journal import Journal, examine, journal_path, unsettled
from phaul_runtime.cutover.journal_format import HEADER, STEP, decode, encode
from phaul_runtime.cutover.states import Role, State
from phaul_runtime.destination.requests import checked_json
from phaul_runtime.errors import PhaulError
from phaul_runtime.memory.fill_plan import FillPlan
from phaul_runtime.memory.mark_lazy import plan_lazy
from phaul_runtime.memory.page_index import PageIndex
from phaul_runtime.memory.pagemap import Pagemap, convert_page_maps, read_pagemap, write_pagemap
from phaul_runtime.recovery.resolve import Settler
from tests.fuzz.mutation import Random, mutated, worse
from tests.fuzz.target import Target
from tests.movejournals import DEAD, ID, build, processes

_MM = bytes.fromhex("19435654") + bytes.fromhex("20284957")


def _vma(start: int, end: int, flags: int, status: int) -> bytes:
    """Field 14 of images/mm.proto."""
    body = b""
    for number, value in ((1, start), (2, end), (6, flags), (7, status)):
        body += bytes([number << 3]) + _varint(value)
    return bytes([14 << 3 | 2]) + _varint(len(body)) + body


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


class Images(Target):
    """Page maps and memory areas of a chain, planned for a lazy restore."""

    name = "images"
    share = 20

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        first, last = root / "good/1", root / "good/2"
        for place in (first, last):
            place.mkdir(parents=True)
        here, above = (
            [(0x1000 * at * 3, 2, 4) for at in range(1, 20)],
            [(0x3000, 2, 1), (0x6000, 2, 4)],
        )
        write_pagemap(first / "pagemap-1.img", Pagemap(1, here, PageFormat.WIDE))
        write_pagemap(last / "pagemap-1.img", Pagemap(1, above, PageFormat.NARROW))
        for place in (first, last):
            (place / "pages-1.img").write_bytes(bytes(4096 * 40))
        (last / "parent").symlink_to("../1")
        areas = b"".join(_vma(at << 12, (at + 8) << 12, 0x22, 0x201) for at in range(1, 60, 8))
        (last / "mm-1.img").write_bytes(_MM + len(areas).to_bytes(4, "little") + areas)
        self._good = root / "good"
        plan_lazy(PageIndex.follow(last), last)  # it is good

    def case(self, rng: Random) -> tuple[int, bool]:
        """See `Target`."""
        chain = self.root / "chain"
        shutil.copytree(self._good, chain, symlinks=True)
        try:
            names = ["1/pagemap-1.img", "2/pagemap-1.img", "2/mm-1.img", "2/pages-1.img"]
            for name in rng.sample(names, rng.randrange(1, 3)):
                path = chain / name
                path.write_bytes(mutated(rng, path.read_bytes()))
            taken = True
            for work in (
                lambda: plan_lazy(PageIndex.follow(chain / "2"), chain / "2"),
                lambda: read_pagemap(chain / "2/pagemap-1.img"),
                lambda: convert_page_maps(chain / "1", rng.choice(list(PageFormat))),
            ):
                try:
                    work()
                except PhaulError:
                    taken = False
        finally:
            shutil.rmtree(chain)
        return 3, taken


class Plan(Target):
    """The plan of lazy pages, as a pager reads it."""

    name = "plan"
    share = 10

    def case(self, rng: Random) -> tuple[int, bool]:
        """See `Target`."""
        head: dict[str, Any] = {"files": ["/x"], "tasks": {"1": 64, "2": 32}, "remote": "",
                                "remote_file": -1, "remote_pages": 0}  # fmt: skip
        data = json.dumps(worse(rng, head)).encode() + b"\n" + rng.randbytes(96)
        path = self.root / "plan"
        path.write_bytes(mutated(rng, data) if rng.random() < 0.5 else data)
        try:
            FillPlan.load(path)
        except PhaulError:
            return 1, False
        return 1, True


class Stats(Target):
    """CRIU's statistics."""

    name = "stats"
    share = 10

    def case(self, rng: Random) -> tuple[int, bool]:
        """See `Target`."""
        from pycriu.images import stats_pb2

        entry = stats_pb2.stats_entry()
        for field in entry.dump.DESCRIPTOR.fields:
            setattr(entry.dump, field.name, rng.randrange(1 << 20))
        body = entry.SerializeToString()
        head = b"".join(
            number.to_bytes(4, "little") for number in (0x55105940, 0x57093306, len(body))
        )
        # The numbers before it right, now and then, so that what follows is looked at.
        data = (
            mutated(rng, head + body)
            if rng.random() < 0.5
            else head + mutated(rng, body)[: len(body)]
        )
        (self.root / "stats-dump").write_bytes(data)
        try:
            read_dump_stats(self.root)
        except PhaulError:
            return 1, False
        return 1, True


class Json(Target):
    """A manifest."""

    name = "json"
    share = 25

    def case(self, rng: Random) -> tuple[int, bool]:
        """See `Target`."""
        depth = rng.choice((0, 1, 5, 60, 70, 3000, 100_000 if rng.random() < 0.05 else 2))
        data = json.dumps(worse(rng, {"a": [1, 2, {"b": None}], "pids": [1, 2], "n": 1.5})).encode()
        data = b'{"x":' * depth + data + b"}" * depth
        try:
            checked_json(mutated(rng, data), "manifest")
        except PhaulError:
            return 1, False
        return 1, True


class Journals(Target):
    """Journals: their bytes, and what good bytes say."""

    name = "journals"
    share = 10

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._state_dir = root / "state"
        # The disk is not what this is about, nor are processes.
        self._patched: list[tuple[Any, str, Any]] = [
            (module, name, getattr(module, name))
            for module, name in (
                (journal_module, "sync_directory"), (os, "fdatasync"),
            )
        ]  # fmt: skip
        for module, name, _ in self._patched:
            setattr(module, name, lambda *_: None)
        self._good: dict[Role, bytes] = {}
        self._records: dict[Role, list[dict[str, Any]]] = {}
        for role in Role:
            build(self._state_dir, role, State.PREPARED, DEAD).close()
            path = journal_path(self._state_dir, ID, role)
            self._good[role] = path.read_bytes()
            self._records[role] = examine(path).records

    def case(self, rng: Random) -> tuple[int, bool]:
        """See `Target`."""
        role = rng.choice(list(Role))
        path = journal_path(self._state_dir, ID, role)
        for each in Role:
            journal_path(self._state_dir, ID, each).write_bytes(self._good[each])
        data = mutated(rng, self._good[role]) if rng.random() < 0.6 else self._said(rng, role)
        decode(data)
        path.write_bytes(data)
        taken = True
        settler = Settler(
            self._state_dir, self.root / "work", Criu("no-such-criu"),
            engines=processes,
        )  # fmt: skip
        for work in (
            lambda: examine(path),
            lambda: unsettled(self._state_dir),
            lambda: settler.look(ID, role, wait_s=0),
            lambda: Journal.open(self._state_dir, ID, role).close(),
        ):
            try:
                work()
            except PhaulError:
                taken = False
        return 1, taken

    def _said(self, rng: Random, role: Role) -> bytes:
        """A journal that is whole, and whose records say something else."""
        data, checksum = HEADER, zlib.crc32(HEADER)
        for record in self._records[role]:
            told = worse(rng, record, 1)
            if not isinstance(told, dict):
                continue
            line, checksum = encode(told, 2, checksum, len(data))
            data += line
        return data + bytes(-len(data) % STEP)

    def close(self) -> None:
        """See `Target`."""
        for module, name, value in self._patched:
            setattr(module, name, value)


FILES: tuple[type[Target], ...] = (Images, Plan, Stats, Json, Journals)
