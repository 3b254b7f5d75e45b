"""Gives a lazily restored process its pages: the other end of `criu restore --lazy-pages`.

In place of `criu lazy-pages`, whose death leaves the restored process running on zeros without an
error. Here two processes hold what the pages hang on, and either goes on without the other: see
`serve` for the loop, `twin` for the pair, `journal` for what the one leaves to the other.

::

    client   how an agent starts it, hands over the plan, asks and waits
    serve    the loop: faults, events, filling in between
    criusock what CRIU says on lazy-pages.socket
    control  what an agent says on pager.socket
    twin     two processes with one table of descriptors
    journal  what was read and done since the other was born, in shared memory
    source   the plan's files, mapped
    space    which pages of a process are missing yet
    tasks    the processes, and what becomes of each page that one of them misses
    account  in numbers, and in words where something went wrong
    verify   before the tree runs: whether all that is planned can be served
    uffd     the kernel's userfaultfd
    remote   pages that are not on this host yet, and faults that wait for them
"""

import struct

LAZY_SOCKET = "lazy-pages.socket"
CONTROL_SOCKET = "pager.socket"
RESULT_FILE = "pager.json"
WANTS_SOCKET = "wants.socket"
ARRIVED_SOCKET = "arrived.socket"
WANTED = struct.Struct("=QQ")
"""In a datagram to `WANTS_SOCKET`, as often as there are wants: first page, pages."""
