"""A CRIU that cannot start, or is none: the error says what it said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from phaul_runtime.criu import swrk as swrk_module
from phaul_runtime.criu.session import Criu, criu_opts
from phaul_runtime.errors import CriuError, Refused

LOADER = "criu: error while loading shared libraries: libnet.so.9: cannot open shared object file"


def program(tmp_path: Path, text: str, mode: int = 0o755) -> Criu:
    path = tmp_path / "criu"
    path.write_text(text)
    path.chmod(mode)
    return Criu(str(path), deadline_s=20)


def test_what_the_loader_said_is_in_the_message(tmp_path: Path) -> None:
    criu = program(tmp_path, f"#!/bin/sh\necho '{LOADER}' >&2; exit 127\n")
    for ask in (criu.version, criu.feature_check):
        with pytest.raises(CriuError) as caught:
            ask()
        assert f"ended without an answer (code 127): {LOADER}" in caught.value.message
        assert "\n" not in caught.value.message
        assert caught.value.hint == f"try by hand: {criu.binary} --version"


def test_a_program_that_says_nothing_has_its_code_in_the_message(tmp_path: Path) -> None:
    for text, how in (("exit 0", "(code 0)"), ("kill -SEGV $$", "(signal 11)")):
        with pytest.raises(CriuError) as caught:
            program(tmp_path, f"#!/bin/sh\n{text}\n").version()
        assert caught.value.message == f"CRIU's VERSION ended without an answer {how}"


def test_a_request_with_a_log_has_it_too_where_the_log_is_not_begun(tmp_path: Path) -> None:
    criu = program(tmp_path, f"#!/bin/sh\necho before >&2\necho '{LOADER}' >&2; exit 127\n")
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(CriuError) as caught:
            criu.check(criu_opts(images_dir_fd=directory, log_file="check.log"))
    finally:
        os.close(directory)
    assert LOADER in caught.value.message
    assert caught.value.log == ("before", LOADER)


def test_a_prepared_one_says_why_it_ended_too(tmp_path: Path) -> None:
    criu = program(tmp_path, f"#!/bin/sh\necho '{LOADER}' >&2; exit 127\n")
    criu.prepare()
    with pytest.raises(CriuError, match="libnet"):
        criu.wait_pid(1)


def test_a_last_word_of_a_request_is_not_the_next_one_s(tmp_path: Path) -> None:
    criu = program(tmp_path, f"#!/bin/sh\necho '{LOADER}' >&2; exit 127\n")
    with pytest.raises(CriuError, match="libnet"):
        criu.version()
    program(tmp_path, "#!/bin/sh\nexit 3\n")
    with pytest.raises(CriuError) as caught:
        criu.version()
    assert caught.value.message.endswith("(code 3)")
    assert caught.value.log == ()


def test_one_that_does_not_answer_is_ended_and_says_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swrk_module, "_GIVE_UP_S", 0.1)
    criu = program(tmp_path, "#!/bin/sh\necho waiting for a disk >&2\nexec sleep 600\n")
    criu.deadline_s = 0.5
    with pytest.raises(CriuError) as caught:
        criu.version()
    assert caught.value.message == "CRIU did not answer VERSION within 0.5 s"
    assert caught.value.log == ("waiting for a disk",)


@pytest.mark.parametrize(
    ("text", "mode", "said", "remedy"),
    [
        ("#!/bin/sh\n", 0o644, "Permission denied", "chmod +x"),
        ("no program\n", 0o755, "Exec format error", "no program for this machine"),
    ],
)
def test_a_file_that_is_no_program(
    tmp_path: Path, text: str, mode: int, said: str, remedy: str
) -> None:
    criu = program(tmp_path, text, mode)
    with pytest.raises(Refused, match=said) as caught:
        criu.version()
    assert remedy in caught.value.hint


def test_one_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="cannot start no-such-criu") as caught:
        Criu("no-such-criu").version()
    assert caught.value.hint == "install no-such-criu or put it on PATH"
