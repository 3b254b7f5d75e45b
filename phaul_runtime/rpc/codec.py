"""What client and agent agree on beside phaul.proto: names, sizes, errors as messages."""

from __future__ import annotations

from phaul_runtime.errors import (
    CriuError,
    DestinationError,
    JournalDamaged,
    OutcomeUnknown,
    PhaulError,
    Refused,
    StillUnderWay,
)
from phaul_runtime.printable import encodable
from phaul_runtime.rpc import phaul_pb2 as pb

# The agent's two sockets, in its socket directory.
CONTROL = "control.sock"
MEMORY = "memory.sock"
# A memory connection begins with the migration's id, a tree's with that and the tree's name; then
# what was done to the stream, if anything was; padded to this length.
ID_BYTES = 96
# In the place of a tree's name: the pages of a post-copy move.
PAGES = "@pages"
ZSTD = "+zstd"
# Of the control channel; streams send parts of 1 MiB.
MAX_MESSAGE = 8 << 20

# Errors that keep their meaning on the other side; any other is the destination's failure.
_KINDS: dict[str, type[PhaulError]] = {
    "Refused": Refused,
    "CheckFailed": Refused,
    "NoSuchTarget": Refused,
    "StillUnderWay": StillUnderWay,
    "OutcomeUnknown": OutcomeUnknown,
    "JournalDamaged": JournalDamaged,
}
# In the metadata of every call: PROTOCOL of hostfacts.
VERSION_KEY = "phaul-protocol"

# gRPC's own limit for a message is 4 MiB; a log's end is enough.
_LOG_TEXT = 256 << 10
# What is taken of an error that the other side tells, characters and lines.
_SENTENCE = 4 << 10
_LOG_LINES = 32


def to_wire(error: Exception) -> pb.Error:
    """Describe an exception; one that is not ours becomes an internal error."""
    if not isinstance(error, PhaulError):
        return pb.Error(kind="PhaulError", message=_sentence(f"internal error: {error!r}"))
    message = pb.Error(
        kind=type(error).__name__,
        message=_sentence(error.message),
        hint=_sentence(error.hint),
        log=map(_sentence, error.log[:_LOG_LINES]),
    )
    if isinstance(error, CriuError):
        message.log_text = encodable(error.log_text[-_LOG_TEXT:])
    return message


def _sentence(text: str) -> str:
    return encodable(text[:_SENTENCE])


def from_wire(message: pb.Error, host: str) -> PhaulError:
    """The exception for an error that `host` reported; of what is too long, the beginning."""
    said, hint = _sentence(message.message), _sentence(message.hint)
    log = [_sentence(line) for line in message.log[:_LOG_LINES]]
    if message.kind == "CriuError":
        log_text = message.log_text[-_LOG_TEXT:]
        return CriuError(said, hint=hint, host=host, log=log, log_text=log_text)
    kind = _KINDS.get(message.kind, DestinationError)
    return kind(said, hint=hint, host=host, log=log)
