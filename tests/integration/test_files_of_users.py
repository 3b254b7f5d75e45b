"""Root carries the files of a user who meanwhile does what he can: uid 65534 against root."""

from __future__ import annotations

import os
import select
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from phaul_engines.common.proctree import Tree, read_tree

from phaul_runtime.cutover.journal import Journal
from phaul_runtime.cutover.states import Role, State
from phaul_runtime.engine.targets import FileFact, User
from phaul_runtime.engine.targets import Tree as FileTree
from phaul_runtime.errors import DestinationError, MigrationFailed, PhaulError
from phaul_runtime.files.compare import InUse, compare, gather_all
from phaul_runtime.files.identity import acting_as
from phaul_runtime.files.staged_files import FilePart, FileSender, FileStage
from phaul_runtime.files.tree_sender import _directory_of
from phaul_runtime.files.tree_server import TreeServer
from phaul_runtime.memory.image_dirs import remove_tree
from phaul_runtime.system.pathwalk import make_directories, open_path, who_else, write_file

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="requires root: it works as others")

NOBODY = 65534
_AS_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
_WITHIN_S = 60.0


def user(script: str, at: Path) -> None:
    """The user runs a shell script in `at`."""
    subprocess.run([*_AS_NOBODY, "sh", "-c", script], cwd=at, check=True, timeout=_WITHIN_S)


