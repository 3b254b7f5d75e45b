r"""What the bytes of a journal's file say; pure, no file is touched here.

Version 2, which is what is written::

    phaul-journal:2\n
    CHECKSUM:LENGTH:SYNCED:{"time":...,"state":"iterating",...}\n
    CHECKSUM:LENGTH:SYNCED:{"time":...,"add":{"made":["/srv/data"]}}\n
    CHECKSUM:LENGTH:SYNCED:{"closed":"done","after":"9b1c33aa"}\n

Three numbers of 8 hex digits precede a record. LENGTH is the JSON's. SYNCED says how many bytes of
the file had reached the disk when it was written. CHECKSUM is the CRC-32 of all that follows it in
the line, and begins with the one of the record before: a record that is missing, moved or twice
there is seen, too. The last line is the closing mark. It is written by a writer that ends well and
is overwritten by the next one; `after` makes it readable without what precedes it.

A file has a multiple of 64 KiB (NULs follow the records) as long as it has no closing mark: one
that was cut short is seen.

Version 1 has neither numbers nor a mark nor a first line: one JSON object a line. Its first byte
is `{`. It is read, and gets records of its own kind.

A writer that dies in the middle of a record leaves a part of it, which nobody was told is on the
disk: it is left out. That is the only thing that may be wrong with a file; everything else is
damage (`Contents.damage`). What tells them apart is in `_damage`.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from phaul_runtime.cutover.states import State

HEADER = b"phaul-journal:2\n"
STEP = 64 << 10
"""The size of an open journal is a multiple of it."""
MARK_BYTES = 256
"""A closing mark is shorter."""

Record = dict[str, Any]

_NUMBERS = re.compile(rb"([0-9a-f]{8}):([0-9a-f]{8}):([0-9a-f]{8}):")
_NUMBERS_BYTES = 27
_MARK = re.compile(
    rb'([0-9a-f]{8}):([0-9a-f]{8}:[0-9a-f]{8}:{"closed":"([a-z-]+)","after":"([0-9a-f]{8})"})\n'
)
_GAP = re.compile(rb"\0+")
# What a disk writes whole or not at all.
_SECTOR = 512
_STATES = frozenset(state.value for state in State)
_LATEST = 1e11  # seconds; more is no time that people could be shown


@dataclass(frozen=True)
class Damage:
    """What is wrong with a file, and from which byte on, where that can be said."""

    offset: int | None
    reason: str


@dataclass
class Contents:
    """What a file says.

    Attributes:
        version: of its format.
        records: those before the damage, if there is any.
        end: where the next record goes.
        lead: what has to be written before it.
        spare: bytes from `end` on that the next record replaces: a closing mark, or a part of a
            record.
        checksum: which the next record's begins with.
        closed: the closing mark is there.
        damage: what is wrong, if anything is.
        later: records that can be read beyond the damage; nothing follows from them.
    """

    version: int = 2
    records: list[Record] = field(default_factory=list)
    end: int = 0
    lead: bytes = b""
    spare: int = 0
    checksum: int = 0
    closed: bool = False
    damage: Damage | None = None
    later: list[Record] = field(default_factory=list)


class _Unusable(Exception):
    """A whole record that says what no record says."""


# -- writing -----------------------------------------------------------------------------------


def encode(record: Record, version: int, checksum: int, synced: int) -> tuple[bytes, int]:
    """A record's line, and the checksum that the one after it begins with.

    Args:
        record: JSON values.
        version: of the file.
        checksum: of the record before.
        synced: bytes of the file that are on the disk for certain.
    """
    text = json.dumps(record, separators=(",", ":")).encode()
    if version == 1:
        return text + b"\n", 0
    summed = b"%08x:%08x:%b" % (len(text), synced, text)
    checksum = zlib.crc32(summed, checksum)
    return b"%08x:%b\n" % (checksum, summed), checksum


def closing_mark(state: State | None, checksum: int, synced: int) -> bytes:
    """The line that ends a file of version 2."""
    mark = {"closed": state.value if state else None, "after": f"{checksum:08x}"}
    return encode(mark, 2, checksum, synced)[0]


# -- reading -----------------------------------------------------------------------------------


def json_object(data: bytes) -> dict[str, Any] | None:
    """A JSON object in UTF-8; None if it is anything else."""
    try:
        value = json.loads(data.decode())
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def closed_state(tail: bytes) -> State | None:
    """The state in the closing mark that ends `tail`, of which no more has to be known.

    None if it ends in anything else, as it does where a writer has not ended well.
    """
    mark = _MARK.fullmatch(tail, tail.rfind(b"\n", 0, -1) + 1)
    if mark is None or zlib.crc32(mark[2], int(mark[4], 16)) != int(mark[1], 16):
        return None
    name = mark[3].decode()
    return State(name) if name in _STATES else None


def decode(data: bytes) -> Contents:
    """What a file says, all of it."""
    body = data.rstrip(b"\0")
    if not body:
        return Contents(lead=HEADER, checksum=zlib.crc32(HEADER))  # nothing was ever begun
    if body[:1] == b"{":
        return _decode_first(body)
    contents = Contents(checksum=zlib.crc32(HEADER))
    if not body.startswith(HEADER):
        contents.lead = HEADER
        if HEADER.startswith(body):
            contents.spare = len(body)
        else:
            _end_in(contents, body, "it begins like no journal of a version that is known here")
    else:
        contents.end = len(HEADER)
        _decode_second(contents, body)
    if contents.damage is None and not contents.closed and len(data) % STEP:
        contents.damage = Damage(
            len(data), "it is cut short: neither a closing mark ends it nor its reserve"
        )
    return contents


def _decode_second(contents: Contents, body: bytes) -> None:
    kinds: dict[str, bool] = {}
    while contents.end < len(body):
        numbers = _NUMBERS.match(body, contents.end)
        if numbers is None:
            break
        checksum, length = int(numbers[1], 16), int(numbers[2], 16)
        after = numbers.end() + length
        summed = body[numbers.start(2) : after]
        if body[after : after + 1] != b"\n" or zlib.crc32(summed, contents.checksum) != checksum:
            break
        record = json_object(body[numbers.end() : after])
        if record is not None and "closed" in record:
            contents.closed = True
            contents.spare = after + 1 - contents.end
            if after + 1 < len(body):
                contents.damage = Damage(after + 1, "something follows its closing mark")
            return
        try:
            contents.records.append(_checked(record, kinds))
        except _Unusable as error:
            contents.damage = Damage(contents.end, str(error))
            return
        contents.end, contents.checksum = after + 1, checksum
    _end_in(contents, body, "a record does not match its checksum")


def _decode_first(body: bytes) -> Contents:
    contents = Contents(version=1)
    kinds: dict[str, bool] = {}
    while contents.end < len(body):
        after = body.find(b"\n", contents.end)
        # A record that lacks nothing but the end of its line was always taken.
        text = body[contents.end : after if after >= 0 else len(body)]
        record = json_object(text)
        if record is None:
            break
        try:
            contents.records.append(_checked(record, kinds))
        except _Unusable as error:
            contents.damage = Damage(contents.end, str(error))
            return contents
        contents.end += len(text) + (after >= 0)
        contents.lead = b"" if after >= 0 else b"\n"
    _end_in(contents, body, "a line cannot be read")
    return contents


def _checked(record: Record | None, kinds: dict[str, bool]) -> Record:
    """A record of the shape that all have.

    Args:
        record: to be checked.
        kinds: of the facts so far: whether it is a list that grows; added to.
    """
    if record is None:
        raise _Unusable("a record is no JSON object")
    time, state, added = record.get("time"), record.get("state"), record.get("add", {})
    if isinstance(time, bool) or not isinstance(time, int | float) or not 0 <= time < _LATEST:
        raise _Unusable("a record has no time")
    if "state" in record and (not isinstance(state, str) or state not in _STATES):
        raise _Unusable(f"a record names the state {str(state)[:40]!r}, which there is not")
    if not isinstance(added, dict) or not all(isinstance(each, list) for each in added.values()):
        raise _Unusable("a record adds what is no list")
    named = [(name, False) for name in record if name not in ("time", "state", "add")]
    for name, grows in [*named, *((name, True) for name in added)]:
        if kinds.setdefault(name, grows) is not grows:
            raise _Unusable(f"{name[:40]!r} is a fact and a list")
    return record


# -- the end of a file -------------------------------------------------------------------------


def _end_in(contents: Contents, body: bytes, otherwise: str) -> None:
    """Judge what follows the last good record."""
    tail = body[contents.end :]
    reason = _damage(tail, contents.end, contents.version, otherwise)
    if reason:
        contents.damage = Damage(contents.end, reason)
        contents.later = list(_readable(tail))
    else:
        contents.spare = len(tail)


def _damage(tail: bytes, begin: int, version: int, otherwise: str) -> str:
    """Why `tail`, at the offset `begin`, is no record that its writer did not live to write.

    A writer's death leaves the beginning of a record. A host's death may leave sectors unwritten
    of all that was not waited for, which is more than one record where they are only notes.
    """
    if not tail:
        return ""
    if any(_tells(line, begin, version) for line in _GAP.sub(b"\n", tail).split(b"\n")[1:]):
        return f"{otherwise}, and others follow it"
    if _lacks_a_sector(tail, begin):
        return ""
    if b"\n" in tail:
        return otherwise
    if b"\0" in tail:
        return "something follows where nothing was written"
    if version == 1:
        return f"{otherwise} but for its end" if json_object(tail[:-1]) is not None else ""
    numbers = _NUMBERS.match(tail)
    # What it lacks of a whole one is missing; what is there instead was not.
    more = numbers is not None and len(tail) > _NUMBERS_BYTES + int(numbers[2], 16)
    return otherwise if more else ""


def _tells(line: bytes, begin: int, version: int) -> bool:
    """Whether a line beyond `begin` says that what is there had reached the disk."""
    numbers = _NUMBERS.match(line)
    if numbers is not None:
        return int(numbers[3], 16) > begin
    return (version == 1 or begin == 0) and next(_readable(b"\n" + line), None) is not None


def _lacks_a_sector(tail: bytes, begin: int) -> bool:
    for gap in _GAP.finditer(tail):
        starts = gap.start() == 0 or (begin + gap.start()) % _SECTOR == 0
        if starts and (begin + gap.end()) % _SECTOR == 0:
            return True
    return False


def _readable(tail: bytes) -> Iterator[Record]:
    """The records after the first line of `tail`, of either version, each by itself."""
    for line in _GAP.sub(b"\n", tail).split(b"\n")[1:]:
        numbers = _NUMBERS.match(line)
        record = json_object(line[numbers.end() :] if numbers else line)
        try:
            yield _checked(record, {})
        except _Unusable:
            continue
