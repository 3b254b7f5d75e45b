"""The core's small parts: cut-over, cancellation, CRIU's words, errors, transports, statistics."""

from __future__ import annotations

import itertools
import re
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2
from pycriu import rpc_pb2
from pycriu.images import stats_pb2

from phaul_runtime import errors
from phaul_runtime.config.model import Config
from phaul_runtime.criu.hints import advice
from phaul_runtime.criu.page_format import PageFormat
from phaul_runtime.criu.session import CriuVersion, criu_opts, error_lines
from phaul_runtime.criu.stats import read_dump_stats
from phaul_runtime.cutover.cutover import CutOver, Held, Running
from phaul_runtime.cutover.journal import RUNS, Journal, checked_id
from phaul_runtime.cutover.states import Role, State
from phaul_runtime.destination.requests import checked_json, write_images
from phaul_runtime.errors import (
    Cancelled,
    ChannelError,
    DestinationError,
    MigrationFailed,
    OutcomeUnknown,
    PhaulError,
    UsageError,
)
from phaul_runtime.events import Event
from phaul_runtime.memory.image_dirs import ImageDirs, relative_parent
from phaul_runtime.rpc import client
from phaul_runtime.rpc import phaul_pb2 as pb
from phaul_runtime.rpc.codec import from_wire, to_wire
from phaul_runtime.system.cancel import Cancellation
from phaul_runtime.transport import Destination
from phaul_runtime.transport.ssh import SshTransport

ROOT = Path(__file__).resolve().parents[2]


class Recorder:
    """A destination that writes down what it is asked to do."""

    def __init__(self, failing: str = "") -> None:
        self.calls: list[str] = []
        self.failing = failing

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name == self.failing:
            raise ChannelError("the cable was cut", host="b")

    def sync_files(self) -> tuple[int, int]:
        self._called("sync_files")
        return 1, 10

    def stop_files(self) -> None:
        self._called("stop_files")

    def prepare(self, images_dir: Path) -> tuple[Held, int]:
        self._called("prepare")
        return Held(7, 1.0, 1.0), 20

    def commit(self) -> Running:
        self._called("commit")
        return Running(7, 0.0, 0.0)


@pytest.fixture
def journals(tmp_path: Path) -> Callable[[], Journal]:
    """New journals at iterating."""
    ids = itertools.count(0x10000000)

    def new() -> Journal:
        journal = Journal.create(tmp_path / "state", f"{next(ids):x}", Role.SOURCE)
        journal.enter(State.ITERATING)
        return journal

    return new


def cut_over(recorder: Recorder, journal: Journal) -> tuple[CutOver, list[Event], Cancellation]:
    told: list[Event] = []
    cancellation = Cancellation()
    return CutOver(recorder, told.append, cancellation, journal), told, cancellation


Journals = Callable[[], Journal]


def test_the_order_of_the_cut_over(journals: Journals) -> None:
    recorder = Recorder()
    cut, told, _ = cut_over(recorder, journals())
    cut.freezing({})
    cut.prepare(Path("/x"))
    answers = [False, False, True]

    def dead() -> bool:
        assert "commit" not in recorder.calls
        return answers.pop(0)

    outcome = cut.commit(dead)
    assert recorder.calls == ["sync_files", "prepare", "commit"]
    assert not answers
    assert (outcome.restored_pid, outcome.extra_bytes) == (7, 30)
    # Until it is cleaned and hooks were told, a recovery has something to do.
    assert (cut.journal.state, cut.journal.facts[RUNS]) == (State.COMMITTING, True)
    cut.finished()
    assert cut.journal.state is State.DONE
    assert [event.name for event in told] == ["frozen", "prepared", "source_dead", "committed"]
    assert outcome.downtime_ms is not None


def test_nobody_is_told_before_the_commit_is_sent(journals: Journals) -> None:
    """A listener that hangs, or a process that dies in it, would leave no copy running."""
    recorder = Recorder()
    heard: list[str] = []

    def listener(event: Event) -> None:
        if event.name not in ("frozen", "prepared"):
            heard.append(event.name)
            assert recorder.calls[-1] == "commit"
            raise KeyboardInterrupt

    cut = CutOver(recorder, listener, Cancellation(), journals())
    cut.freezing({})
    cut.prepare(Path("/x"))
    with pytest.raises(KeyboardInterrupt):
        cut.commit(lambda: True)
    assert heard == ["source_dead"]
    assert recorder.calls[-1] == "commit"
    # A recovery need not ask the destination.
    assert cut.journal.facts[RUNS] is True


def test_a_cut_over_needs_no_listener_that_works(journals: Journals) -> None:
    """A program that drives one by itself may hand over any."""

    def full(_event: Event) -> None:
        raise OSError(28, "No space left on device")

    recorder = Recorder()
    cut = CutOver(recorder, full, Cancellation(), journals())
    cut.freezing({})
    cut.prepare(Path("/x"))
    assert cut.commit(lambda: True).restored_pid == 7