@pytest.fixture
def host() -> Iterator[Path]:
    """A directory of root's, which the user can reach: home/ is his, etc/ is root's."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        top = Path(name)
        top.chmod(0o755)
        for directory in ("home", "etc"):
            (top / directory).mkdir(mode=0o755)
        os.chown(top / "home", NOBODY, NOBODY)
        (top / "etc" / "secret").write_text("root's secret")
        (top / "etc" / "secret").chmod(0o600)
        yield top


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal.create(tmp_path / "state", "ab" * 8, Role.DESTINATION) as made:
        made.enter(State.ITERATING)
        yield made


@pytest.fixture
def target() -> Iterator[Callable[..., Tree]]:
    """Start a process that does what `script` says, as the user, and read what it has open."""
    started = []

    def start(script: str, at: Path, *, setup: str = "") -> Tree:
        script = (
            f"import os, mmap, fcntl, signal\n{script}\nprint('there', flush=True)\nsignal.pause()"
        )
        argv = [sys.executable, "-I", "-c", script]
        if setup:  # root opens, and then gives its rights up
            argv = ["sh", "-c", f"{setup}\nexec {shlex.join((*_AS_NOBODY, *argv))}"]
        else:
            argv = [*_AS_NOBODY, *argv]
        process = subprocess.Popen(argv, cwd=at, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], _WITHIN_S)[0]
        assert process.stdout.readline() == b"there\n"
        return read_tree(process.pid)

    yield start
    for process in started:
        process.kill()
        process.communicate()


def facts_of(tree: Tree, *paths: Path) -> list[FileFact]:
    wanted = {str(path) for path in paths}
    files = [file for file in tree.files.values() if file.path in wanted]
    facts = gather_all(InUse(file.path, file.use, file.known) for file in files)
    assert {fact.path for fact in facts} == wanted
    return facts


def parts_of(*facts: FileFact) -> list[FilePart]:
    return list(FileSender(facts, [fact.path for fact in facts]).first())


def feed(stage: FileStage, parts: list[FilePart]) -> None:
    for part in parts:
        stage.take(part)
    stage.end_stream()


def verdicts(*facts: FileFact) -> dict[str, tuple[str, bool]]:
    return {Path(v.path).name: (v.reason, v.copyable) for v in compare(facts)}


def listing(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir() if path.is_file()}


# -- the destination ---------------------------------------------------------------------------


def test_an_ordinary_file_moves_with_owner_and_mode(
    host: Path, journal: Journal, target: Callable[..., Tree]
) -> None:
    path = host / "home" / "deep" / "data"
    tree = target("os.mkdir('deep'); f = open('deep/data', 'w'); f.write('hello'); f.flush(); "
                  "os.chmod('deep/data', 0o640)", host / "home")  # fmt: skip
    facts = facts_of(tree, path)
    parts = parts_of(*facts)
    user("rm -r deep", host / "home")
    assert verdicts(*facts) == {"data": ("file is missing there", True)}
    stage = FileStage(journal)
    feed(stage, parts)
    # From the first moment it is the user's, as is the directory that he could have made.
    assert {p.stat().st_uid for p in (path.parent, *path.parent.iterdir())} == {NOBODY}
    stage.install()
    info = path.stat()
    assert (path.read_text(), info.st_uid, info.st_mode & 0o7777) == ("hello", NOBODY, 0o640)
    stage.undo()
    assert not any((host / "home").iterdir())


def test_a_log_that_an_administrator_put_in_place_moves_too(
    host: Path, journal: Journal, target: Callable[..., Tree]
) -> None:
    path = host / "etc" / "app.log"
    path.write_text("line")
    os.chown(path, NOBODY, NOBODY)
    parts = parts_of(*facts_of(target(f"f = open({str(path)!r}, 'a')", host / "home"), path))
    path.write_text("older")
    stage = FileStage(journal)
    feed(stage, parts)
    stage.install()
    assert (path.read_text(), path.stat().st_uid) == ("line", NOBODY)
    stage.keep()
    assert set(listing(host / "etc")) == {"secret", "app.log"}


def test_what_the_user_may_place_there_himself_is_not_placed_for_him_where_he_may_not(
    host: Path, journal: Journal, target: Callable[..., Tree]
) -> None:
    path = host / "home" / "cron.d" / "job"
    tree = target("os.mkdir('cron.d'); f = open('cron.d/job', 'w')", host / "home")
    facts = facts_of(tree, path)
    parts = parts_of(*facts)
    user("rm -r cron.d", host / "home")
    path.parent.mkdir()  # there it is root's
    reason, copyable = verdicts(*facts)["job"]
    assert "may not write to its directory" in reason
    assert not copyable
    with pytest.raises(DestinationError, match="may not write to its directory"):
        feed(FileStage(journal), parts)
    assert not any(path.parent.iterdir())


@pytest.mark.parametrize("when", ["before", "staged", "installed"])
def test_a_directory_that_became_a_link_leads_nowhere(
    host: Path, journal: Journal, target: Callable[..., Tree], when: str
) -> None:
    path = host / "home" / "d" / "secret"
    tree = target("os.mkdir('d'); f = open('d/secret', 'w'); f.write('evil'); f.flush()",
                  host / "home")  # fmt: skip
    facts = facts_of(tree, path)
    parts = parts_of(*facts)
    user("rm d/secret", host / "home")
    stage = FileStage(journal)
    swap = f"mv d was; ln -s {host}/etc d"
    if when == "before":
        user(swap, host / "home")
        reason, copyable = verdicts(*facts)["secret"]
        assert "is a link" in reason
        assert not copyable
        with pytest.raises(DestinationError, match="is a link"):
            feed(stage, parts)
    else:
        feed(stage, parts)
        if when == "staged":
            user(swap, host / "home")
            with pytest.raises(DestinationError, match="is a link"):
                stage.install()
        else:
            stage.install()
            user(swap, host / "home")
    stage.undo()
    again = FileStage(journal)
    again.recall()
    again.undo()
    assert listing(host / "etc") == {"secret": "root's secret"}


@pytest.mark.parametrize("whose", ["the user's", "root's"])
def test_a_directory_of_roots_that_was_moved_into_the_way_is_not_worked_in(
    host: Path, journal: Journal, target: Callable[..., Tree], whose: str
) -> None:
    path = host / "home" / "d" / "secret"
    path.parent.mkdir()
    path.touch()
    os.chown(path, NOBODY, NOBODY)
    if whose == "the user's":
        os.chown(path.parent, NOBODY, NOBODY)
    parts = parts_of(*facts_of(target("f = open('d/secret', 'a')", host / "home"), path))
    path.unlink()
    stage = FileStage(journal)
    feed(stage, parts)
    stage.install()
    (host / "home" / "roots").mkdir(mode=0o755)
    (host / "home" / "roots" / "secret").write_text("root's")
    user("mv d was; mv roots d", host / "home")  # the directory is his, so its names are
    stage = FileStage(journal)
    stage.recall()
    stage.undo()
    assert path.read_text() == "root's"


@pytest.mark.parametrize("swap", ["ln -s {etc}/secret $n", "mkdir $n", "mkfifo $n", "echo > $n"])
def test_what_is_staged_may_be_swapped_and_nothing_is_given_away(
    host: Path, journal: Journal, target: Callable[..., Tree], swap: str
) -> None:
    path = host / "home" / "f"
    parts = parts_of(*facts_of(target("f = open('f', 'w')", host / "home"), path))
    user("rm f", host / "home")
    stage = FileStage(journal)
    feed(stage, parts)
    swap = swap.format(etc=host / "etc")
    user(f"for n in .f.phaul-*.new; do rm $n; {swap}; done", host / "home")
    with pytest.raises(DestinationError):
        stage.install()
    info = (host / "etc" / "secret").stat()
    assert (info.st_uid, info.st_mode & 0o7777) == (0, 0o600)
    stage.undo()


def test_undo_goes_on_past_what_fails_and_says_so(
    host: Path, journal: Journal, target: Callable[..., Tree], caplog: pytest.LogCaptureFixture
) -> None:
    paths = [host / "home" / name for name in ("a", "b")]
    tree = target("f = [open(n, 'w') for n in 'ab']", host / "home")
    parts = parts_of(*facts_of(tree, *paths))
    user("rm a b", host / "home")
    stage = FileStage(journal)
    feed(stage, parts)
    user("for n in .a.phaul-*.new; do rm $n; mkdir $n; done", host / "home")
    stage.undo()
    assert "what was staged stays" in caplog.text
    assert [p.name for p in (host / "home").iterdir()] == [f".a.phaul-{journal.id}.new"]


@pytest.mark.parametrize(
    ("script", "setup"),
    [
        ("f = os.open('../etc/secret', os.O_PATH)", ""),
        ("", "exec 5<../etc/secret"),
        ("os.open('../etc/open', os.O_RDONLY)", "echo theirs > ../etc/open"),
        ("", "exec 5>>../etc/secret"),  # root opened it for him, here; there nobody did
    ],
)
def test_a_file_of_roots_is_not_replaced_for_a_user(
    host: Path, journal: Journal, target: Callable[..., Tree], script: str, setup: str
) -> None:
    tree = target(script, host / "home", setup=setup)
    path = host / "etc" / ("open" if "open'" in script else "secret")
    facts = facts_of(tree, path)
    parts = parts_of(*facts)
    path.write_text("what the destination has")
    assert not verdicts(*facts)[path.name][1]
    with pytest.raises(DestinationError):
        feed(FileStage(journal), parts)
    assert path.read_text() == "what the destination has"


def test_a_program_that_runs_as_root_is_not_brought_by_a_user(
    host: Path, target: Callable[..., Tree]
) -> None:
    path = host / "etc" / "tool"
    path.write_text("#!")
    path.chmod(0o4755)
    facts = facts_of(target("f = open('../etc/tool')", host / "home"), path)
    path.unlink()
    reason, copyable = verdicts(*facts)["tool"]
    assert "set-user-ID" in reason
    assert not copyable


# -- the source --------------------------------------------------------------------------------


@pytest.mark.parametrize("swap", ["mv f g; ln -s {etc}/secret f", "rm f; ln -s {etc}/secret f"])
def test_the_file_that_the_target_has_is_sent_whatever_has_its_name(
    host: Path, target: Callable[..., Tree], swap: str
) -> None:
    facts = facts_of(
        target("f = open('f', 'w'); f.write('hello'); f.flush()", host / "home"),
        host / "home" / "f",
    )
    sender = FileSender(facts, [fact.path for fact in facts])
    user(swap.format(etc=host / "etc"), host / "home")
    parts = list(sender.first())
    assert b"".join(part.data for part in parts) == b"hello"
    assert not sender.changed()


def test_of_a_file_that_was_written_anew_only_what_the_user_may_read_is_sent(
    host: Path, target: Callable[..., Tree]
) -> None:
    path = host / "home" / "f"
    facts = facts_of(target("f = open('f', 'w')", host / "home"), path)
    for fact in facts:
        fact.held_by = ["/proc/self/fd/999"]  # closed by now
    sender = FileSender(facts, [str(path)])
    user("rm f; echo new > f", host / "home")
    assert b"".join(part.data for part in sender.first()) == b"new\n"
    path.unlink()
    path.write_text("root's secret")
    path.chmod(0o600)
    with pytest.raises(MigrationFailed, match="Permission denied"):
        list(sender.again(sender.changed()))
    user(f"rm -f f; ln -s {host}/etc/secret f", host / "home")
    with pytest.raises(MigrationFailed, match="is a link"):
        list(sender.again(sender.changed()))


def test_a_secret_that_root_opened_for_it_stays_roots(
    host: Path, journal: Journal, target: Callable[..., Tree]
) -> None:
    path = host / "etc" / "secret"
    facts = facts_of(target("", host / "home", setup="exec 5<../etc/secret"), path)
    parts = parts_of(*facts)
    path.unlink()
    stage = FileStage(journal)
    feed(stage, parts)
    stage.install()
    info = path.stat()
    assert (path.read_text(), info.st_uid, info.st_mode & 0o7777) == ("root's secret", 0, 0o600)


@pytest.mark.parametrize("name", ["line\nfeed", "esc\x1b[0m", "back\\slash", "f (deleted)"])
def test_open_and_mapped_files_of_any_name_are_known(
    host: Path, target: Callable[..., Tree], name: str
) -> None:
    path = host / "home" / name
    tree = target(
        f"f = open({name!r}, 'w+'); f.write('x' * 4096); f.flush()\n"
        "m = mmap.mmap(f.fileno(), 4096); f.close()", host / "home",
    )  # fmt: skip
    (fact,) = facts_of(tree, path)
    assert (fact.written, fact.shared_map, fact.size) == (True, True, 4096)


@pytest.mark.parametrize("kind", ["F_WRLCK", "F_RDLCK"])
def test_a_lease_is_seen_and_not_broken(host: Path, target: Callable[..., Tree], kind: str) -> None:
    path = host / "home" / "f"
    mode = "O_RDWR" if kind == "F_WRLCK" else "O_RDONLY"
    tree = target(
        f"open('f', 'w').write('leased'); f = os.open('f', os.{mode})\n"
        f"fcntl.fcntl(f, fcntl.F_SETLEASE, fcntl.{kind})",
        host / "home",
    )
    facts = facts_of(tree, path)
    breaks = kind == "F_WRLCK"
    assert [(fact.leased, bool(fact.digest)) for fact in facts] == [(breaks, not breaks)]
    assert not compare(facts)  # looks at it as the destination does
    if breaks:
        with pytest.raises(MigrationFailed, match="lease"):
            parts_of(*facts)
    # Who breaks it ends its holder, by SIGIO.
    assert tree.root.alive()


# -- what is not root's alone ------------------------------------------------------------------


def test_links_of_root_in_directories_of_root_are_followed(host: Path) -> None:
    (host / "run").mkdir(mode=0o755)
    (host / "run" / "file").write_text("x")
    (host / "var").symlink_to("etc/../run")
    os.close(open_path(str(host / "var" / "file")))
    os.close(open_path("/bin/sh"))
    host.chmod(0o775)  # a group may have made it
    with pytest.raises(OSError, match="is a link"):
        open_path(str(host / "var" / "file"))


def test_a_fifo_or_a_device_is_not_opened(host: Path) -> None:
    os.mkfifo(host / "home" / "f", 0o666)
    assert gather_all([InUse(str(host / "home" / "f")), InUse("/dev/zero")]) == []


def test_acting_as_another_is_over_with_its_block(host: Path) -> None:
    with acting_as(User(NOBODY, NOBODY)), pytest.raises(PermissionError):
        (host / "etc" / "secret").read_text()
    assert (host / "etc" / "secret").read_text() == "root's secret"
    for nobody in (User((1 << 32) - 1, 0), User(1, (1 << 32) - 1)):
        with pytest.raises(OSError, match="there is no"), acting_as(nobody):
            pass
    with acting_as(User(NOBODY, NOBODY), override=True):
        (host / "etc" / "made").write_text("")
        with pytest.raises(PermissionError):
            os.chown(host / "etc" / "secret", NOBODY, NOBODY)
    assert (host / "etc" / "made").stat().st_uid == NOBODY


def test_what_root_writes_in_a_users_directory_goes_into_no_file_of_others(host: Path) -> None:
    write_file(str(host / "home" / "mark"), "one")
    write_file(str(host / "home" / "mark"), "2")
    assert (host / "home" / "mark").read_text() == "2"
    user(f"ln -s {host}/etc/secret link; ln -s {host}/etc d; mkfifo fifo; mkdir e", host / "home")
    os.link(host / "etc" / "secret", host / "home" / "hard")
    for name in ("link", "d/secret", "d/new", "hard", "fifo", "e"):
        with pytest.raises(OSError):  # noqa: PT011 - each has its own
            write_file(str(host / "home" / name), "evil")
    with pytest.raises(OSError, match="is a link"):
        make_directories(str(host / "home" / "d" / "made"), 0o755)
    assert listing(host / "etc") == {"secret": "root's secret"}


def test_a_private_directory_is_one_that_nobody_can_replace(host: Path) -> None:
    (host / "etc" / "own").mkdir(mode=0o700)
    (host / "home" / "own").mkdir(mode=0o700)
    user(f"ln -s {host}/etc/own link", host / "home")
    assert who_else(str(host / "etc" / "own")) == ""
    assert who_else(str(host / "home" / "own")) == f"others may write to {host}/home, or own it"
    assert "is a link" in who_else(str(host / "home" / "link"))


@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_tree_is_not_carried_by_way_of_a_users_link(
    host: Path, journal: Journal, side: str
) -> None:
    user(f"mkdir d; ln -s {host}/etc d/data", host / "home")
    place = host / "home" / "d" / "data"
    server = TreeServer(journal)
    server.place({"data": place / "sub"})
    here, there = socket.socketpair()

    def carry() -> None:
        if side == "destination":
            server.start("data", "--server -logDtpAXrxSe.iLsfxCIvu . data", here)
        else:
            with _directory_of(FileTree("data", str(place))):
                pass

    with here, there, pytest.raises(PhaulError, match="is a link"):
        carry()
    assert listing(host / "etc") == {"secret": "root's secret"}


def test_a_users_tree_that_a_move_made_is_removed_and_no_other_in_its_place(
    host: Path, journal: Journal
) -> None:
    server = TreeServer(journal)
    place = host / "home" / "data"
    for swapped in (False, True):
        server.place({"data": place})
        server._make(place)
        os.chown(place, NOBODY, NOBODY)  # as rsync does
        user("echo > data/file", host / "home")
        if swapped:
            user("mv data was; mkdir data; echo > data/his", host / "home")
        server.undo()
        assert place.exists() is swapped
    assert (place / "his").exists()


def test_a_tree_is_removed_only_where_it_is_roots(host: Path) -> None:
    precious = host / "etc" / "sub"
    precious.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", precious], check=True)
    try:
        (host / "tmp").mkdir()
        (host / "tmp").chmod(0o1777)
        user(f"ln -s {host}/etc link; mkdir own; touch own/kept", host / "tmp")
        remove_tree(host / "tmp" / "link")
        remove_tree(host / "tmp" / "own")
        assert precious.is_mount()
        assert (host / "tmp" / "own" / "kept").exists()
        (host / "tmp" / "roots").mkdir()
        remove_tree(host / "tmp" / "roots")
        assert not (host / "tmp" / "roots").exists()
    finally:
        subprocess.run(["umount", precious], check=True)
