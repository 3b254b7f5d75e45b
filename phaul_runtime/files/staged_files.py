"""Carrying files: a sender at the source, a stage at the destination.

Files are staged beside their destination and renamed into place just before the restore, so
that a move that fails leaves the destination as it was. What was sent once is sent again, in
the freeze, only in the blocks that changed.

All around them may belong to ordinary users, who may change it at any moment: `in_use` and
`placing` say how the files themselves are reached, and as whom.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

from phaul_runtime.cutover.journal import Journal
from phaul_runtime.engine.targets import FileFact
from phaul_runtime.errors import DestinationError, MigrationFailed, PhaulError
from phaul_runtime.files.in_use import changed_since, find, open_to_read
from phaul_runtime.files.placing import Place, find_place, make_directory, may_replace
from phaul_runtime.system.filemark import Mark, mark_of

log = logging.getLogger(__name__)

BLOCK = 1 << 20
_HOW = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
# In the journal: how each of "staged" and "made" was worked on.
_PLACES = "places"


@dataclass(frozen=True)
class FilePart:
    """A piece of a stream of files: first what a file is, then its blocks.

    Attributes:
        head: begins a file.
        offset: in the file, bytes, of `data`.
        data: at most a `BLOCK`.
    """

    head: FileFact | None = None
    offset: int = 0
    data: bytes = b""


class FileSender:
    """The source's side: knows what the destination has of each file.

    Args:
        facts: all files of the target.
        differing: paths that the destination lacks or has otherwise.
    """

    def __init__(self, facts: Iterable[FileFact], differing: Iterable[str]) -> None:
        self._facts = {fact.path: fact for fact in facts}
        self._differing = set(differing)
        self._sent: dict[str, list[bytes]] = {}
        self.files = 0
        self.bytes = 0

    def first(self) -> Iterator[FilePart]:
        """While the target runs: everything that differs.

        Raises:
            MigrationFailed: a file cannot be read.
        """
        # Directories before what lies in them.
        for path in sorted(self._differing):
            if path in self._facts:
                yield from self._parts(path)

    def changed(self) -> list[FileFact]:
        """Files that the target may have changed since they were compared or sent."""
        return [
            fact
            for fact in self._facts.values()
            if not fact.directory
            and (fact.written or fact.path in self._sent)
            and changed_since(fact)
        ]

    def again(self, changed: Iterable[FileFact]) -> Iterator[FilePart]:
        """In the freeze: the changed blocks of `changed`. Raises as `first`."""
        for fact in changed:
            yield from self._parts(fact.path)

    def _parts(self, path: str) -> Iterator[FilePart]:
        held_by = self._facts[path].held_by
        head = replace(self._facts[path], held_by=())
        if head.directory:
            self._sent[path] = []
            yield FilePart(head)
            return
        known = self._sent.get(path, [])
        with _file_of(self._facts[path]) as file:
            info = os.fstat(file.fileno())
            head.size, head.mtime_ns = info.st_size, info.st_mtime_ns
            # Of the file that is read, not of the one that was looked at.
            head.uid, head.gid, head.mode = info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)
            head.device, head.inode, head.born_ns = mark_of(file.fileno())
            yield FilePart(head)
            digests = []
            for number, block in enumerate(iter(lambda: file.read(BLOCK), b"")):
                digests.append(hashlib.blake2b(block, digest_size=20).digest())
                if number < len(known) and known[number] == digests[-1]:
                    continue
                self.bytes += len(block)
                yield FilePart(offset=number * BLOCK, data=block)
        self.files += path not in self._sent
        self._sent[path] = digests
        self._facts[path] = replace(head, held_by=held_by)


@contextlib.contextmanager
def _file_of(fact: FileFact) -> Iterator[BinaryIO]:
    """A target's file, to be read.

    Raises:
        MigrationFailed: it cannot be, or is not the target's to read.
    """
    try:
        found = find(fact)
        try:
            fd = open_to_read(fact, found)
        finally:
            os.close(found)
    except OSError as error:
        raise MigrationFailed(
            f"cannot read the target's file {fact.path}: {error.strerror}",
            hint="it was replaced or removed while the target was moved: try again",
        ) from error
    with os.fdopen(fd, "rb") as file:
        yield file


class FileStage:
    """The destination's side: stages, installs, and undoes.

    What it is about to do is journaled first, so that `recall` can undo or keep it after a crash.

    Args:
        journal: of the migration, whose id makes the names of staged files unmistakable.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._places: dict[str, Place] = {}
        self._staged: dict[str, FileFact] = {}
        self._marks: dict[str, Mark] = {}
        self._made: list[str] = []
        self._replaced: list[tuple[str, bool]] = []
        self._current: tuple[str, int] | None = None

    def _beside(self, place: Place, kind: str) -> str:
        return place.beside(f".phaul-{self._journal.id}.{kind}")

    def _place_of(self, path: str) -> Place:
        return self._places.get(path) or Place(path)

    def take(self, part: FilePart) -> None:
        """Take one message of a stream.

        Raises:
            DestinationError: the path is unusable, or this host's file system refuses.
        """
        try:
            if part.head is not None:
                self._begin(part.head)
            elif self._current is None:
                raise DestinationError("file contents came before their name")
            elif len(part.data) > BLOCK or part.offset < 0:
                raise DestinationError("malformed file part")
            else:
                _write(self._current[1], part.data, part.offset)
        except OSError as error:
            path = part.head.path if part.head else self._current[0] if self._current else ""
            raise _failed("stage", path, error) from error

    def end_stream(self) -> None:
        """A stream is over; idempotent."""
        if self._current is not None:
            os.close(self._current[1])
            self._current = None

    def _begin(self, fact: FileFact) -> None:
        self.end_stream()
        path = fact.path
        if not path.startswith("/") or path.endswith("/") or {".", ".."} & set(path.split("/")):
            raise DestinationError(f"unusable path {path!r}")
        if fact.directory:
            self._make_directory(fact)
            return
        again = path in self._staged
        place = self._places[path] if again else self._find(fact)
        if not again:
            self._note("staged", place)
        flags = os.O_WRONLY | os.O_CREAT | _HOW | (0 if again else os.O_EXCL)
        with place.entered() as (directory, name):
            may_replace(fact, directory, name)
            fd = os.open(self._beside(place, "new"), flags, 0o600, dir_fd=directory)
        self._current = (path, fd)
        mark = mark_of(fd)
        if self._marks.setdefault(path, mark) != mark:
            raise OSError(errno.ESTALE, "what was staged was replaced by somebody")
        self._staged[path] = fact
        os.ftruncate(fd, fact.size)

    def _find(self, fact: FileFact) -> Place:
        above = fact.path.rpartition("/")[0]
        return find_place(fact, lambda made: self._note("made", made), made=above in self._made)

    def _note(self, kind: str, place: Place) -> None:
        self._journal.add(_PLACES, place.noted())
        self._journal.add(kind, place.path)
        self._places[place.path] = place
        if kind == "made":
            self._made.append(place.path)

    def _make_directory(self, fact: FileFact) -> None:
        place = self._find(fact)
        with place.entered() as (directory, name), contextlib.suppress(FileNotFoundError):
            info = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if not stat.S_ISDIR(info.st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            return
        make_directory(place, fact.mode, lambda made: self._note("made", made))

    def install(self) -> None:
        """Rename everything into place; what was there before is kept beside until `keep`.

        Raises:
            DestinationError: one cannot be.
        """
        self.end_stream()
        existed = {path: self._exists(fact) for path, fact in self._staged.items()}
        if existed:
            self._journal.add("replaced", *([path, there] for path, there in existed.items()))
            self._journal.sync()
        for path, fact in self._staged.items():
            try:
                self._install(self._places[path], fact, replaces=existed[path])
            except OSError as error:
                raise _failed("install", path, error) from error
        self._staged.clear()

    def _exists(self, fact: FileFact) -> bool:
        try:
            with self._places[fact.path].entered() as (directory, name):
                return may_replace(fact, directory, name)
        except OSError as error:
            raise _failed("install", fact.path, error) from error

    def _install(self, place: Place, fact: FileFact, *, replaces: bool) -> None:
        staged, saved = self._beside(place, "new"), self._beside(place, "old")
        with place.entered() as (directory, name):
            fd = os.open(staged, os.O_RDONLY | _HOW, dir_fd=directory)
            try:
                if mark_of(fd) != self._marks[place.path]:
                    raise OSError(errno.ESTALE, "what was staged was replaced by somebody")
                os.fchown(fd, fact.uid, fact.gid)
                os.fchmod(fd, fact.mode)
                os.utime(fd, ns=(fact.mtime_ns, fact.mtime_ns))
            finally:
                os.close(fd)
            if replaces:
                os.link(
                    name, saved, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False
                )
            elif may_replace(fact, directory, name):
                raise FileExistsError(errno.EEXIST, "was made there meanwhile")
            os.rename(staged, name, src_dir_fd=directory, dst_dir_fd=directory)
            self._replaced.append((place.path, replaces))

    def recall(self) -> None:
        """Know what an earlier process did, from the journal."""
        facts = self._journal.facts
        for noted in facts.get(_PLACES, []):
            place = Place.recall(noted)
            self._places[place.path] = place
        self._made = [str(path) for path in facts.get("made", [])]
        self._replaced = [(str(path), bool(existed)) for path, existed in facts.get("replaced", [])]
        self._staged = {str(path): FileFact(str(path)) for path in facts.get("staged", [])}

    def keep(self) -> None:
        """The move succeeded: forget what was replaced; idempotent. What stays is logged."""
        for path, existed in self._replaced:
            if existed:
                with self._going_on(path, "its old version stays"):
                    self._remove(path, "old")
        self._replaced.clear()
        self._made.clear()

    def undo(self) -> None:
        """The move failed: put everything back as it was; idempotent.

        What cannot be is left, and logged.
        """
        self.end_stream()
        for path in self._staged:
            with self._going_on(path, "what was staged stays"):
                self._remove(path, "new")
        self._staged.clear()
        for path, existed in reversed(self._replaced):
            with self._going_on(path, "it is not put back"):
                self._put_back(self._place_of(path), existed=existed)
        self._replaced.clear()
        for path in reversed(self._made):
            with (
                self._going_on(path, "the directory stays"),
                self._place_of(path).entered() as (directory, name),
                contextlib.suppress(FileNotFoundError),
            ):
                os.rmdir(name, dir_fd=directory)
        self._made.clear()

    def _put_back(self, place: Place, *, existed: bool) -> None:
        saved = self._beside(place, "old")
        with place.entered() as (directory, name):
            if not existed:
                _unlink(name, directory)
                return
            with contextlib.suppress(FileNotFoundError):
                os.rename(saved, name, src_dir_fd=directory, dst_dir_fd=directory)
            _unlink(saved, directory)  # two names of one file: rename leaves both

    def _remove(self, path: str, kind: str) -> None:
        place = self._place_of(path)
        with place.entered() as (directory, _):
            _unlink(self._beside(place, kind), directory)

    @contextlib.contextmanager
    def _going_on(self, path: str, left: str) -> Iterator[None]:
        """One that fails keeps nobody from the next."""
        try:
            yield
        except FileNotFoundError:
            pass  # with its directory
        except (OSError, PhaulError) as error:
            log.warning("%s: %s: %s", path, left, getattr(error, "strerror", None) or error)


def _write(fd: int, data: bytes, offset: int) -> None:
    """All of it: one call writes less where a limit or the disk's end is near."""
    left = memoryview(data)
    while left:
        written = os.pwrite(fd, left, offset)
        left, offset = left[written:], offset + written


def _unlink(name: str, directory: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)


def _failed(what: str, path: str, error: OSError) -> DestinationError:
    where = f" ({error.filename})" if isinstance(error.filename, str) else ""
    return DestinationError(
        f"cannot {what} {path}: {error.strerror}{where}",
        hint="look at the free space, the mount options, and whose the directories are there",
    )
