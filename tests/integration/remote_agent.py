"""An agent that may be killed: remote_agent.py PLACE FD, a channel of pages on a descriptor."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

from phaul_runtime.postcopy.receiver import Receiver
from phaul_runtime.postcopy.store import PageStore

if __name__ == "__main__":
    place = Path(sys.argv[1])
    arrival = Receiver(PageStore.open(place), place)
    sys.exit(0 if arrival.serve(socket.socket(fileno=int(sys.argv[2]))) else 1)
