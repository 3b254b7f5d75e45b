"""YAML and JSON that would take all memory, all time, or the interpreter's stack."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from phaul_runtime import boundedjson
from phaul_runtime.batch.model import load_batch
from phaul_runtime.boundedjson import LEVELS, read_json, read_json_file
from phaul_runtime.config.model import load_config
from phaul_runtime.config.yaml import read_yaml
from phaul_runtime.destination.requests import checked_json
from phaul_runtime.errors import ConfigError, DestinationError

ROOT = Path(__file__).parents[2]


def _bomb() -> str:
    text = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True):
        text += f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    return f"{text}engine: *j\n"


def _doubled() -> str:
    """Sums of thousands of digits, and as many levels."""
    text = "a0: &a0 [x]\n"
    for number in range(1, 3000):
        text += f"a{number}: &a{number} [*a{number - 1}, *a{number - 1}]\n"
    return text


HOSTILE = {
    "bomb": (_bomb(), "aliases make more than"),
    "doubled": (_doubled(), "nested more than|aliases make more than"),
    "deep": ("engine: " + "[" * 5000 + "]" * 5000, "nested more than 32 levels deep"),
    "deeper": ("engine: " + "{a: " * 100_000, "nested more than 32 levels deep"),
    "block": ("\n".join(" " * n + "a:" for n in range(2000)), "nested more than 32 levels deep"),
    "recursive": ("hooks: &h\n  pre_freeze: [[*h]]\n", "an alias leads into itself"),
    "recursive root": ("&h\nengine: *h\n", "an alias leads into itself"),
    "bomb in a key": (_bomb().replace("engine: *j", "? *j\n: x"), "aliases make|a key is a word"),
    "a key of a list": ("? [a, b]\n: x\n", "a key is a word"),
    "wrong tags": ("engine: !!bool maybe\n", "cannot be read"),
    "no number": ("engine: !!int ''\n", "cannot be read"),
    "no time": ("engine: !!timestamp x\n", "cannot be read"),
    "no float": ("engine: !!float x\n", "cannot be read"),
    "digits": (f"engine: {'9' * 5000}\n", "cannot be read|string"),
    "large": ("engine: " + "x" * (9 << 20), "more than 8 MiB"),
    "no text": ("engine: \x00", "special characters are not allowed|cannot be read"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_yaml(name: str, tmp_path: Path) -> None:
    text, wanted = HOSTILE[name]
    path = tmp_path / "x.yaml"
    path.write_bytes(text.encode())
    for read in (read_yaml, load_config, load_batch):
        with pytest.raises(ConfigError, match=wanted) as refused:
            read(path)
        assert len(str(refused.value)) < 1000
        assert "\n" not in refused.value.message


def test_a_bomb_takes_neither_memory_nor_time(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(HOSTILE["bomb"][0])
    done = subprocess.run(
        [sys.executable, "-I", "-m", "phaul_runtime", "config", "check", str(path)],
        capture_output=True, text=True, timeout=300, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30)),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-500:]
    assert done.stderr.count("\n") == 1, done.stderr[-500:]


def test_no_code_is_run(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"engine: !!python/object/apply:os.mkdir ['{tmp_path}/ran']\n")
    with pytest.raises(ConfigError, match="engine"):
        load_config(path)
    assert not (tmp_path / "ran").exists()


def test_aliases_as_people_use_them(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        "defaults: {to: ssh://root@b}\n"
        "groups: {g: {after: &first [one]}}\n"
        "moves:\n- {target: one}\n- {target: two, after: *first, group: g}\n"
    )
    assert load_batch(path).moves[1].after == ["one"]
    many = "x: &x {a: 1, b: 2, c: 3}\ny:\n" + "- *x\n" * 10_000
    path.write_text(many)
    assert len(read_yaml(path).values["y"]) == 10_000
    path.write_text(f"{many}z:\n" + "- *x\n" * 10_000)
    with pytest.raises(ConfigError, match="aliases make more than"):
        read_yaml(path)


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (b"[" * 200_000, "nested more than 64 levels deep"),
        (b'{"a":' * 200_000, "nested more than 64 levels deep"),
        (b"[" * 200_000 + b"]" * 200_000, "nested more than 64 levels deep"),
        (b"[" * 500 + b"]" * 500, "nested more than 64 levels deep"),
        (b'{"a":[NaN]}', "NaN is no number"),
        (b'{"a":-Infinity}', "-Infinity is no number"),
        (b'{"a":' + b"9" * 10_000 + b"}", "digits"),
        (b'{"a":"\xff"}', "utf-8"),
        (b"", "Expecting value"),
    ],
)
def test_json(data: bytes, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        read_json(data)
    if data:
        with pytest.raises(DestinationError, match="malformed manifest"):
            checked_json(data, "manifest")


def test_json_as_people_write_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "[" * LEVELS + "]" * LEVELS
    assert read_json(text) == json.loads(text)
    with pytest.raises(ValueError, match="levels"):
        read_json(f"[{text}]")
    path = tmp_path / "config.json"
    path.write_text('{"linux": {}}')
    assert read_json_file(path) == {"linux": {}}
    monkeypatch.setattr(boundedjson, "MOST_BYTES", 8)
    with pytest.raises(ValueError, match="it has more than"):
        read_json_file(path)


def test_what_others_wrote_is_read_in_one_place() -> None:
    """What is left is what we wrote ourselves, or has bounds of its own."""
    ours = {"boundedjson.py", "journal_format.py", "client.py", "fakevictim.py", "bench.py",
            "checks.py", "fake.py"}  # fmt: skip
    found = [
        path.name
        for part in ("phaul_runtime", "engines", "hooks")
        for path in (ROOT / part).rglob("*.py")
        if re.search(r"json\.loads?\(|yaml\.(safe_)?load|\.json\(\)", path.read_text())
    ]
    # control.py reads back what it has written.
    assert set(found) - ours <= {"control.py"}
