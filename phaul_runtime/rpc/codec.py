"""Our values as messages of phaul.proto, and back: errors, findings, facts of files."""

from __future__ import annotations

from dataclasses import fields

from phaul_runtime.engine.findings import Finding
from phaul_runtime.engine.targets import FileFact, FileVerdict, User
from phaul_runtime.errors import (
    CriuError,
    DestinationError,
    JournalDamaged,
    OutcomeUnknown,
    PhaulError,
    Refused,
    StillUnderWay,
)
from phaul_runtime.files.staged_files import FilePart
from phaul_runtime.printable import encodable
from phaul_runtime.rpc import phaul_pb2 as pb

# Errors that keep their meaning on the other side; any other is the destination's failure.
_KINDS: dict[str, type[PhaulError]] = {
    "Refused": Refused,
    "CheckFailed": Refused,
    "NoSuchTarget": Refused,
    "StillUnderWay": StillUnderWay,
    "OutcomeUnknown": OutcomeUnknown,
    "JournalDamaged": JournalDamaged,
}
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


def finding_to_wire(finding: Finding) -> pb.Finding:
    """What a check here found."""
    return pb.Finding(
        check=finding.check, level=finding.level, text=finding.text, hint=finding.hint
    )


def finding_from_wire(message: pb.Finding) -> Finding:
    """What a check there found."""
    return Finding(message.check, message.level, message.text, message.hint)


# By the same names in both.
_FACT_FIELDS = tuple(field.name for field in fields(FileFact) if field.name != "user")


def fact_to_wire(fact: FileFact) -> pb.FileFact:
    """What the destination has to know of a file."""
    message = pb.FileFact(**{name: getattr(fact, name) for name in _FACT_FIELDS})
    if fact.user is not None:
        user = pb.FileUser(uid=fact.user.uid, gid=fact.user.gid, groups=fact.user.groups)
        message.user.CopyFrom(user)
    return message


def fact_from_wire(message: pb.FileFact) -> FileFact:
    """What the source says of a file; nothing in it is checked."""
    fact = FileFact(**{name: getattr(message, name) for name in _FACT_FIELDS})
    fact.held_by = tuple(message.held_by)
    if message.HasField("user"):
        fact.user = User(message.user.uid, message.user.gid, tuple(message.user.groups))
    return fact


def verdict_to_wire(verdict: FileVerdict) -> pb.FileVerdict:
    """How a file differs here."""
    return pb.FileVerdict(path=verdict.path, reason=verdict.reason, copyable=verdict.copyable)


def verdict_from_wire(message: pb.FileVerdict) -> FileVerdict:
    """How a file differs there."""
    return FileVerdict(message.path, message.reason, message.copyable)


def part_to_wire(part: FilePart, migration_id: str) -> pb.FilePart:
    """A piece of a stream of files."""
    head = None if part.head is None else fact_to_wire(part.head)
    return pb.FilePart(id=migration_id, head=head, offset=part.offset, data=part.data)


def part_from_wire(message: pb.FilePart) -> FilePart:
    """A piece of a stream of files, as it came."""
    head = fact_from_wire(message.head) if message.HasField("head") else None
    return FilePart(head, message.offset, message.data)
