"""Each run of these tests has its own loopback."""

from __future__ import annotations

from tests.namespaces import network  # noqa: F401
