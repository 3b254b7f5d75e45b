"""`phaul-webhook`: a lifecycle hook that posts what it was told to a URL.

The body is the JSON object of stdin, as it came. With a secret its HMAC-SHA256 goes along, as
`X-Phaul-Signature: sha256=<hex>`. What was sent is sent again while nobody answers, or the answer
is a server's failure (5xx) or 429; `X-Phaul-Delivery` is the same then.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from phaul_hooks.program import end
from phaul_runtime import __version__
from phaul_runtime.boundedjson import read_json
from phaul_runtime.errors import MigrationFailed, UsageError

SIGNATURE = "X-Phaul-Signature"
DELIVERY = "X-Phaul-Delivery"
_TOO_MANY = 429
_SERVERS_FAULT = 500
_WORDS = 200
_PAUSE_S = 0.5


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would become a GET without a body: it is a failure."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def signature(secret: bytes, body: bytes) -> str:
    """The value of the signature's header."""
    return f"sha256={hmac.new(secret, body, hashlib.sha256).hexdigest()}"


def post(
    url: str, body: bytes, headers: Mapping[str, str], *, timeout_s: float, retries: int
) -> None:
    """Post until it is taken.

    Args:
        url: of http or https.
        body: of the request.
        headers: beside those that urllib sets.
        timeout_s: longest wait for the server, for each try.
        retries: further tries after the first; the pause before them doubles each time.

    Raises:
        MigrationFailed: the last try failed, or one that no other could mend.
    """
    opener = urllib.request.build_opener(_NoRedirect)
    request = urllib.request.Request(url, body, dict(headers), method="POST")  # noqa: S310 - checked
    for number in range(retries + 1):
        if number:
            time.sleep(_PAUSE_S * 2 ** (number - 1))
        last = number == retries
        try:
            with opener.open(request, timeout=timeout_s):
                return
        except urllib.error.HTTPError as error:
            with error:
                if last or (error.code < _SERVERS_FAULT and error.code != _TOO_MANY):
                    raise MigrationFailed(
                        f"{url}: {error.code} {error.reason}", log=_words(error)
                    ) from error
        except (OSError, http.client.HTTPException) as error:
            if last:
                reason = getattr(error, "reason", None) or error
                raise MigrationFailed(f"{url}: {reason}") from error


def _words(error: urllib.error.HTTPError) -> list[str]:
    try:
        return error.read(_WORDS).decode(errors="replace").strip().splitlines()
    except (OSError, http.client.HTTPException):
        return []


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not (colon and name.strip()):
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME: VALUE")
    return name.strip(), value.strip()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="phaul-webhook",
        description="A lifecycle hook of phaul-runtime: post what it is told, JSON, to a URL.",
    )
    parser.add_argument("url", metavar="URL", help="of http or https")
    parser.add_argument(
        "--timeout",
        type=float,
        default=5.0,
        metavar="S",
        help="longest wait for the server, each try (default: 5)",
    )
    parser.add_argument(
        "--retries",
        type=int,
        default=2,
        metavar="N",
        help="further tries if nobody answers, or with 5xx or 429 (default: 2)",
    )
    parser.add_argument(
        "--header",
        type=_header,
        action="append",
        default=[],
        metavar="NAME: VALUE",
        help="a further header; repeatable",
    )
    secret = parser.add_mutually_exclusive_group()
    secret.add_argument(
        "--secret-env",
        metavar="NAME",
        help=f"environment variable with the secret that signs the body ({SIGNATURE})",
    )
    secret.add_argument(
        "--secret-file",
        type=Path,
        metavar="FILE",
        help="the same in a file, for a host whose agent ssh starts; a newline at its end is none",
    )
    return parser


def _secret(given: argparse.Namespace) -> bytes:
    """The secret that was named; empty if none was.

    Raises:
        UsageError: it is not there, or is empty.
    """
    if given.secret_env:
        secret = os.environ.get(given.secret_env, "").encode()
        where = f"environment variable {given.secret_env}"
    elif given.secret_file:
        where = str(given.secret_file)
        try:
            secret = given.secret_file.read_bytes().rstrip(b"\r\n")
        except OSError as error:
            raise UsageError(f"{where}: {error.strerror}") from error
    else:
        return b""
    if not secret:
        raise UsageError(f"there is no secret in {where}")
    return bytes(secret)


def run(argv: Sequence[str], body: bytes) -> None:
    """The hook; `body` is what came on stdin.

    Raises:
        PhaulError: nobody took it.
    """
    given = _parser().parse_args(argv)
    if urlsplit(given.url).scheme not in ("http", "https"):
        raise UsageError(f"{given.url!r} is no URL of http or https")
    if given.retries < 0:
        raise UsageError("--retries is at least 0")
    try:
        told = read_json(body)
        delivery = f"{told['id']}-{told['event']}-{told['role']}"
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(
            "stdin has no JSON of a hook", hint="name it in the hooks: section"
        ) from error
    headers = {
        "Content-Type": "application/json",
        "User-Agent": f"phaul-runtime/{__version__}",
        DELIVERY: delivery,
        **dict(given.header),
    }
    if secret := _secret(given):
        headers[SIGNATURE] = signature(secret, body)
    post(given.url, body, headers, timeout_s=given.timeout, retries=given.retries)


def main() -> None:
    """Run the command and end with its exit code."""
    sys.exit(end(lambda: run(sys.argv[1:], sys.stdin.buffer.read()), "phaul-webhook"))
