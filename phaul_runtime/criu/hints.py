"""What to do about CRIU's own errors: those that its users meet most, an advice for each."""

from __future__ import annotations

import re
from collections.abc import Iterable

# The first that matches any line wins.
_ADVICE = (
    (
        r"Can't fork for \d+: File exists",
        "the pid is taken at the destination: end that process, or run the target in a pid "
        "namespace of its own",
    ),
    (
        r"has bad (size|mode|build-ID)|bad build-ID",
        "that file differs at the destination: --files copy carries it",
    ),
    (
        r"Can't open file .*: No such file|Can't open .* on restore",
        "that file is missing at the destination: --files copy carries it",
    ),
    (
        r"--tcp-established|[Cc]onnected TCP",
        "--tcp-established carries TCP connections, if their address moves too",
    ),
    (
        r"--shell-job|dangling tty|session leader",
        "start the target with setsid and without a terminal, or set engines.process.shell_job",
    ),
    (r"[Gg]host file.*(limit|too big)", "raise engines.process.ghost_limit_mib"),
    (r"[Ff]ile lock", "set engines.process.file_locks: true"),
    (
        r"ext-unix-sk|[Ee]xternal (socket|unix)|half of stream unix",
        "a unix socket leads out of the tree: move both ends, or close it",
    ),
    (
        r"unreachable sharing|[Cc]an't lookup mount",
        "the target has mounts of its own: use the engine of its container",
    ),
    (
        # CRIU 4.2 lists guard regions behind all areas.
        r"VMA-s are not sorted",
        "the target has guard regions (threads of glibc 2.42 and later have them), which CRIU "
        "knows from 4.2 on: install CRIU 4.2 there",
    ),
    (r"No space left on device", "free some space in the working directory there"),
    (r"Cannot allocate memory", "free some memory there"),
    (
        r"Broken pipe|Connection reset|[Pp]age server.*(closed|answer)",
        "the memory channel broke: look at the network and at the destination's log",
    ),
)


def advice(lines: Iterable[str]) -> str:
    """What to do about the error lines of a CRIU log; empty if nothing is known."""
    text = "\n".join(lines)
    for pattern, hint in _ADVICE:
        if re.search(pattern, text):
            return hint
    return ""
