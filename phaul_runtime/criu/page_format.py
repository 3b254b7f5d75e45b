"""How CRIU says how many pages a run has: to a page server, and in its page maps.

The one place that tells CRIU's versions apart in this. Neither the protocol nor a page map says of
which version it is, so a wrong guess would be seen by nobody: what is not listed is not known.
"""

from __future__ import annotations

import enum
import struct


class PageFormat(enum.IntEnum):
    """A page-server protocol and the page maps that belong to it; the numbers go between hosts."""

    NARROW = 1
    """CRIU 4.1: 32 bits."""
    WIDE = 2
    """CRIU 4.2: 64 bits. It reads narrow page maps as well; CRIU 4.1 reads a wide one as empty."""

    @classmethod
    def of_version(cls, major: int, minor: int) -> PageFormat | None:
        """What a CRIU sends and writes; None if it is not known."""
        return _OF_VERSION.get((major, minor))

    @classmethod
    def of_number(cls, number: int) -> PageFormat | None:
        """What another host named by its number; None for any other number."""
        return cls(number) if number in set(cls) else None

    @property
    def header(self) -> struct.Struct:
        """Of a page server's commands: command, pages, address, where to (criu/page-xfer.c)."""
        return _HEADERS[self]


_OF_VERSION = {(4, 1): PageFormat.NARROW, (4, 2): PageFormat.WIDE}
_HEADERS = {PageFormat.NARROW: struct.Struct("<IIQQ"), PageFormat.WIDE: struct.Struct("<I4xQQQ")}

OTHER_RECEIVER = (
    "install a CRIU that is known, or the same version on both hosts with criu.page_server: criu"
)


def unknown_format(version: object) -> str:
    """What is wrong with a CRIU whose format is not known."""
    known = " and ".join(f"{major}.{minor}" for major, minor in _OF_VERSION)
    return f"the page format of CRIU {version} is not known here, only those of {known}"
