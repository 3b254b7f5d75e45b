"""`phaul-runtime cert`: what it makes, and what it leaves alone."""

from __future__ import annotations

import ipaddress
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from phaul_runtime.cli.main import cli
from phaul_runtime.errors import Refused, UsageError
from phaul_runtime.transport.certs import Host


def cert(*argv: str) -> Result:
    return CliRunner().invoke(cli, ["cert", *argv])


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    root = tmp_path / "fleet"
    done = cert("init", str(root), "--host", "a", "--host", "b,b.example.org,10.0.0.2,fd00::2")
    assert done.exit_code == 0, done.output
    assert [line.partition(":")[0] for line in done.output.splitlines()] == [
        f"{root}/a/",
        f"{root}/b/",
    ]
    return root


def test_what_each_host_gets(fleet: Path) -> None:
    assert {str(path.relative_to(fleet)) for path in fleet.rglob("*.*")} == {
        "ca.pem", "ca.key", *(f"{h}/{f}" for h in "ab" for f in ("ca.pem", "host.pem", "host.key")),
    }  # fmt: skip
    for path in fleet.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600 if path.suffix == ".key" else 0o644)
    assert stat.S_IMODE(fleet.stat().st_mode) == 0o700
    assert (fleet / "a/ca.pem").read_bytes() == (fleet / "ca.pem").read_bytes()


def test_what_the_certificates_say(fleet: Path) -> None:
    ca, host = load(fleet / "ca.pem"), load(fleet / "b/host.pem")
    host.verify_directly_issued_by(ca)
    names = host.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["b", "b.example.org"]
    assert names.get_values_for_type(x509.IPAddress) == [
        ipaddress.ip_address("10.0.0.2"),
        ipaddress.ip_address("fd00::2"),
    ]
    usage = host.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usage) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert not host.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    basic = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (basic.critical, basic.value.ca, basic.value.path_length) == (True, True, 0)
    now = datetime.now(UTC)
    for found, days in ((ca, 3650), (host, 825)):
        assert found.not_valid_before_utc < now - timedelta(minutes=30)
        left = found.not_valid_after_utc - now
        assert timedelta(days=days - 1) < left <= timedelta(days=days)
    key = load_pem_private_key((fleet / "b/host.key").read_bytes(), None)
    assert key.public_key() == host.public_key()
    # Every host has a key of its own.
    keys = {(path).read_bytes() for path in fleet.rglob("*.key")}
    assert len(keys) == 3


def test_nothing_is_overwritten(fleet: Path) -> None:
    before = {path: path.read_bytes() for path in fleet.rglob("*.*")}
    for argv in (["init", "--host", "c"], ["add", "--host", "c", "--host", "a"]):
        done = cert(argv[0], str(fleet), *argv[1:])
        assert isinstance(done.exception, Refused)
        assert "is there already; nothing is overwritten" in done.exception.message
    assert {path: path.read_bytes() for path in fleet.rglob("*.*")} == before


def test_hosts_that_join_later_have_the_same_ca(fleet: Path) -> None:
    done = cert("add", str(fleet), "--host", "c", "--days", "3")
    assert done.exit_code == 0, done.output
    host = load(fleet / "c/host.pem")
    host.verify_directly_issued_by(load(fleet / "ca.pem"))
    assert host.not_valid_after_utc - datetime.now(UTC) <= timedelta(days=3)


def test_where_there_is_no_ca(fleet: Path, tmp_path: Path) -> None:
    done = cert("add", str(tmp_path / "none"), "--host", "c")
    assert isinstance(done.exception, Refused)
    assert "ca.pem: No such file" in str(done.exception)
    (fleet / "ca.key").write_text("nonsense")
    done = cert("add", str(fleet), "--host", "c")
    assert isinstance(done.exception, Refused)
    assert "cannot be read" in str(done.exception)
    (tmp_path / "file").write_text("")
    done = cert("init", str(tmp_path / "file" / "fleet"), "--host", "c")
    assert isinstance(done.exception, Refused)


@pytest.mark.parametrize("name", ["", "a/b", "..", "-a", "a b", "x" * 65, "a,", "a,../b", "ü"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(UsageError, match="neither a DNS name nor an IP address"):
        Host.parse(name)


def test_a_host_twice_and_none_at_all(tmp_path: Path) -> None:
    done = cert("init", str(tmp_path / "f"), "--host", "a", "--host", "a,b")
    assert isinstance(done.exception, UsageError)
    assert cert("init", str(tmp_path / "f")).exit_code == 2
    assert not (tmp_path / "f").exists()
