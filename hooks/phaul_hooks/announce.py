"""`phaul-announce`: a lifecycle hook that tells the neighbours where an address is now.

Gratuitous ARP for IPv4 (RFC 5227, section 3), an unsolicited neighbour advertisement for IPv6
(RFC 4861, section 7.2.6), from the host whose copy runs. It adds no address and sets no route: that
is `phaul-move-address`, which announces by itself.
"""

from __future__ import annotations

import argparse
import socket
import struct
import sys
import time
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address

from phaul_hooks.program import end, step
from phaul_runtime.errors import MigrationFailed, UsageError

_AT = {("committed", "destination"), ("on_rollback", "source")}
_ARP = b"\x08\x06"
_IPV6 = b"\x86\xdd"
_BROADCAST = b"\xff" * 6
_ALL_NODES = IPv6Address("ff02::1").packed
_ALL_NODES_MAC = b"\x33\x33\x00\x00\x00\x01"
_ICMPV6 = 58
_ADVERTISEMENT = 136
_OVERRIDE = 0x20000000
_PAUSE_S = 0.2


def frames(address: IPv4Address | IPv6Address, mac: bytes) -> list[bytes]:
    """The Ethernet frames of one announcement of `address` at the interface with `mac`."""
    if isinstance(address, IPv6Address):
        return [_ALL_NODES_MAC + mac + _IPV6 + _advertisement(address.packed, mac)]
    ip = address.packed
    found = []
    # As a request, and as a reply too, which some neighbours want.
    for operation, target in ((1, bytes(6)), (2, _BROADCAST)):
        arp = struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation) + mac + ip + target + ip
        found.append(_BROADCAST + mac + _ARP + arp)
    return found


def _advertisement(address: bytes, mac: bytes) -> bytes:
    # Its one option is the target's link-layer address: type 2, one unit of 8 bytes.
    body = struct.pack("!BBHI", _ADVERTISEMENT, 0, 0, _OVERRIDE) + address + b"\x02\x01" + mac
    pseudo = address + _ALL_NODES + struct.pack("!II", len(body), _ICMPV6)
    checksum = _checksum(pseudo + body)
    body = body[:2] + struct.pack("!H", checksum) + body[4:]
    # Hop limit 255: it did not come through a router.
    head = struct.pack("!IHBB", 6 << 28, len(body), _ICMPV6, 255)
    return head + address + _ALL_NODES + body


def _checksum(data: bytes) -> int:
    """The Internet checksum; `data` has an even length."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def announce(addresses: Sequence[IPv4Address | IPv6Address], device: str, count: int) -> None:
    """Send each announcement `count` times.

    Raises:
        MigrationFailed: the interface is not there, or nothing may be sent on it.
    """
    try:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
            raw.bind((device, 0))
            mac = raw.getsockname()[4]
            for number in range(count):
                if number:
                    time.sleep(_PAUSE_S)
                for address in addresses:
                    for frame in frames(address, mac):
                        raw.send(frame)
    except OSError as error:
        raise MigrationFailed(f"cannot announce on {device}: {error.strerror}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="phaul-announce",
        description="A lifecycle hook of phaul-runtime: tell the neighbours that an address is at "
        "this host, once its owner runs here (gratuitous ARP, unsolicited advertisement).",
    )
    parser.add_argument("device", metavar="DEVICE", help="the interface, as eth0")
    parser.add_argument("addresses", nargs="+", metavar="ADDRESS", help="of IPv4 or IPv6")
    parser.add_argument("--count", type=int, default=3, metavar="N", help="how often (default: 3)")
    parser.add_argument("--now", action="store_true", help="announce, whatever the event is")
    return parser


def run(argv: Sequence[str]) -> None:
    """The hook.

    Raises:
        PhaulError: it could not be announced.
    """
    given = _parser().parse_args(argv)
    try:
        addresses = [ip_address(text) for text in given.addresses]
    except ValueError as error:
        raise UsageError(str(error)) from error
    if given.now or step() in _AT:
        announce(addresses, given.device, given.count)


def main() -> None:
    """Run the command and end with its exit code."""
    sys.exit(end(lambda: run(sys.argv[1:]), "phaul-announce"))
