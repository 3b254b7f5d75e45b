"""What stands for ssh to the hosts of fakehosts.py: options, then --, a host, and a command.

It is started for each attempt: only what every interpreter has in it is imported.
"""

import os
import sys
import time


def ssh(argv: list[str]) -> None:
    """As ssh does it: one string for a shell there."""
    host, command = argv[argv.index("--") + 1 :]
    if not os.path.isdir(f"{os.environ['FAKE_HOSTS']}/{host}"):  # noqa: PTH112
        print(f"ssh: connect to host {host}: No route to host", file=sys.stderr)
        sys.exit(255)
    os.environ["FAKE_HOST"] = host
    lost = float(os.environ.get("FAKE_LOST", "0"))
    if int.from_bytes(os.urandom(4), "big") < lost * (1 << 32):
        # The connection breaks in the middle: the command there goes on without it.
        if os.fork() == 0:
            null = os.open(os.devnull, os.O_RDWR)
            for number in (0, 1, 2):
                os.dup2(null, number)
            os.execv("/bin/sh", ["sh", "-c", command])
        time.sleep(float(os.environ.get("FAKE_SECONDS", "0.3")) / 2)
        print("client_loop: send disconnect: Broken pipe", file=sys.stderr)
        sys.exit(255)
    os.execv("/bin/sh", ["sh", "-c", command])


if __name__ == "__main__":
    ssh(sys.argv[1:])
