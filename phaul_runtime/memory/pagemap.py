"""CRIU's page maps and memory areas: which pages of a process are where, and what may be lazy.

Read without pycriu: its classes know the format of one version only, and a field that an older
one does not know (`nr_pages` of CRIU 4.2) would be lost in silence.
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from phaul_runtime.criu.page_format import PageFormat
from phaul_runtime.errors import DestinationError
from phaul_runtime.memory.fill_plan import PAGE

# criu/include/pagemap.h
IN_PARENT = 1
LAZY = 2
PRESENT = 4
# In one entry, as a narrow page map has it in 32 bits.
MOST_PAGES = (1 << 32) - 1

# criu/include/magic.h: IMG_COMMON_MAGIC, PAGEMAP_MAGIC, MM_MAGIC; then messages, sizes before them.
_MAGIC = struct.Struct("<II")
_SIZE = struct.Struct("<I")
_COMMON = 0x54564319
_PAGEMAP = 0x56084025
_MM = 0x57492820

_NAME = re.compile(r"pagemap-([0-9]+)\.img")

# mmap(2) and criu/include/image.h.
_PRIVATE_ANONYMOUS = 0x02 | 0x20
_LOCKED_OR_HUGE = 0x2000 | 0x40000
_REGULAR_PRIVATE = 1 << 0 | 1 << 9
# Vsyscall, vDSO, vvar, AIO ring, shadow stack, guard, left to a plugin.
_SPECIAL = 1 << 2 | 1 << 3 | 1 << 12 | 1 << 13 | 1 << 15 | 1 << 16 | 1 << 27
_GUARD = 1 << 16


# What is used of images/pagemap.proto and images/mm.proto, of every version: name, number, type.
_UINT32, _UINT64 = 13, 4
_MESSAGES: dict[str, list[tuple[str, int, int | str]]] = {
    "Head": [("pages_id", 1, _UINT32)],
    "Entry": [
        ("vaddr", 1, _UINT64),
        # All of it until CRIU 4.1; since 4.2 it is 0, and `nr_pages` has all.
        ("compat_nr_pages", 2, _UINT32),
        ("in_parent", 3, _UINT32),
        ("flags", 4, _UINT32),
        ("nr_pages", 5, _UINT64),
    ],
    "Vma": [
        ("start", 1, _UINT64),
        ("end", 2, _UINT64),
        ("flags", 6, _UINT32),
        ("status", 7, _UINT32),
    ],
    "Mm": [("vmas", 14, "Vma")],
}


def _message_classes() -> dict[str, Any]:
    optional, repeated, message_type = 1, 3, 11
    file = descriptor_pb2.FileDescriptorProto(name="phaul/images.proto", package="phaul.images")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, number, kind in fields:
            added: Any = message.field.add(name=field, number=number)
            if isinstance(kind, str):
                added.label, added.type = repeated, message_type
                added.type_name = f".phaul.images.{kind}"
            else:
                added.label, added.type = optional, kind
    pool: Any = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"phaul.images.{name}"))
        for name in _MESSAGES
    }


_CLASSES = _message_classes()


# Adjacent pages that are in the same place: address of the first, how many, flags. Only what is
# PRESENT takes room in the pages file, in the order of the entries. Plain, as there may be many.
Entry = tuple[int, int, int]


@dataclass
class Pagemap:
    """A page map image.

    Attributes:
        pages_id: of the file with its pages: `pages-ID.img` beside it.
        entries: sorted by address, not overlapping.
        format: in which it is written.
    """

    pages_id: int
    entries: list[Entry]
    format: PageFormat = PageFormat.NARROW


def is_remote(flags: int) -> bool:
    """Whether pages were not dumped at all: those of a dump with `lazy_pages` that may be lazy."""
    return not flags & (PRESENT | IN_PARENT)


class Vma(NamedTuple):
    """A memory area: `flags` are those of mmap(2), `status` has CRIU's own (image.h)."""

    start: int
    end: int
    flags: int
    status: int

    @property
    def lazy(self) -> bool:
        """Whether its pages may arrive after the process runs again.

        As CRIU's `vma_entry_can_be_lazy`, by which its restorer registers areas for that, less
        what it registers but fills otherwise (shadow stacks) or does not fill from a page map.
        """
        return (
            self.flags & _PRIVATE_ANONYMOUS == _PRIVATE_ANONYMOUS
            and not self.flags & _LOCKED_OR_HUGE
            and self.status & _REGULAR_PRIVATE == _REGULAR_PRIVATE
            and not self.status & _SPECIAL
        )


def pagemap_path(images_dir: Path, pid: int) -> Path:
    """The page map of a process."""
    return images_dir / f"pagemap-{pid}.img"


