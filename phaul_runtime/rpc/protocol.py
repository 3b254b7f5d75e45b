"""What client and agent agree on beside phaul.proto."""

from __future__ import annotations

PROTOCOL = 9
"""The version of the control channel's protocol: both sides have the same."""
VERSION_KEY = "phaul-protocol"
"""In the metadata of every call: PROTOCOL."""
MAX_MESSAGE = 8 << 20
"""Bytes of a message of the control channel; streams send parts of 1 MiB."""
