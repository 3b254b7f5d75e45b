"""Text of others, to be shown: names, paths, a log's lines, a peer's words.

An ordinary user chooses the name of a process, of a file, of a container. What such a name has of
control characters, of characters that change the direction of writing, and of bytes that are no
text is shown as an escape (`\\x1b`, `\\n`, `\\u202e`): nothing of it moves a terminal's cursor or
begins a line of its own. JSON escapes by itself, and stays exact.
"""

from __future__ import annotations

_KEPT_BYTE = range(0xDC80, 0xDD00)


def one_line(text: str) -> str:
    """`text` in characters that a terminal shows, on one line."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else _escaped(each) for each in text)


def lines(text: str) -> str:
    """The same, line by line: what is ours between the newlines may hold what is not."""
    return "\n".join(map(one_line, text.split("\n")))


def encodable(text: str) -> str:
    """`text` as UTF-8 has it: only what that cannot hold is an escape."""
    return "".join(each if not "\ud800" <= each <= "\udfff" else _escaped(each) for each in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if code in _KEPT_BYTE:
        # A byte of a file's name that is no UTF-8 (os.fsdecode).
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
