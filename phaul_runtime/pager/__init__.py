"""Gives a lazily restored process its pages: the other end of `criu restore --lazy-pages`.

In place of `criu lazy-pages`, whose death leaves the restored process running on zeros without an
error. Here two processes hold what the pages hang on, and either goes on without the other.

The pager is a program of its own that imports memory and below; `client` is how an agent starts it,
hands over the plan, asks and waits, and is all that the rest of the core imports. Read `loop`
first, then `filling`.

::

    loop           the two processes: what is awaited, and what the one does at the other's death
    filling        faults, events, filling in between
    criu_socket    what CRIU says on lazy-pages.socket
    control        what an agent says on pager.socket
    fork_twin      two processes with one table of descriptors
    shared_log     what was read and done since the other was born, in shared memory
    plan_files     the plan's files, mapped
    missing_ranges which pages of a process are missing yet
    task           the processes, and what becomes of each page that one of them misses
    account        in numbers, and in words where something went wrong
    verify         before the tree runs: whether all that is planned can be served
    smaps          the areas of a process, as the kernel tells them
    uffd           the kernel's userfaultfd
    network_pages  pages that are not on this host yet, and faults that wait for them
"""

import struct

LAZY_SOCKET = "lazy-pages.socket"
CONTROL_SOCKET = "pager.socket"
RESULT_FILE = "pager.json"
WANTS_SOCKET = "wants.socket"
ARRIVED_SOCKET = "arrived.socket"
WANTED = struct.Struct("=QQ")
"""In a datagram to `WANTS_SOCKET`, as often as there are wants: first page, pages."""
