"""Hears a victim from outside of both hosts."""

from __future__ import annotations

import itertools
import socket
import threading
import time

from phaul_lab import Lab


class Observer:
    """Hears every tick of a victim that was started with `--udp` and this address."""

    def __init__(self, lab: Lab) -> None:
        self._socket = lab.outside_socket(socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self._socket.settimeout(0.2)
        self.address = f"{lab.outside}:{self._socket.getsockname()[1]}"
        self.heard: list[tuple[float, int, str]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while not self._done.is_set():
            try:
                tick, _time, host = self._socket.recv(200).decode().split()
            except TimeoutError:
                continue
            self.heard.append((time.monotonic(), int(tick), host))

    def close(self) -> None:
        """Listen no more."""
        self._done.set()
        self._thread.join()
        self._socket.close()

    def freeze_ms(self, source: str, destination: str) -> float:
        """From the last tick on one host to the first on the other."""
        last = max(at for at, _, host in self.heard if host == source)
        return (min(at for at, _, host in self.heard if host == destination) - last) * 1000

    def pause_ms(self, since: float, until: float) -> float:
        """The longest silence in that time that is not the change of hosts."""
        gaps = [
            after - before
            for (before, _, one), (after, _, other) in itertools.pairwise(self.heard)
            if one == other and after >= since and before <= until
        ]
        return max(gaps, default=0.0) * 1000

    def complaints(self) -> list[str]:
        """What two copies would sound like: a tick told twice, or two hosts in turns."""
        found = []
        for (_, before, _), (_, after, host) in itertools.pairwise(self.heard):
            if after <= before:
                found.append(f"tick {after} from {host} after tick {before}")
        switches = [
            f"{a} > {b}" for (_, _, a), (_, _, b) in itertools.pairwise(self.heard) if a != b
        ]
        if len(switches) > 1:
            found.append(f"the victim spoke from both hosts in turns: {switches}")
        return found[:3]
