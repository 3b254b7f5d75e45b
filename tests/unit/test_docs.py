"""Every example of the documentation is tried: loaded, parsed, run.

What is made of the code is held against it. The tutorial is also run, on real hosts:
tests/e2e/test_tutorial.py.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from phaul_hooks.webhook import signature

from phaul_runtime.batch.model import load_batch
from phaul_runtime.cli.config_cmd import full_schema
from phaul_runtime.cli.main import cli
from phaul_runtime.config import model as config_module
from phaul_runtime.config.model import load_config
from phaul_runtime.criu.session import Criu
from phaul_runtime.cutover.states import Role
from phaul_runtime.engine import load_engine
from phaul_runtime.errors import ExitCode
from phaul_runtime.hooks.lifecycle import EVENTS, Failure, Hooks, Move
from phaul_runtime.library.api import Outcome, PhaulLocal, PhaulRemote
from phaul_runtime.source import metrics
from phaul_runtime.system.logs import _Json
from phaul_runtime.testing.bench import NoCriu
from phaul_runtime.transport import Destination, load_transport
from tests import docsgen
from tests.docblocks import PAGES, ROOT, Block, blocks, said

BLOCKS = [block for page in PAGES for block in blocks(page)]
# A rule of a Makefile, which may be of several targets.
RULE = r"^(?:[\w-]+ )*{}(?: [\w-]+)*:"
MAKEFILE = (ROOT / "Makefile").read_text()
# What is not ours to know: only that the shell can read it.
FOREIGN = {
    "apt-get", "cat", "cd", "chmod", "docker", "echo", "journalctl", "ln", "mkdir", "pgrep",
    "pip", "pkill", "until", "do", "done", "scp", "sleep", "python3", "rm", "setsid", "systemctl",
    "systemd-run", "tail",
}  # fmt: skip


def of(*kinds: str) -> pytest.MarkDecorator:
    # The transport of one's own is installed and used by test_own_transport.
    found = [b for b in BLOCKS if b.kind in kinds and "DirectoryTransport(" not in b.text]
    assert found
    return pytest.mark.parametrize("block", found, ids=str)


@pytest.fixture(autouse=True)
def no_system_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(config_module, "SYSTEM_CONFIG", tmp_path / "etc.yaml")
    before = list(logging.getLogger().handlers)
    yield
    logging.getLogger().handlers[:] = before


def test_every_block_says_what_it_is() -> None:
    assert {block.kind for block in BLOCKS} == {"ini", "json", "python", "sh", "text", "yaml"}, [
        str(block) for block in BLOCKS if not block.kind
    ]


# -- configurations ----------------------------------------------------------------------------


@of("yaml")
def test_yaml_is_a_configuration(block: Block, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(block.text)
    if "moves" in yaml.safe_load(block.text):
        assert load_batch(file).moves
        return
    config = load_config(file)
    for name in config.engines:
        config.engine_options(name, load_engine(name).options_model)
    if config.transport.to:
        load_transport(Destination.parse(config.transport.to))
    # Its commands are ours, and what they are given makes sense to them.
    for event in EVENTS:
        for command in getattr(config.hooks, event):
            check_command(block, command)


# -- commands ----------------------------------------------------------------------------------


def commands(block: Block) -> Iterator[list[str]]:
    """The simple commands of a block, by words; what a here-document has in it are none."""
    text = re.sub(r"<<'END'.*?\nEND\n", "\n", block.text, flags=re.DOTALL)
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>()")
        lexer.whitespace_split = True
        words: list[str] = []
        redirected = False
        for word in [*lexer, ";"]:
            if not set(word) <= set("&|;<>()"):
                if not redirected:
                    words.append(word)
                redirected = False
            elif set(word) & set("<>"):
                redirected = True
                if words[-1:] == ["2"]:
                    words.pop()
            elif words:
                yield words
                words = []


def check_command(block: Block, words: list[str]) -> None:
    """Ours are parsed; of scripts it is known that there are such."""
    program, *arguments = words
    if program == "phaul-runtime":
        parse(arguments)
    elif program == "make":
        for word in arguments:
            if "=" not in word and not word.startswith("-"):
                assert word == "piggie" or re.search(RULE.format(word), MAKEFILE, re.M), (
                    f"{block}: {word}"
                )
    elif program in ("phaul-haproxy", "phaul-webhook", "phaul-announce"):
        module = import_module(f"phaul_hooks.{program.removeprefix('phaul-')}")
        module._parser().parse_args(arguments)
    elif program.startswith("phaul-"):
        assert (ROOT / "hooks" / program).exists(), f"{block}: {program}"
    elif "/" in program:
        path = program.replace("/usr/local/bin/", "").replace("/opt/phaul-runtime/bin/", "")
        assert path in ("pip", "piggie/piggie") or (ROOT / path).exists(), f"{block}: {program}"
    elif "phaul-runtime" in arguments:
        parse(arguments[arguments.index("phaul-runtime") + 1 :])
    else:
        known = program in FOREIGN or "=" in program
        assert known, f"{block}: {program}: exercise it, or say that it is not ours"


def parse(arguments: list[str]) -> None:
    """Parse a command line of phaul-runtime as click does, and run nothing."""
    command: click.Command = cli
    if arguments in (["--version"], ["--help"]):
        return
    context = click.Context(cli, info_name="phaul-runtime")
    while isinstance(command, click.Group):
        name, *arguments = arguments
        found = command.get_command(context, name)
        assert found is not None, f"no command {name}"
        command = found
        context = click.Context(command, parent=context, info_name=name)
    if "--help" not in arguments:
        command.make_context(command.name, arguments, parent=context.parent)


def is_script(block: Block) -> bool:
    return block.text.startswith("#!")


@of("sh")
def test_commands_are_parsed(block: Block) -> None:
    checked = subprocess.run(["sh", "-n"], input=block.text, text=True, timeout=60, check=False)
    assert checked.returncode == 0
    if is_script(block):
        assert block.text in SCRIPTS, f"{block}: nothing tries this script"
        return
    for words in commands(block):
        check_command(block, words)


@pytest.mark.parametrize(
    "text",
    [
        "phaul-runtime migrate 5 --too x",
        "x=$(phaul-runtime history --outputt json | cat) # why not",
        "systemd-run phaul-runtime migrate --file copy",
        "phaul-runtime migrat",
        "phaul-haproxy --state off app/a",
        "phaul-move-nothing",
        "make nothing",
        "cd /tmp && frob",
    ],
)
def test_a_wrong_command_would_be_seen(text: str) -> None:
    with pytest.raises((AssertionError, click.UsageError, SystemExit)):
        test_commands_are_parsed(Block(ROOT / "README.md", 1, "sh", text + "\n"))


@of("text")
def test_what_is_named_in_text_exists(block: Block) -> None:
    for target in re.findall(r"^make ([a-z0-9-]+)", block.text, re.M):
        assert re.search(RULE.format(target), MAKEFILE, re.M), f"{block}: make {target}"
    for name in re.findall(r"phaul_[a-z_]+_(?:total|seconds)", block.text):
        assert name in (metrics.__doc__ or ""), f"{block}: {name}"


def at_noon(tmp_path: Path, script: str) -> None:
    (tmp_path / "date").write_text("#!/bin/sh\necho 12\n")
    done = run_script(tmp_path, script, "web", "pre_freeze", "source")
    assert (done.returncode, done.stderr) == (1, "web is not moved between 12:00 and 13:00\n")
    (tmp_path / "date").write_text("#!/bin/sh\necho 13\n")
    assert run_script(tmp_path, script, "web", "pre_freeze", "source").returncode == 0
    example = (ROOT / "hooks/examples/pre_freeze.d/10-not-at-noon").read_text()
    # The same, without the comment.
    assert script.splitlines()[1:] == [
        line for line in example.splitlines()[1:] if not line.startswith("#")
    ]


def tells_a_balancer(tmp_path: Path, script: str) -> None:
    (tmp_path / "curl").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "hostname").write_text("#!/bin/sh\necho b.example\n")
    done = run_script(tmp_path, script, "web", "committed", "destination")
    words = done.stdout.splitlines()
    assert json.loads(words[words.index("--json") + 1]) == {"server": "b.example"}
    assert words[-1] == "http://balancer.example:8080/backends/web"
    assert run_script(tmp_path, script, "web", "committed", "source").stdout == ""
    assert run_script(tmp_path, script, "web", "on_rollback", "source").stdout != ""


def run_script(tmp_path: Path, script: str, *words: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "script").write_text(script)
    for path in tmp_path.iterdir():
        path.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    return subprocess.run(
        [str(tmp_path / "script"), *words],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def script_with(word: str) -> str:
    (found,) = [block.text for block in BLOCKS if is_script(block) and word in block.text]
    return found


SCRIPTS: dict[str, Callable[[Path, str], None]] = {
    script_with("between 12:00"): at_noon,
    script_with("balancer.example"): tells_a_balancer,
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: SCRIPTS[script].__name__)
def test_scripts_do_what_is_said(script: str, tmp_path: Path) -> None:
    SCRIPTS[script](tmp_path, script)


# -- JSON --------------------------------------------------------------------------------------


@of("json")
def test_json_has_the_keys_that_are_told(block: Block, capfd: pytest.CaptureFixture[str]) -> None:
    shown = json.loads(block.text)
    if "level" in shown:
        record = logging.LogRecord(shown["logger"], logging.INFO, "", 1, shown["message"], (), None)
        record.migration = shown["migration"]
        made = json.loads(_Json().format(record))
        assert {**made, "time": shown["time"]} == shown
        return
    move = Move(shown["id"], Role(shown["role"]), shown["engine"], shown["target"], shown["peer"])
    hooks = Hooks({shown["event"]: [["sh", "-c", "cat >&2; exit 1"]]})
    if shown["event"] == "on_failure":
        failure = Failure(shown["result"], shown["error"])
        (said_,) = hooks.try_to("on_failure", move, failure=failure)
        told = said_.partition("; ")[2]
    else:
        with pytest.raises(Exception, match="ended with 1") as caught:
            hooks.run(shown["event"], move, shown["pid"])
        told = caught.value.log[0]  # type: ignore[attr-defined]
    assert json.loads(told) == shown


# -- Python ------------------------------------------------------------------------------------


class Local(PhaulLocal):
    def dump_copy_restore(self, *_: object) -> Outcome:
        return Outcome(restored_pid=7)


class Remote(PhaulRemote):
    def start_iter(self) -> None:
        pass

    def stop_iter(self) -> None:
        pass


@of("python")
def test_python_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Criu, "feature_check", NoCriu.feature_check)
    ours, theirs = socket.socketpair()
    directories = {name: tmp_path / name for name in ("server_dir", "client_dir")}
    for directory in directories.values():
        directory.mkdir(mode=0o700)
    names: dict[str, Any] = {
        "pid": os.getpid(), "ours": ours, "theirs": theirs, "local": Local(), "remote": Remote(),
        **{name: str(directory) for name, directory in directories.items()},
    }  # fmt: skip
    with ours, theirs:
        exec(compile(block.text, str(block), "exec"), names)
    if "report" in names:
        assert (names["report"].result, names["report"].restored_pid) == ("moved", 7)
    else:
        body = b'{"schema": 1}\n'
        sent = "sha256=" + hmac.new(b"key", body, hashlib.sha256).hexdigest()
        assert names["is_genuine"](body, signature(b"key", body), b"key")
        assert sent == signature(b"key", body)
        assert not names["is_genuine"](body + b" ", sent, b"key")


# -- what is made of the code, and what has to agree with it -----------------------------------


@pytest.mark.parametrize("name", docsgen.FILES)
def test_what_is_made_of_the_code_is_up_to_date(name: str) -> None:
    made = docsgen.FILES[name]()
    assert (ROOT / "docs" / name).read_text() == made, "make docs"


def test_make_docs_writes_them(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "tests.docsgen", str(tmp_path)], cwd=ROOT, check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(docsgen.FILES)


def test_the_table_of_metrics_is_the_codes() -> None:
    page = (ROOT / "docs/operations.md").read_text()
    assert set(re.findall(r"^\| (phaul_\w+) \|", page, re.M)) == set(
        re.findall(r"^``(phaul_\w+)``", metrics.__doc__ or "", re.M)
    )


def test_readme_has_the_exit_codes() -> None:
    readme = (ROOT / "README.md").read_text()
    table = dict(re.findall(r"^\| (\d) \| (.+?) \|$", readme, re.M))
    codes = {str(int(code)) for code in ExitCode}
    assert codes - {"7"} <= table.keys() <= codes


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        if anchor and found.suffix == ".md":
            heads = re.findall(r"^#+ (.+)$", found.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in heads}


def test_every_key_of_the_example_is_in_the_reference() -> None:
    page = (ROOT / "docs/config.md").read_text()
    example = yaml.safe_load((ROOT / "config.example.yaml").read_text())
    for name, value in example.items():
        sections = value.items() if name == "engines" else [(name, value)]
        for section, keys in sections:
            if not isinstance(keys, dict):
                assert f"| `{name}` |" in page
                continue
            head = f"engines.{section}" if name == "engines" else section
            part = page.partition(f"\n## {head}\n")[2].partition("\n## ")[0]
            assert set(keys) == set(re.findall(r"^\| `(\w+)` \|", part, re.M)), head
    assert set(example) == set(full_schema()["properties"])


def test_output_is_compared_line_by_line() -> None:
    output = "  result         moved\n  id             1f\n"
    assert said("result moved\nid ...\n\n", output) == []
    assert said("result failed\nid ...x", output) == ["result failed", "id ...x"]


def test_the_threat_model_names_tests_that_there_are() -> None:
    text = (ROOT / "docs/threat-model.md").read_text()
    rows = re.findall(r"^\| ([A-Z]\d+) \|.*\| ([^|]*) \|$", text, re.MULTILINE)
    assert len(rows) > 35
    assert len(rows) == len({number for number, _ in rows})
    for number, named in rows:
        for place in re.findall(r"(?:unit|integration|contract|e2e)/[\w./]+", named):
            assert (ROOT / "tests" / place).exists(), f"{number}: {place}"
