"""Certificates for tests of tls://, and what goes over the wire seen from the middle."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from unittest import mock

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from phaul_runtime.config.model import AgentConfig, TransportConfig
from phaul_runtime.transport import certs
from phaul_runtime.transport.certs import Host, add_hosts, make_fleet

SERVER_ONLY = ExtendedKeyUsageOID.SERVER_AUTH
CLIENT_ONLY = ExtendedKeyUsageOID.CLIENT_AUTH


class Fleet:
    """A CA with its hosts `here` and `there`, whose certificates are good for 127.0.0.1."""

    def __init__(self, root: Path) -> None:
        self.root = root
        make_fleet(root, [Host.parse(f"{name},127.0.0.1") for name in ("here", "there")])

    def expired(self, name: str) -> dict[str, str]:
        """One of the same CA whose time is over."""
        with mock.patch.object(certs, "_EARLIER", timedelta(days=30)):
            return self._add(f"{name},127.0.0.1", days=-1)

    def at(self, name: str, address: str) -> dict[str, str]:
        """One of the same CA with another address."""
        return self._add(f"{name},{address}")

    def only(self, name: str, usage: x509.ObjectIdentifier) -> dict[str, str]:
        """One of the same CA for one role."""
        extension = x509.ExtendedKeyUsage([usage])
        with mock.patch.object(x509, "ExtendedKeyUsage", return_value=extension):
            return self._add(f"{name},127.0.0.1")

    def _add(self, host: str, days: int = 10) -> dict[str, str]:
        name = host.partition(",")[0]
        if not (self.root / name).exists():
            add_hosts(self.root, [Host.parse(host)], days=days)
        return self.files(name)

    def files(self, host: str) -> dict[str, str]:
        place = self.root / host
        return {
            "ca": str(place / "ca.pem"),
            "cert": str(place / "host.pem"),
            "key": str(place / "host.key"),
        }

    def pair(self, host: str) -> dict[str, str]:
        """A certificate and its key, for somebody with another CA."""
        return {name: path for name, path in self.files(host).items() if name != "ca"}

    def here(self, **changes: str) -> TransportConfig:
        return TransportConfig.model_validate({**self.files("here"), **changes})

    def there(self, **changes: str) -> AgentConfig:
        listen = {"listen": "tls://127.0.0.1:0"}
        return AgentConfig.model_validate({**listen, **self.files("there"), **changes})


class Tap:
    """A port that leads to another one of this host; remembers all that passes, both ways."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.seen = bytearray()
        self._ends: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                one, _ = self._listener.accept()
            except OSError:
                return
            other = socket.create_connection(("127.0.0.1", self._to))
            self._ends += (one, other)
            for ends in ((one, other), (other, one)):
                threading.Thread(target=self._pour, args=ends, daemon=True).start()

    def _pour(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self.seen += data
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        """End all connections as if their hosts did."""
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.cut()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@contextlib.contextmanager
def tapped(port: int) -> Iterator[Tap]:
    tap = Tap(port)
    try:
        yield tap
    finally:
        tap.close()