def processes(images_dir: Path) -> list[int]:
    """The processes that have a page map there, rising; without those that are zombies.

    Raises:
        DestinationError: the directory cannot be read.
    """
    try:
        names = os.listdir(images_dir)
    except OSError as error:
        raise DestinationError(f"cannot read {images_dir}: {error.strerror}") from error
    return sorted(int(found[1]) for name in names if (found := _NAME.fullmatch(name)))


def read_pagemap(path: Path) -> Pagemap:
    """Read a `pagemap-*.img` of a process or of shared memory.

    Raises:
        DestinationError: it is missing or malformed.
    """
    head, *messages = _messages(path, _PAGEMAP)
    parse = _CLASSES["Entry"].FromString
    entries: list[Entry] = []
    found, behind = PageFormat.NARROW, 0
    try:
        pages_id = _CLASSES["Head"].FromString(head).pages_id
        for message in messages:
            entry = parse(message)
            vaddr, pages = entry.vaddr, entry.nr_pages
            if pages:
                found = PageFormat.WIDE
            else:
                pages = entry.compat_nr_pages
            # Before there were flags: init_compat_pagemap_entry in criu/pagemap.c.
            flags = entry.flags | IN_PARENT if entry.in_parent else entry.flags or PRESENT
            where = flags & (PRESENT | IN_PARENT)
            # Here, in the parent, or, of a lazy dump, left with the process; never two of them.
            bad = where == PRESENT | IN_PARENT or (not where and not flags & LAZY)
            bad = bad or flags & ~(PRESENT | IN_PARENT | LAZY) or not 0 < pages <= MOST_PAGES
            if vaddr < behind or vaddr % PAGE or bad:
                raise DestinationError(
                    f"{path} is malformed: {pages} pages at {vaddr:#x}, flags {flags}"
                )
            behind = vaddr + pages * PAGE
            entries.append((vaddr, pages, flags))
    except DecodeError as error:
        raise DestinationError(f"{path} is malformed: {error}") from error
    return Pagemap(pages_id, entries, found)


def write_pagemap(path: Path, pagemap: Pagemap) -> None:
    """Write it as CRIU does; complete or not at all.

    Raises:
        DestinationError: it cannot be written.
    """
    new = path.with_name(f"{path.name}.new")
    try:
        new.write_bytes(pagemap_image(pagemap))
        new.replace(path)
    except OSError as error:
        raise DestinationError(f"cannot write {path}: {error.strerror}") from error


def pagemap_image(pagemap: Pagemap) -> bytes:
    """What CRIU writes into the file of a page map."""
    entry_class = _CLASSES["Entry"]
    parts = [_MAGIC.pack(_COMMON, _PAGEMAP), _framed(_CLASSES["Head"](pages_id=pagemap.pages_id))]
    for vaddr, pages, flags in pagemap.entries:
        if pagemap.format is PageFormat.WIDE:
            entry = entry_class(vaddr=vaddr, compat_nr_pages=0, flags=flags, nr_pages=pages)
        else:
            entry = entry_class(vaddr=vaddr, compat_nr_pages=pages, flags=flags)
        parts.append(_framed(entry))
    return b"".join(parts)


def page_maps(images_dir: Path) -> list[Path]:
    """All page maps there: of processes and of shared memory."""
    return sorted(images_dir.glob("pagemap-*.img"))


def convert_page_maps(images_dir: Path, wanted: PageFormat) -> None:
    """Have all page maps there in one format; idempotent.

    Raises:
        DestinationError: one is malformed, or cannot be written.
    """
    for path in page_maps(images_dir):
        pagemap = read_pagemap(path)
        if pagemap.format is not wanted:
            pagemap.format = wanted
            write_pagemap(path, pagemap)


def read_vmas(path: Path) -> list[Vma]:
    """Read the areas of an `mm-*.img`, sorted by address.

    Raises:
        DestinationError: it is missing or malformed.
    """
    (message,) = _messages(path, _MM)[:1]
    try:
        mm = _CLASSES["Mm"].FromString(message)
    except DecodeError as error:
        raise DestinationError(f"{path} is malformed: {error}") from error
    # The guards of CRIU 4.2 are no areas: they lie behind the last, and in one of the others.
    return [
        Vma(vma.start, vma.end, vma.flags, vma.status) for vma in mm.vmas if not vma.status & _GUARD
    ]


def _messages(path: Path, magic: int) -> list[bytes]:
    """The messages of an image, at least one."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DestinationError(f"cannot read {path}: {error.strerror}") from error
    if data[: _MAGIC.size] != _MAGIC.pack(_COMMON, magic):
        raise DestinationError(f"{path} is not the image that its name says")
    messages = []
    unpack, size, end = _SIZE.unpack_from, _SIZE.size, len(data)
    at = _MAGIC.size
    while at + size <= end:
        begin = at + size
        at = begin + unpack(data, at)[0]
        messages.append(data[begin:at])
    if at != end or not messages:
        raise DestinationError(f"{path} is cut short")
    return messages


def _framed(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return _SIZE.pack(len(data)) + data
