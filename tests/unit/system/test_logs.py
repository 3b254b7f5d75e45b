"""Log records: their forms, their levels, and whose migration they are about."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import threading
from pathlib import Path

import pytest

from phaul_runtime.system import logs

log = logging.getLogger("phaul_runtime.test")


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("info", "text")
    with logs.about("1f1f"):
        log.info("frozen %d", 5)
    log.warning("of nobody")
    log.debug("not asked for")
    first, second = said(capsys)
    time = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
    assert re.fullmatch(rf"{time} info phaul_runtime\.test \[1f1f\]: frozen 5", first)
    assert re.fullmatch(rf"{time} warning phaul_runtime\.test: of nobody", second)


def test_json_has_the_migration_the_data_and_the_exception(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.set_up("debug", "json")
    log.debug("an\nevent", extra={"migration": "2e2e", "data": {"pid": 7, "path": Path("/x")}})
    try:
        raise OSError("disk")
    except OSError:
        log.exception("failed")
    first, second = map(json.loads, said(capsys))
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "debug", "logger": "phaul_runtime.test", "migration": "2e2e",
        "message": "an\nevent", "data": {"pid": 7, "path": "/x"},
    }  # fmt: skip
    assert second["migration"] is None
    assert second["exception"].endswith("OSError: disk")


def test_the_journal_gets_priorities_and_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("debug", "journal")
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL):
        log.log(level, "two\nlines", extra={"migration": "1f1f"})
    lines = said(capsys)
    assert [line[:3] for line in lines] == [f"<{n}>" for n in (7, 7, 6, 6, 4, 4, 3, 3, 3, 3)]
    assert lines[:2] == ["<7>debug phaul_runtime.test [1f1f]: two", "<7>    lines"]


def test_auto_is_the_journal_only_if_stderr_is_it(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    info = os.fstat(2)
    for stream, journal in ((f"{info.st_dev}:{info.st_ino}", True), ("1:1", False), ("", False)):
        monkeypatch.setenv("JOURNAL_STREAM", stream)
        logs.set_up()
        log.warning("words")
        assert capfd.readouterr().err.startswith("<4>") is journal


def test_of_others_only_warnings_count(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("debug", "text")
    logging.getLogger("urllib3").debug("chatter")
    logging.getLogger("urllib3").warning("trouble")
    (line,) = said(capsys)
    assert line.endswith("warning urllib3: trouble")


def test_it_is_set_up_again_without_a_second_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("debug")
    logs.set_up("error")
    log.warning("no")
    log.error("yes")
    assert len(said(capsys)) == 1


def test_a_context_is_a_threads_own(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("info", "json")
    logs.enter("1f1f")

    def work(name: str) -> None:
        log.info("before")
        logs.enter(name)
        log.info("after")

    for name in ("2e2e", "not an\nid"):
        thread = threading.Thread(target=work, args=(name,))
        thread.start()
        thread.join()
    log.info("here")
    logs.enter("")
    assert [json.loads(line)["migration"] for line in said(capsys)] == [
        None, "2e2e", None, None, "1f1f",
    ]  # fmt: skip


def test_a_record_that_cannot_be_written_is_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = io.StringIO()
    monkeypatch.setattr("sys.stderr", closed)
    logs.set_up("info", "text")
    closed.close()
    monkeypatch.undo()
    log.warning("words")
    assert said(capsys) == []
