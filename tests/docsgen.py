"""What of docs/ is made of the code: `make docs` writes it, and a test holds it against the code.

python -m tests.docsgen [DIRECTORY]
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from phaul_runtime import errors
from phaul_runtime.cli.config_cmd import full_schema
from phaul_runtime.cli.main import cli
from phaul_runtime.errors import MEANINGS, ExitCode, PhaulError

DOCS = Path(__file__).resolve().parents[1] / "docs"
_MADE = "\n<!-- Made by `make docs`: do not edit. -->\n\n"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = list(head)
    lines = [_row(*heads), _row(*["---"] * len(heads)), *(_row(*row) for row in rows)]
    return "\n".join(lines) + "\n"


def _one_line(text: str) -> str:
    return " ".join(text.split())


# -- the configuration -------------------------------------------------------------------------


def config_md() -> str:
    """docs/config.md, from the models of the configuration and of the engines' options."""
    schema = full_schema()
    parts = [
        "# The configuration\n",
        _MADE,
        "/etc/phaul-runtime/config.yaml, then the file of `--config`, then flags: later wins, key "
        "by key.\nA key that is not listed here is an error, which names the nearest one.\n"
        "[config.example.yaml](../config.example.yaml) has all of them with their defaults.\n\n"
        "```sh\n"
        "phaul-runtime config check               # /etc/phaul-runtime/config.yaml\n"
        "phaul-runtime config check move.yaml     # that, and this file laid over it\n"
        "phaul-runtime config schema              # as JSON Schema, for editors\n"
        "```\n\n",
    ]
    plain: list[tuple[str, Any, Any]] = []
    sections: list[tuple[str, Any, Any]] = []
    for name, found in schema["properties"].items():
        target = _resolved(found, schema)
        if name == "engines":
            continue
        (sections if "properties" in target else plain).append((name, found, target))
    parts.append(_keys((name, found) for name, found, _ in plain))
    for name, _, target in sections:
        parts.append(f"\n## {name}\n\n{_one_line(target.get('description', ''))}\n\n")
        parts.append(_keys(target["properties"].items()))
        for key, found in target["properties"].items():
            for each in _listed(found, schema):
                parts.append(f"\n## each of {name}.{key}\n\n{_one_line(each['description'])}\n\n")
                parts.append(_keys(each["properties"].items()))
    for name, target in schema["properties"]["engines"]["properties"].items():
        parts.append(f"\n## engines.{name}\n\n{_one_line(target.get('description', ''))}\n\n")
        parts.append(_keys(target["properties"].items()))
    return "".join(parts)


