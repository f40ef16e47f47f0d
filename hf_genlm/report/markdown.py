"""Strings that others wrote, as Markdown that shows them and does nothing else.

Rules of CommonMark 0.31 and of GitHub's tables: an entity such as `&#124;` is text there, never structure.
"""

import re
import unicodedata

_PLAIN = re.compile(r"[A-Za-z0-9._/+=,@:-]+(?: [A-Za-z0-9._/+=,@:-]+)*")
# a `_` inside a word and marks such as `-` inside a line are text already
_INSIDE = r"[#$&*<>@\[\\\]`|~]|(?<![^\W_])_|_(?![^\W_])"
_SYNTAX_OF_A_CELL = re.compile(_INSIDE)
_SYNTAX = re.compile(rf"{_INSIDE}|^(?:[-+=]+|\d+[.)])")
_FENCE = re.compile(r" {0,3}(`{3,})([^`]*)")
_INVISIBLE = {"Cc", "Cs", "Zl", "Zp"}  # control characters, lone surrogates, line and paragraph separators


def prose(text: object) -> str:
    """`text` on one line, what Markdown or HTML could read as syntax turned into entities."""
    return _SYNTAX.sub(_as_entities, _on_one_line(str(text)))


def cell(text: object) -> str:
    """As `prose`, for a table's cell, which begins no line: a number stays as it is."""
    return _SYNTAX_OF_A_CELL.sub(_as_entities, _on_one_line(str(text)))


def code(text: object) -> str:
    """`text` on one line in a code span; as `<code>` with entities where it could break a span or a table."""
    line = _on_one_line(str(text))
    return f"`{line}`" if _PLAIN.fullmatch(line) else f"<code>{prose(line)}</code>"


def fence(text: object, language: str = "") -> str:
    """A code block of `text`, its fence longer than any run of backticks in it."""
    lines = str(text).encode("utf-8", "replace").decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    longest = max(map(len, re.findall(r"`+", lines)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}{language}\n{lines}{'' if lines.endswith(chr(10)) else chr(10)}{marks}"


def fenced_blocks(markdown: str) -> list[str]:
    """The contents of the code blocks fenced by backticks, in order; one left open ends with the text."""
    blocks: list[str] = []
    inside: list[str] = []
    marks = ""
    for line in markdown.split("\n"):
        found = _FENCE.fullmatch(line.rstrip("\r"))
        if not marks:
            marks = found.group(1) if found else ""
        elif found and len(found.group(1)) >= len(marks) and not found.group(2).strip():
            blocks.append("\n".join(inside))
            inside, marks = [], ""
        else:
            inside.append(line)
    return [*blocks, "\n".join(inside)] if marks else blocks


def count(number: int | None) -> str:
    """1234567 as `1,234,567`."""
    return "unknown" if number is None else f"{number:,}"


def _as_entities(found: re.Match[str]) -> str:
    return "".join(f"&#{ord(c)};" for c in found.group())


def _on_one_line(text: str) -> str:
    visible = ("\ufffd" if unicodedata.category(c) in _INVISIBLE else c for c in " ".join(text.split()))
    return "".join(visible)
