"""Each run of these tests has its own loopback; places with short names."""

from __future__ import annotations

from tests.namespaces import network  # noqa: F401
from tests.places import root  # noqa: F401