def test_what_comes_before_the_freeze_is_no_downtime(journals: Journals) -> None:
    told: list[Event] = []
    journal = journals()

    def before() -> None:
        assert journal.state is State.ITERATING
        raise ChannelError("the cable was cut")

    cut = CutOver(Recorder(), told.append, Cancellation(), journal, before_freeze=before)
    with pytest.raises(ChannelError):
        cut.freezing({})
    assert journal.state is State.ITERATING
    assert not told


def test_files_are_carried_beside_the_dump(journals: Journals, tmp_path: Path) -> None:
    recorder = Recorder()
    cut, _, _ = cut_over(recorder, journals())
    cut.freezing({})
    cut.stopped()
    cut.prepare(tmp_path)
    assert recorder.calls == ["sync_files", "prepare"]


def test_files_that_the_dump_has_named_are_carried_after_it(
    journals: Journals, tmp_path: Path
) -> None:
    recorder = Recorder()
    cut, _, _ = cut_over(recorder, journals())
    cut.freezing({})
    cut.stopped()
    (tmp_path / "remap-fpath.img").touch()
    cut.prepare(tmp_path)
    assert recorder.calls == ["sync_files", "sync_files", "prepare"]


def test_files_that_cannot_be_carried_beside_the_dump_end_the_move(
    journals: Journals, tmp_path: Path
) -> None:
    recorder = Recorder("sync_files")
    cut, _, _ = cut_over(recorder, journals())
    cut.freezing({})
    cut.stopped()
    with pytest.raises(ChannelError):
        cut.prepare(tmp_path)
    assert "prepare" not in recorder.calls


def test_a_failed_dump_ends_what_was_begun_beside_it(journals: Journals) -> None:
    class Slow(Recorder):
        stopped = threading.Event()

        def sync_files(self) -> tuple[int, int]:
            self.stopped.wait(60)
            return super().sync_files()

        def stop_files(self) -> None:
            super().stop_files()
            self.stopped.set()

    recorder = Slow()
    cut, _, _ = cut_over(recorder, journals())
    cut.freezing({})
    cut.stopped()
    cut.end()
    cut.end()
    assert recorder.calls == ["stop_files", "sync_files"]


def test_a_failed_prepare_leaves_the_decision_to_the_source(journals: Journals) -> None:
    cut, _, cancellation = cut_over(Recorder("prepare"), journals())
    cut.freezing({})
    with pytest.raises(ChannelError):
        cut.prepare(Path("/x"))
    assert cut.journal.state is State.FROZEN
    assert cancellation.request()


def test_a_failed_commit_is_an_unknown_outcome(journals: Journals) -> None:
    cut, _, _ = cut_over(Recorder("commit"), journals())
    cut.freezing({})
    cut.prepare(Path("/x"))
    with pytest.raises(OutcomeUnknown, match="the cable was cut"):
        cut.commit(lambda: True)


def test_a_source_that_does_not_die_is_never_committed(
    journals: Journals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phaul_runtime.cutover.cutover.DEAD_WITHIN_S", 0.05)
    recorder = Recorder()
    cut, _, _ = cut_over(recorder, journals())
    cut.freezing({})
    cut.prepare(Path("/x"))
    with pytest.raises(OutcomeUnknown, match="still exist"):
        cut.commit(lambda: False)
    assert "commit" not in recorder.calls


def test_no_step_can_be_left_out(journals: Journals) -> None:
    cut, _, _ = cut_over(Recorder(), journals())
    with pytest.raises(MigrationFailed):
        cut.commit(lambda: True)
    with pytest.raises(MigrationFailed):
        cut.prepare(Path("/x"))


def test_cancelling_counts_until_the_destination_is_prepared(journals: Journals) -> None:
    cut, _, cancellation = cut_over(Recorder(), journals())
    cut.freezing({})
    cut.prepare(Path("/x"))
    assert not cancellation.request()
    cut.commit(lambda: True)
    cut, _, cancellation = cut_over(Recorder(), journals())
    cut.freezing({})
    assert cancellation.request()
    with pytest.raises(Cancelled):
        cut.prepare(Path("/x"))


def test_cancelling_interrupts_whoever_waits() -> None:
    cancellation = Cancellation()
    called: list[int] = []
    with cancellation.interrupt_with(lambda: called.append(1)):
        cancellation.request()
    assert called == [1]
    with pytest.raises(Cancelled):
        cancellation.check()


LOG = """(00.000000) Version: 4.1.1 (gitid 0)
(00.018) Warn  (criu/kerndat.c:1): nothing
(00.020130) pie: 17: Error (criu/cr-restore.c:1485): Can't fork for 17: File exists
(00.021000) Error (criu/cr-restore.c:2536): Restoring FAILED.
"""


def test_the_first_error_lines_of_a_log() -> None:
    assert error_lines(LOG) == [
        "pie: 17: Error (criu/cr-restore.c:1485): Can't fork for 17: File exists",
        "Error (criu/cr-restore.c:2536): Restoring FAILED.",
    ]
    assert error_lines("") == []


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("Error (criu/cr-restore.c:1485): Can't fork for 17: File exists", "pid is taken"),
        ("Error (criu/files-reg.c:1): File var/log/x has bad size 7 (expect 3)", "--files copy"),
        ("Error (criu/sk-inet.c:1): inet: Connected TCP socket, consider using"
         " --tcp-established option.", "--tcp-established"),
        ("Error (criu/mem.c:1035): VMA-s are not sorted in the image file", "guard regions"),
        ("Error (criu/image.c:1): No space left on device", "free some space"),
        ("Error (criu/other.c:1): something new", ""),
    ],
)  # fmt: skip
def test_crius_errors_come_with_an_advice(line: str, says: str) -> None:
    assert says in advice([line])
    assert bool(advice([line])) == bool(says)


