"""No interpreter is started that looks for modules in the working directory or in PYTHON*."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from phaul_runtime.errors import Refused
from phaul_runtime.system import proc

ROOT = Path(__file__).parents[3]
OURS = ("phaul_runtime", "engines", "hooks", "tests/bench", "tests/lab")
ISOLATED = ("-I", "-P")
_PYTHON = re.compile(r"(\S*bin/)?python3?(\.\d+)?")
# In a command line of a shell, a unit or a Makefile.
_STARTED = re.compile(
    r"(?:\bpython3?|\$\(PYTHON\)|\{sys\.executable\}) +(?!-[IP]\b)(-\S*|\S+\.py\b|\{\S+)( \S+)?"
)
# The first is what people are told to type; the others are of the checkout they are started in.
_ALLOWED = re.compile(r"-m'?,? '?(venv|tests\.\w+|pytest)")


def _files() -> list[Path]:
    found = [
        path
        for directory in OURS
        for path in (ROOT / directory).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and ".egg-info" not in str(path)
    ]
    return [*found, ROOT / "Makefile", *(ROOT / ".ci").iterdir()]


def _in_python(text: str) -> Iterator[tuple[int, str]]:
    tree = ast.parse(text)
    told = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        for word, after in _words(node):
            flag = after.value if isinstance(after, ast.Constant) else None
            if not _is_interpreter(word) or flag in ISOLATED:
                continue
            if not _ALLOWED.search(ast.unparse(node)):
                yield word.lineno, ast.unparse(node)[:80]
        if isinstance(node, ast.JoinedStr):
            yield from ((node.lineno, found) for _, found in _in_shell(ast.unparse(node)))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
            yield from ((node.lineno + at - 1, found) for at, found in _in_shell(node.value))


def _words(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr | None]]:
    """Each word of what may be a command, with the one after it."""
    words: list[ast.expr] = []
    if isinstance(node, ast.List | ast.Tuple):
        words = node.elts
    elif isinstance(node, ast.Call) and ast.unparse(node.func) not in ("Path", "str"):
        words = node.args
    return zip(words, [*words[1:], None], strict=False)


def _is_interpreter(word: ast.expr) -> bool:
    if isinstance(word, ast.Constant):
        return isinstance(word.value, str) and _PYTHON.fullmatch(word.value) is not None
    return ast.unparse(word) in ("sys.executable", "str(sys.executable)", "python")


def _in_shell(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        for found in _STARTED.finditer(line):
            if not _ALLOWED.search(found[0]):
                yield number, line.strip()[:80]


def _starts(path: Path, text: str) -> list[str]:
    python = path.suffix == ".py" or re.match(r"#!.*python", text) is not None
    found = _in_python(text) if python else _in_shell(text)
    return [f"{path}:{line}: {what}" for line, what in found]


def test_every_interpreter_of_ours_is_isolated() -> None:
    found: list[str] = []
    for path in _files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += _starts(path.relative_to(ROOT), text)
    assert found == []


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("x.py", 'run([sys.executable, "-m", "x"])', 'run([sys.executable, "-I", "-m", "x"])'),
        ("x.py", "run([sys.executable, str(x)])", 'run([sys.executable, "-P", str(x)])'),
        ("x.py", 'spawn(sys.executable, "-c", x)', 'spawn(sys.executable, "-I", "-c", x)'),
        ("x.py", 'a = ("/usr/bin/python3", "-c", x)', 'a = ("/usr/bin/python3", "-I", "-c", x)'),
        ("x.py", 'sh("exec python3 -m x agent")', 'sh("exec python3 -I -m x agent")'),
        ("x.py", 'a = f"exec {sys.executable} -m x"', 'a = f"exec {sys.executable} -I -m x"'),
        ("hook", "#!/bin/sh\npython3 - a b <<END", "#!/bin/sh\npython3 -I - a b <<END"),
        ("Makefile", "x:\n\t$(PYTHON) -m pip x", "x:\n\t$(PYTHON) -I -m pip x"),
        ("x.service", "ExecStart=/opt/bin/python3 -m x", "ExecStart=/opt/bin/python3 -I -m x"),
        ("x.sh", "python3 tool.py", "python3 -I tool.py"),
    ],
)
def test_a_start_that_is_not_is_found(name: str, bad: str, good: str) -> None:
    assert len(_starts(Path(name), bad)) == 1
    assert not _starts(Path(name), good)


def test_what_makes_other_files_into_code_is_not_handed_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("PYTHONPATH", "PYTHONSTARTUP", "PYTHONHOME", "PERL5LIB", "BASH_ENV"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("PATH", f".:bin::{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/criu/lib")
    monkeypatch.setenv("PHAUL_KEPT", "yes")
    monkeypatch.delenv("SUDO_UID", raising=False)
    told = dict(
        line.partition("=")[::2] for line in proc.run(["env"], timeout_s=30).stdout.splitlines()
    )
    assert not [name for name in told if name.startswith(("PYTHON", "PERL5", "BASH_ENV"))]
    assert told["PATH"] == f"{tmp_path}:/usr/bin:/bin"
    assert told["PHAUL_KEPT"] == "yes"
    # Root's own wish; of somebody who became root it is not.
    assert told["LD_LIBRARY_PATH"] == "/opt/criu/lib"


def test_nor_what_comes_of_somebody_who_became_root() -> None:
    own = {"SUDO_UID": "1000", "LD_PRELOAD": "/tmp/x.so", "CRIU_CONFIG_FILE": "/tmp/x", "A": "b"}
    assert set(proc.environment(own=own)) == {"SUDO_UID", "A", "PATH"}
    assert proc.environment(own={"PATH": "."})["PATH"].startswith("/usr/local/sbin:")


def test_a_program_of_the_working_directory_is_not_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", ".:/usr/bin:/bin")
    planted = tmp_path / "phaul-planted"
    planted.write_text("#!/bin/sh\n")
    planted.chmod(0o755)
    assert proc.find("phaul-planted") is None
    with pytest.raises(Refused, match="cannot start phaul-planted"):
        proc.run(["phaul-planted"], timeout_s=10)


@pytest.mark.parametrize(
    ("argv", "env"),
    [(["true", "a\0b"], None), (["true"], {"A": "\0"}), (["true", "\ud800"], None)],
)
def test_what_cannot_be_an_argument_is_an_error_of_ours(
    argv: list[str], env: dict[str, str] | None
) -> None:
    with pytest.raises(Refused, match="cannot start true"):
        proc.run(argv, timeout_s=10, env=env)
