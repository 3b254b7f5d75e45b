"""Carrying files: a sender at the source, a stage at the destination.

Files are staged beside their destination and renamed into place just before the restore, so
that a move that fails leaves the destination as it was. What was sent once is sent again, in
the freeze, only in the blocks that changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from phaul_runtime.errors import DestinationError
from phaul_runtime.filesystem import changed_since
from phaul_runtime.journal import Journal
from phaul_runtime.rpc import phaul_pb2 as pb

BLOCK = 1 << 20


class FileSender:
    """The source's side: knows what the destination has of each file.

    Args:
        migration_id: goes into each message.
        facts: all files of the target.
        differing: paths that the destination lacks or has otherwise.
    """

    def __init__(
        self, migration_id: str, facts: Iterable[pb.FileFact], differing: Iterable[str]
    ) -> None:
        self._id = migration_id
        self._facts = {fact.path: fact for fact in facts}
        self._differing = set(differing)
        self._sent: dict[str, list[bytes]] = {}
        self.files = 0
        self.bytes = 0

    def first(self) -> Iterator[pb.FilePart]:
        """While the target runs: everything that differs."""
        # Directories before what lies in them.
        for path in sorted(self._differing):
            if path in self._facts:
                yield from self._parts(path)

    def changed(self) -> list[pb.FileFact]:
        """Files that the target may have changed since they were compared or sent."""
        return [
            fact
            for fact in self._facts.values()
            if not fact.directory
            and (fact.written or fact.path in self._sent)
            and changed_since(fact)
        ]

    def again(self, changed: Iterable[pb.FileFact]) -> Iterator[pb.FilePart]:
        """In the freeze: the changed blocks of `changed`."""
        for fact in changed:
            yield from self._parts(fact.path)

    def _parts(self, path: str) -> Iterator[pb.FilePart]:
        head = pb.FileFact()
        head.CopyFrom(self._facts[path])
        if head.directory:
            self._sent[path] = []
            yield pb.FilePart(id=self._id, head=head)
            return
        known = self._sent.get(path, [])
        with Path(path).open("rb") as file:
            info = os.fstat(file.fileno())
            head.size, head.mtime_ns = info.st_size, info.st_mtime_ns
            yield pb.FilePart(id=self._id, head=head)
            digests = []
            for number, block in enumerate(iter(lambda: file.read(BLOCK), b"")):
                digests.append(hashlib.blake2b(block, digest_size=20).digest())
                if number < len(known) and known[number] == digests[-1]:
                    continue
                self.bytes += len(block)
                yield pb.FilePart(id=self._id, offset=number * BLOCK, data=block)
        self.files += path not in self._sent
        self._sent[path] = digests
        self._facts[path].size, self._facts[path].mtime_ns = head.size, head.mtime_ns


class FileStage:
    """The destination's side: stages, installs, and undoes.

    What it is about to do is journaled first, so that `recall` can undo or keep it after a crash.

    Args:
        journal: of the migration, whose id makes the names of staged files unmistakable.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._suffix = f".phaul-{journal.id}"
        self._staged: dict[Path, pb.FileFact] = {}
        self._made: list[Path] = []
        self._replaced: list[tuple[Path, Path | None]] = []
        self._current: tuple[Path, int] | None = None

    def _beside(self, target: Path, kind: str) -> Path:
        return target.with_name(f".{target.name}{self._suffix}.{kind}")

    def take(self, part: pb.FilePart) -> None:
        """Take one message of a stream.

        Raises:
            DestinationError: the path is unusable, or this host's file system refuses.
        """
        try:
            if part.HasField("head"):
                self._begin(part.head)
            elif self._current is None:
                raise DestinationError("file contents came before their name")
            elif len(part.data) > BLOCK or part.offset < 0:
                raise DestinationError("malformed file part")
            else:
                os.pwrite(self._current[1], part.data, part.offset)
        except OSError as error:
            raise DestinationError(
                f"cannot stage {part.head.path or self._current}: {error.strerror}",
                hint="look at the free space and the mount options there",
            ) from error

    def end_stream(self) -> None:
        """A stream is over; idempotent."""
        if self._current is not None:
            os.close(self._current[1])
            self._current = None

    def _begin(self, fact: pb.FileFact) -> None:
        self.end_stream()
        target = Path(fact.path)
        if not target.is_absolute() or ".." in target.parts or not target.name:
            raise DestinationError(f"unusable path {fact.path!r}")
        if fact.directory:
            self._make_directory(target, fact)
            return
        self._make_directory(target.parent, None)
        if target.is_dir():
            raise DestinationError(f"{target} is a directory here")
        staged = self._beside(target, "new")
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        if target not in self._staged:
            flags |= os.O_EXCL
            self._journal.add("staged", str(target))
        fd = os.open(staged, flags, 0o600)
        self._current = (target, fd)
        self._staged[target] = fact
        os.ftruncate(fd, fact.size)

    def _make_directory(self, path: Path, fact: pb.FileFact | None) -> None:
        for directory in reversed((path, *path.parents)):
            if not directory.exists():
                self._journal.add("made", str(directory))
                directory.mkdir(mode=0o755)
                self._made.append(directory)
        if fact is not None and path in self._made:
            os.chown(path, fact.uid, fact.gid)
            path.chmod(fact.mode)

    def install(self) -> None:
        """Rename everything into place; what was there before is kept beside until `keep`."""
        self.end_stream()
        if self._staged:
            self._journal.add(
                "replaced", *([str(target), target.exists()] for target in self._staged)
            )
            self._journal.sync()
        for target, fact in self._staged.items():
            staged = self._beside(target, "new")
            try:
                os.chown(staged, fact.uid, fact.gid)
                staged.chmod(fact.mode)
                os.utime(staged, ns=(fact.mtime_ns, fact.mtime_ns))
                saved = None
                if target.exists():
                    saved = self._beside(target, "old")
                    os.link(target, saved)
                staged.replace(target)
                self._replaced.append((target, saved))
            except OSError as error:
                raise DestinationError(f"cannot install {target}: {error.strerror}") from error
        self._staged.clear()

    def recall(self) -> None:
        """Know what an earlier process did, from the journal."""
        facts = self._journal.facts
        self._made = [Path(path) for path in facts.get("made", [])]
        self._replaced = [
            (Path(path), self._beside(Path(path), "old") if existed else None)
            for path, existed in facts.get("replaced", [])
        ]
        self._staged = {Path(path): pb.FileFact() for path in facts.get("staged", [])}

    def keep(self) -> None:
        """The move succeeded: forget what was replaced; idempotent."""
        for _target, saved in self._replaced:
            if saved is not None:
                saved.unlink(missing_ok=True)
        self._replaced.clear()
        self._made.clear()

    def undo(self) -> None:
        """The move failed: put everything back as it was; idempotent."""
        self.end_stream()
        for target in self._staged:
            self._beside(target, "new").unlink(missing_ok=True)
        self._staged.clear()
        for target, saved in reversed(self._replaced):
            if saved is None:
                target.unlink(missing_ok=True)
            elif saved.exists():
                saved.replace(target)
                saved.unlink(missing_ok=True)  # two names of one file: replace leaves both
        self._replaced.clear()
        for directory in reversed(self._made):
            with contextlib.suppress(OSError):  # somebody else put something there
                directory.rmdir()
        self._made.clear()


def free_bytes(path: Path) -> int:
    """Free bytes of the file system that holds `path` or its nearest existing parent."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