def test_a_page_format_that_was_not_read_is_not_known() -> None:
    assert CriuVersion(4, 1, 1).page_format is PageFormat.NARROW
    assert CriuVersion(4, 2, 1).page_format is PageFormat.WIDE
    for other in (CriuVersion(4, 0), CriuVersion(4, 3), CriuVersion(5, 1)):
        assert other.page_format is None
    assert [PageFormat.of_number(n) for n in (0, 1, 2, 3)] == [None, *PageFormat, None]
    assert str(CriuVersion(4, 1, 1)) == "4.1.1"


def test_options_are_pycrius_own_message() -> None:
    opts = criu_opts(pid=7, images_dir_fd=3, parent_img=None)
    assert isinstance(opts, rpc_pb2.criu_opts)
    assert not opts.HasField("parent_img")


def test_the_error_tree_in_the_docstring_is_true() -> None:
    drawn = dict(re.findall(r"(\w+) +(\d)  ", errors.__doc__ or ""))
    classes = {
        name: str(int(value.exit_code))
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, PhaulError)
    }
    assert drawn == classes


def test_errors_cross_the_wire() -> None:
    error = errors.CriuError("failed", log=["Error (x)"], log_text="all", hint="do this")
    back = from_wire(to_wire(error), "b")
    assert isinstance(back, errors.CriuError)
    assert (back.log, back.log_text, back.host) == (("Error (x)",), "all", "b")
    assert "hint: do this" in str(back)
    assert isinstance(from_wire(to_wire(KeyError("x")), "b"), DestinationError)


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("ssh://root@b", ("ssh", "b", "root", None)),
        ("ssh://b:2222", ("ssh", "b", "", 2222)),
        ("local:", ("local", "", "", None)),
    ],
)
def test_destinations(url: str, parts: tuple[str, str, str, int | None]) -> None:
    found = Destination.parse(url)
    assert (found.scheme, found.host, found.user, found.port) == parts


@pytest.mark.parametrize("url", ["", "b", "ssh://b:x", "ssh://b/path", "ssh://a:pw@b", "ssh://-x"])
def test_bad_destinations(url: str) -> None:
    with pytest.raises(UsageError):
        Destination.parse(url)


def test_ssh_gets_one_quoted_command() -> None:
    config = Config.model_validate({"workdir": "/run/with space"})
    argv = SshTransport._argv(
        Destination.parse("ssh://root@b:2222"), config, Path("/h"), Path("/t x")
    )
    assert argv[-3:-1] == ["--", "b"]
    assert "--sockets '/t x' --workdir '/run/with space'" in argv[-1]
    assert argv[argv.index("-p") + 1] == "2222"
    assert "BatchMode=yes" in argv


@pytest.mark.parametrize("text", ["", "..", "a/b", "A" * 16, "1" * 65, "1f\n" * 8])
def test_ids_that_are_no_names(text: str) -> None:
    with pytest.raises(UsageError):
        checked_id(text)


@pytest.mark.parametrize("data", [b"[1]", b"{", b"\xff"])
def test_json_that_is_none(data: bytes) -> None:
    with pytest.raises(DestinationError):
        checked_json(data, "manifest")


@pytest.mark.parametrize("name", ["../x.img", "/etc/x.img", ".x.img", "x.sh", "a/b.img"])
def test_image_names_that_lead_elsewhere(tmp_path: Path, name: str) -> None:
    with pytest.raises(DestinationError):
        write_images(tmp_path, [pb.ImagePart(name=name, data=b"x")])
    assert not list(tmp_path.iterdir())


