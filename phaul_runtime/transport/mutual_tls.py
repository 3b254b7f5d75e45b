"""Mutual TLS 1.3 by Python's ssl: both sides show a certificate of the CA, or nothing follows.

The client verifies the server's name as well. Contexts are made anew for each connection, so that a
renewed certificate counts at once. Nothing is resumed: each connection proves itself.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
from dataclasses import dataclass

from phaul_runtime.errors import ChannelError, Refused
from phaul_runtime.transport.handshake import SPEAKS_TLS, Deadline, NoAnswer, dismiss

# What OpenSSL's reasons mean to the reader of the error; `{who}` is the other side.
_REASONS = {
    "WRONG_VERSION_NUMBER": "{who} speaks no TLS",
    "HTTP_REQUEST": "{who} speaks no TLS",
    "RECORD_LAYER_FAILURE": "{who} speaks no TLS",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "{who} showed no certificate",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "{who} wants a certificate, and there is none here",
    "TLSV1_ALERT_UNKNOWN_CA": "{who} does not know the CA of this host's certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "{who} says that this host's certificate has expired",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "{who}: this host's certificate is not for that",
    "SSLV3_ALERT_BAD_CERTIFICATE": "{who} does not take this host's certificate",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "{who} does not take this host's certificate",
    "TLSV1_ALERT_DECRYPT_ERROR": "{who} does not take this host's certificate",
    "TLSV1_ALERT_PROTOCOL_VERSION": "{who} does not speak TLS 1.3",
    "UNSUPPORTED_PROTOCOL": "{who} does not speak TLS 1.3",
}
_PLAIN = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE")
# X509_V_ERR_*: not yet valid, expired, unknown issuer (four ways), not for that, name, address.
_VERIFICATIONS = {
    9: "the certificate of {who} is not valid yet: are both clocks right?",
    10: "the certificate of {who} has expired",
    18: "the certificate of {who} is not of this CA",
    19: "the certificate of {who} is not of this CA",
    20: "the certificate of {who} is not of this CA",
    21: "the certificate of {who} is not of this CA",
    26: "the certificate of {who} is not for that",
    62: "the certificate of {who} has another name",
    64: "the certificate of {who} has another address",
}


@dataclass(frozen=True)
class Credentials:
    """Where a host's certificates lie, PEM.

    Args:
        ca: certificates of the CA that signs those of the fleet.
        cert: this host's, with those between it and the CA.
        key: its private key.
    """

    ca: str
    cert: str
    key: str

    def load(self, protocol: int) -> ssl.SSLContext:
        """A context that demands a certificate of the other side.

        Args:
            protocol: `ssl.PROTOCOL_TLS_CLIENT` or `ssl.PROTOCOL_TLS_SERVER`.

        Raises:
            Refused: a file is missing or is no such thing; the message names it.
        """
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        if protocol == ssl.PROTOCOL_TLS_SERVER:
            context.num_tickets = 0
        for path in (self.ca, self.cert, self.key):
            try:
                mode = os.stat(path).st_mode
            except OSError as error:
                raise Refused(
                    f"cannot read {path}: {error.strerror}",
                    hint="phaul-runtime cert init makes certificates; docs/transports.md",
                ) from error
            if path == self.key and mode & 0o007:
                raise Refused(f"{path} is open to others", hint=f"chmod 0600 {path}")
        try:
            context.load_verify_locations(self.ca)
        except OSError as error:
            raise Refused(f"{self.ca} is no certificate of a CA: {_said(error)}") from error
        try:
            # A key with a passphrase would ask for it on the terminal.
            context.load_cert_chain(self.cert, self.key, password=_no_passphrase)
        except OSError as error:
            raise Refused(
                f"{self.cert} and {self.key} are not a certificate and its key: {_said(error)}"
            ) from error
        return context


def _no_passphrase() -> str:
    raise Refused("the private key has a passphrase", hint="phaul-runtime needs one without")


def as_client(
    credentials: Credentials, channel: socket.socket, host: str, deadline: Deadline
) -> ssl.SSLSocket:
    """Authenticate both ends of a connection that this side opened; takes the socket over.

    With TLS 1.3 the other side's verdict on this side's certificate comes later, with the first
    answer.

    Raises:
        ChannelError: the other side is not the host of that name, or speaks no TLS.
        Refused: this host has no certificates.
        OSError: the connection broke.
    """
    context = credentials.load(ssl.PROTOCOL_TLS_CLIENT)
    return _handshake(context, channel, deadline, host)


def as_server(
    credentials: Credentials, channel: socket.socket, deadline: Deadline
) -> ssl.SSLSocket:
    """The same for a connection that was accepted, whose client has to show a certificate."""
    return _handshake(credentials.load(ssl.PROTOCOL_TLS_SERVER), channel, deadline, None)


def _handshake(
    context: ssl.SSLContext, channel: socket.socket, deadline: Deadline, host: str | None
) -> ssl.SSLSocket:
    secured = context.wrap_socket(
        channel,
        server_side=host is None,
        server_hostname=host,
        do_handshake_on_connect=False,
        suppress_ragged_eofs=False,
    )
    try:
        deadline.limit(secured)
        secured.do_handshake()
    except OSError as error:
        if host is None and getattr(error, "reason", "") in _PLAIN:
            # OpenSSL tells such a client nothing.
            with contextlib.suppress(OSError):
                socket.socket.send(secured, SPEAKS_TLS)
        # What says why has to arrive.
        dismiss(secured)
        if isinstance(error, ssl.SSLError):
            who = "the client" if host is None else f"the agent at {host}"
            kind = NoAnswer if isinstance(error, ssl.SSLEOFError) else ChannelError
            raise kind(explain(error, who)) from error
        raise
    return secured


def explain(error: ssl.SSLError, who: str) -> str:
    """One line on a failed handshake, or on an alert in place of an answer."""
    if isinstance(error, ssl.SSLCertVerificationError):
        text = _VERIFICATIONS.get(error.verify_code)
        return text.format(who=who) if text else f"{who}: {error.verify_message}"
    if isinstance(error, ssl.SSLEOFError):
        return f"{who} closed the connection within the handshake"
    text = _REASONS.get(error.reason or "")
    return text.format(who=who) if text else f"TLS with {who} failed: {_said(error)}"


def _said(error: OSError) -> str:
    reason = getattr(error, "reason", None)
    return str(reason or error.strerror or error)