def _resolved(found: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in found:
        return found
    target: dict[str, Any] = schema["$defs"][found["$ref"].rpartition("/")[2]]
    return target


def _listed(found: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The mapping that a key lists, if it does."""
    kinds = found.get("anyOf", [found])
    return [_resolved(kind["items"], schema) for kind in kinds if "$ref" in kind.get("items", {})]


def _keys(keys: Iterable[tuple[str, dict[str, Any]]]) -> str:
    return _table(
        ("key", "default", "accepted", "meaning"),
        (
            (f"`{name}`", f"`{json.dumps(found.get('default'))}`", _accepted(found),
             _one_line(found.get("description", "")))
            for name, found in keys
        ),
    )  # fmt: skip


def _plain(value: object) -> str:
    """A value as YAML has it."""
    return value if isinstance(value, str) else json.dumps(value)


def _accepted(found: dict[str, Any]) -> str:
    if "$ref" in found:
        return "mappings"
    if "anyOf" in found:
        return " or ".join(_accepted(each) for each in found["anyOf"])
    if "enum" in found:
        return ", ".join(f"`{_plain(value)}`" for value in found["enum"])
    if "const" in found:
        return f"`{_plain(found['const'])}`"
    kind = {"boolean": "true, false", "object": "mapping"}.get(found["type"], found["type"])
    if kind == "array":
        inner = _accepted(found.get("items", {"type": "any"}))
        return f"list of {inner.replace('list of', 'lists of').replace('string', 'strings')}"
    for word, sign in (
        ("exclusiveMinimum", ">"), ("minimum", ">="), ("maximum", "<="), ("exclusiveMaximum", "<"),
    ):  # fmt: skip
        if word in found:
            kind += f" {sign} {found[word]:g}"
    if found.get("pattern") == "^/":
        return "absolute path"
    return f"{kind} like `{found['pattern']}`" if "pattern" in found else kind


# -- errors ------------------------------------------------------------------------------------


def _classes(base: type[PhaulError], depth: int = 0) -> Iterator[tuple[int, type[PhaulError]]]:
    yield depth, base
    for each in base.__subclasses__():
        if each.__module__ == errors.__name__:
            yield from _classes(each, depth + 1)


def errors_md() -> str:
    """docs/errors.md, from errors.py."""
    codes = _table(
        ("exit code", "meaning"), ((str(int(code)), MEANINGS[code]) for code in ExitCode)
    )
    classes = _table(
        ("class", "exit code", "meaning"),
        (
            (
                "&nbsp;" * 4 * depth + f"`{each.__name__}`",
                str(int(each.exit_code)),
                _one_line((each.__doc__ or "").split("\n\n")[0]),
            )
            for depth, each in _classes(PhaulError)
        ),
    )
    return (
        f"# Errors and exit codes\n{_MADE}"
        f"{codes}\n"
        "An error is one line that says what is wrong and, if it was the other one, on which host; "
        "the lines of\nCRIU's log that name the cause follow, then a hint what to do. "
        "[recovery.md](recovery.md) says what is true\nafter each exit code. The report of "
        "`--output json` has `error` and `exit_code`.\n\n"
        "A program that uses the library meets these, of `phaul_runtime.errors`:\n\n"
        f"{classes}"
    )


# -- commands ----------------------------------------------------------------------------------


def commands_md() -> str:
    """docs/commands.md, from the command line's own help."""
    parts = [f"# Commands\n{_MADE}"]
    shared = {option.name for option in _log_options()}
    parts.append("Every command has these:\n\n")
    parts.append(_options([*_log_options(), _help_option()]))
    for path, command in _commands(cli, "phaul-runtime"):
        if isinstance(command, click.Group) and path == "phaul-runtime":
            continue
        own = [p for p in command.params if isinstance(p, click.Option) and p.name not in shared]
        parts.append(f"\n## {_usage(path, command)}\n\n{_help(command)}\n")
        if own:
            parts.append("\n" + _options(own))
    return "".join(parts)


def _log_options() -> list[click.Option]:
    from phaul_runtime.cli.logoptions import log_options

    return log_options()


def _help_option() -> click.Option:
    return click.Option(["-h", "--help"], is_flag=True, help="Explain the command.")


def _commands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    yield path, group
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from _commands(command, f"{path} {name}")
        elif command is not None:
            yield f"{path} {name}", command


def _usage(path: str, command: click.Command) -> str:
    if isinstance(command, click.Group):
        return path
    words = []
    for each in command.params:
        if isinstance(each, click.Argument):
            word = (each.metavar or each.name or "").strip("[]").upper()
            words.append(word if each.required else f"[{word}]")
    return " ".join([path, *words])


def _help(command: click.Command) -> str:
    """Paragraphs; one that click was told to leave as it is stays so here, too."""
    found = []
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        first, _, rest = paragraph.strip("\n").partition("\n")
        if first == "\b":
            found.append(f"```text\n{rest.rstrip()}\n```")
        else:
            found.append(_one_line(paragraph))
    return "\n\n".join(found)


def _options(options: Iterable[click.Option]) -> str:
    rows = []
    for option in options:
        names = ", ".join(f"`{name}`" for name in option.opts)
        if isinstance(option.type, click.Choice):
            names += " " + ", ".join(f"`{choice}`" for choice in option.type.choices)
        elif option.metavar:
            names += f" {option.metavar}"
        default = f" Default: `{option.default}`." if option.show_default else ""
        rows.append((names, _one_line(option.help or "") + default))
    return _table(("option", ""), rows)


FILES = {"config.md": config_md, "errors.md": errors_md, "commands.md": commands_md}


def main(directory: Path) -> None:
    """Write them."""
    for name, make in FILES.items():
        (directory / name).write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS)
