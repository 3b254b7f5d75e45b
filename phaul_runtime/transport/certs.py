"""Certificates for a first fleet: a CA, and one certificate a host for both roles.

An operator with a CA needs none of this: any certificate does that the CA signed for
serverAuth and clientAuth and that names its host.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phaul_runtime.errors import Refused, UsageError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

CA_CERT, CA_KEY = "ca.pem", "ca.key"
HOST_CERT, HOST_KEY = "host.pem", "host.key"
CA_DAYS, HOST_DAYS = 3650, 825
# Clocks of a fleet may differ.
_EARLIER = timedelta(hours=1)
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_DNS_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_NAME_LENGTH = 64


@dataclass(frozen=True)
class Host:
    """A host: the directory of its files has its first name; all are in its certificate."""

    names: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Host:
        """`b` or `b,b.example.org,10.0.0.2`.

        Raises:
            UsageError: one is neither a DNS name nor an IP address.
        """
        names = tuple(part.strip() for part in text.split(","))
        for name in names:
            if _address(name) is None and not (
                _DNS_NAME.fullmatch(name) and len(name) <= _NAME_LENGTH
            ):
                raise UsageError(f"{name!r} is neither a DNS name nor an IP address")
        return cls(names)


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def make_fleet(
    directory: Path, hosts: Sequence[Host], *, days: int = HOST_DAYS, ca_days: int = CA_DAYS
) -> list[Path]:
    """Make a CA in `directory`, and for each host a directory in it with all that the host needs.

    Args:
        directory: made if it is not there, mode 0700.
        hosts: of the fleet.
        days: for which the hosts' certificates are valid.
        ca_days: for which the CA's is.

    Returns:
        The hosts' directories: `ca.pem`, `host.pem`, `host.key` in each.

    Raises:
        Refused: a file is there already; nothing is overwritten, nothing was made.
    """
    _refuse_existing([directory / CA_CERT, directory / CA_KEY], directory, hosts)
    key = _new_key()
    cert = _certify_ca(key, ca_days)
    _make_directory(directory)
    _write(directory / CA_KEY, _pem_key(key), 0o600)
    _write(directory / CA_CERT, _pem(cert), 0o644)
    return [_make_host(directory, host, cert, key, days) for host in hosts]


def add_hosts(directory: Path, hosts: Sequence[Host], *, days: int = HOST_DAYS) -> list[Path]:
    """Hosts that join later, by the CA that `make_fleet` has made in `directory`.

    Raises:
        Refused: there is no CA, or a host's files are there already.
    """
    from cryptography import x509  # noqa: PLC0415 - loaded by those commands only
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415

    _refuse_existing([], directory, hosts)
    try:
        cert = x509.load_pem_x509_certificate((directory / CA_CERT).read_bytes())
        key: Any = serialization.load_pem_private_key((directory / CA_KEY).read_bytes(), None)
    except OSError as error:
        raise Refused(
            f"cannot read {error.filename}: {error.strerror}",
            hint="phaul-runtime cert init makes a CA",
        ) from error
    except (ValueError, TypeError) as error:
        raise Refused(f"the CA in {directory} cannot be read: {error}") from error
    return [_make_host(directory, host, cert, key, days) for host in hosts]


def _refuse_existing(files: Sequence[Path], directory: Path, hosts: Sequence[Host]) -> None:
    names = [host.names[0] for host in hosts]
    if len(set(names)) < len(names):
        raise UsageError("a host is named twice")
    for path in (*files, *(directory / name for name in names)):
        if path.exists():
            raise Refused(
                f"{path} is there already; nothing is overwritten",
                hint="another directory, or phaul-runtime cert add for further hosts",
            )


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"cannot create {path}: {error.strerror}") from error


def _write(path: Path, data: bytes, mode: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        with os.fdopen(os.open(path, flags, mode), "wb") as file:
            file.write(data)
    except OSError as error:
        raise Refused(f"cannot write {path}: {error.strerror}") from error


def _make_host(
    directory: Path,
    host: Host,
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    days: int,
) -> Path:
    place = directory / host.names[0]
    key = _new_key()
    cert = _certify_host(host, key, ca, ca_key, days)
    _make_directory(place)
    _write(place / CA_CERT, _pem(ca), 0o644)
    _write(place / HOST_CERT, _pem(cert), 0o644)
    _write(place / HOST_KEY, _pem_key(key), 0o600)
    return place


def _new_key() -> ec.EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415

    return ec.generate_private_key(ec.SECP256R1())


def _pem(cert: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding  # noqa: PLC0415

    return cert.public_bytes(Encoding.PEM)


def _pem_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415

    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _builder(name: x509.Name, issuer: x509.Name, key: Any, days: int) -> x509.CertificateBuilder:
    from cryptography import x509  # noqa: PLC0415

    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _common_name(text: str) -> x509.Name:
    from cryptography import x509  # noqa: PLC0415
    from cryptography.x509.oid import NameOID  # noqa: PLC0415

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _certify_ca(key: ec.EllipticCurvePrivateKey, days: int) -> x509.Certificate:
    from cryptography import x509  # noqa: PLC0415
    from cryptography.hazmat.primitives import hashes  # noqa: PLC0415

    name = _common_name("phaul-runtime CA")
    builder = _builder(name, name, key.public_key(), days)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage("key_cert_sign", "crl_sign"), critical=True)
    return builder.sign(key, hashes.SHA256())


def _certify_host(
    host: Host,
    key: ec.EllipticCurvePrivateKey,
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    days: int,
) -> x509.Certificate:
    from cryptography import x509  # noqa: PLC0415
    from cryptography.hazmat.primitives import hashes  # noqa: PLC0415
    from cryptography.x509.oid import ExtendedKeyUsageOID  # noqa: PLC0415

    names: list[x509.GeneralName] = []
    for name in host.names:
        address = _address(name)
        names.append(x509.DNSName(name) if address is None else x509.IPAddress(address))
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    both = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    builder = _builder(_common_name(host.names[0]), ca.subject, key.public_key(), days)
    extensions: list[tuple[x509.ExtensionType, bool]] = [
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_usage("digital_signature"), True),
        (both, False),
        (x509.SubjectAlternativeName(names), False),
        (issuer, False),
    ]
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical=critical)
    return builder.sign(ca_key, hashes.SHA256())


_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


def _usage(*chosen: str) -> x509.KeyUsage:
    from cryptography import x509  # noqa: PLC0415

    make: Callable[..., x509.KeyUsage] = x509.KeyUsage
    return make(**{name: name in chosen for name in _USAGES})