def test_images_are_written_privately(tmp_path: Path) -> None:
    parts = [("a.img", b"old", False), ("a.img", b"1", False), ("a.img", b"2", True)]
    parts.append(("empty.img", b"", False))
    write_images(tmp_path, [pb.ImagePart(name=n, data=d, more=m) for n, d, m in parts])
    assert (tmp_path / "a.img").read_bytes() == b"12"
    assert (tmp_path / "empty.img").read_bytes() == b""
    assert (tmp_path / "a.img").stat().st_mode & 0o777 == 0o600


def test_images_that_one_message_does_not_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_MESSAGE", 10)
    source, arrived = tmp_path / "source", tmp_path / "arrived"
    contents = {"a.img": b"1" * 4, "b.img": bytes(range(25)), "c.img": b"", "d.json": b"{}"}
    for directory in (source, arrived):
        directory.mkdir()
    for name, data in contents.items():
        (source / name).write_bytes(data)
    messages = client.in_messages("1f", source)
    assert len(messages) == 4
    for message in messages:
        assert sum(len(part.data) for part in message.parts) <= 10
        write_images(arrived, message.parts)
    assert {path.name: path.read_bytes() for path in arrived.iterdir()} == contents


def test_numbered_directories_and_their_parents(tmp_path: Path) -> None:
    import os

    dirs = ImageDirs(tmp_path)
    assert (dirs.last, dirs.parent) == (None, None)
    for _ in range(2):
        os.close(dirs.open_next())
    assert (dirs.last, dirs.parent) == (tmp_path / "2", "../1")
    assert (tmp_path / "1").stat().st_mode & 0o777 == 0o700
    assert relative_parent(tmp_path / "final", str(tmp_path / "2")) == "../2"
    assert relative_parent(tmp_path, None) is None


def test_statistics_are_read_from_crius_image(tmp_path: Path) -> None:
    entry = stats_pb2.stats_entry()
    entry.dump.pages_scanned, entry.dump.pages_written, entry.dump.pages_lazy = 100, 60, 0
    entry.dump.pages_skipped_parent, entry.dump.frozen_time = 40, 1_500_000
    entry.dump.freezing_time = entry.dump.memdump_time = entry.dump.memwrite_time = 0
    body = entry.SerializeToString()
    head = struct.pack("<III", 0x55105940, 0x57093306, len(body))
    (tmp_path / "stats-dump").write_bytes(head + body)
    stats = read_dump_stats(tmp_path)
    assert (stats.pages_written, stats.pages_skipped, stats.frozen_s) == (60, 40, 1.5)
    for broken in (b"", head, b"x" * 40):
        (tmp_path / "stats-dump").write_bytes(broken)
        with pytest.raises(MigrationFailed):
            read_dump_stats(tmp_path)


def test_the_generated_messages_are_those_of_the_proto_file(tmp_path: Path) -> None:
    protoc = pytest.importorskip("grpc_tools.protoc", reason="grpcio-tools is a developer's")
    out = tmp_path / "set"
    code = protoc.main(
        ["", f"-I{ROOT}", f"--descriptor_set_out={out}", "phaul_runtime/rpc/phaul.proto"]
    )
    assert code == 0
    now = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file[0]
    committed = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(committed)
    for proto in (now, committed):
        for message in proto.message_type:
            for field in message.field:
                field.ClearField("json_name")
    assert now == committed


def test_a_request_that_is_under_way_is_not_sealed_off() -> None:
    """Who was told that it is cancelled finds it cancelled."""
    racing = Cancellation()
    sealed: list[bool] = []

    def seal() -> None:
        try:
            racing.seal()
        except Cancelled:
            sealed.append(False)
        else:
            sealed.append(True)

    class Requested(threading.Event):
        def set(self) -> None:
            # Between the look whether it is too late and the step after it.
            self.racer = threading.Thread(target=seal)
            self.racer.start()
            self.racer.join(0.2)
            super().set()

    racing._requested = requested = Requested()
    counts = racing.request()
    requested.racer.join(20)
    assert sealed == [not counts]


@pytest.mark.parametrize("handler", [False, True])
def test_a_request_counts_or_is_told_that_it_is_too_late(handler: bool) -> None:
    """Asking and sealing are one step each, from other threads and from a signal handler."""
    asked: list[bool] = []

    class Racing(Cancellation):
        races = False

        def __setattr__(self, name: str, value: object) -> None:
            if name == "_sealed" and value and self.races and not asked:
                # Between the look whether somebody asked and the step after it.
                self.ask()
            super().__setattr__(name, value)

        def ask(self) -> None:
            if handler:
                asked.append(self.request())
                return
            thread = threading.Thread(target=lambda: asked.append(self.request()))
            thread.start()
            thread.join(0.2)

    racing = Racing()
    racing.races = True
    try:
        racing.seal()
        sealed = True
    except Cancelled:
        sealed = False
    while not asked:
        time.sleep(0.01)
    assert asked == [not sealed]
