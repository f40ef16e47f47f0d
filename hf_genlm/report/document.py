"""Reports as self-contained HTML and as Markdown, and the escaping of arbitrary text for both.

Every value of a template is escaped unless a filter of this file has made Markdown of it, and no page holds
a control character. By CommonMark 0.31 and the rules of GitHub's tables, an entity such as `&#124;` is
text, never syntax.
"""

import base64
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hf_genlm.errors import is_control
from hf_genlm.files import write_text

_PLAIN = re.compile(r"[A-Za-z0-9._/+=,@:-]+(?: [A-Za-z0-9._/+=,@:-]+)*")
# a `_` inside a word and marks such as `-` inside a line are not syntax
_INSIDE = r"[#$&*<>@\[\\\]`|~]|(?<![^\W_])_|_(?![^\W_])"
_CELL_SYNTAX = re.compile(_INSIDE)
_SYNTAX = re.compile(rf"{_INSIDE}|^(?:[-+=]+|\d+[.)])(?!\S)")
_FENCE = re.compile(r" {0,3}(`{3,})([^`]*)")


class Markdown(str):
    """Text that is Markdown; a template escapes all other text."""


@dataclass(frozen=True)
class Heading:
    """Heading of a section."""

    text: str
    kind = "heading"


@dataclass(frozen=True)
class Lead:
    """Paragraph with the main result, in large print."""

    text: str
    kind = "lead"


@dataclass(frozen=True)
class Text:
    """Paragraph of plain text."""

    text: str
    kind = "text"


@dataclass(frozen=True)
class Table:
    """Table of formatted cells. The first column names the row; rows with an index in `best` are bold."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    best: frozenset[int] = frozenset()
    kind = "table"


@dataclass(frozen=True)
class Picture:
    """PNG file below the folder of the report. `alternative` describes it for readers who do not see it."""

    path: Path
    alternative: str
    caption: str = ""
    kind = "picture"


@dataclass(frozen=True)
class Code:
    """Commands or settings, verbatim."""

    text: str
    language: str = ""
    kind = "code"


Block = Heading | Lead | Text | Table | Picture | Code


def write_report(folder: Path, title: str, blocks: Sequence[Block]) -> tuple[Path, Path]:
    """Write `report.html` and `report.md` into `folder`; return both paths.

    The HTML needs no other file, no network and no script. The Markdown refers to the pictures by their paths
    relative to `folder`.
    """
    filters = {
        "relative": lambda path: address(path.relative_to(folder).as_posix()),
        "base64": lambda path: base64.b64encode(path.read_bytes()).decode("ascii"),
    }
    paths = []
    for suffix in ("html", "md"):
        page = render(f"report/report_template.{suffix}", filters, title=title, blocks=blocks)
        paths.append(folder / f"report.{suffix}")
        write_text(paths[-1], page)
    return paths[0], paths[1]


def render(template: str, filters: Mapping[str, Callable], **facts: Any) -> str:
    """Render a template of this package, a path such as `card/card_template.md`, with more `filters`.

    Every value is escaped: in HTML by Jinja, in Markdown as a table's cell unless a filter has done it.
    """
    from jinja2 import Environment, StrictUndefined

    def escape(value: Any) -> Any:
        if not isinstance(value, str) or isinstance(value, Markdown):
            return value
        return _CELL_SYNTAX.sub(_as_entities, re.sub(r"\s", " ", value))

    is_html = template.endswith(".html")
    environment = Environment(
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=is_html,
        finalize=None if is_html else escape,
    )
    environment.filters.update(prose=prose, cell=cell, cells=cells, code=code, fence=fence, address=address)
    environment.filters.update(filters)
    source = resources.files("hf_genlm").joinpath(template).read_text(encoding="utf-8")
    return without_controls(environment.from_string(source).render(**facts))


def without_controls(text: str) -> str:
    """Replace control characters, but line ends and tabs, by U+FFFD."""
    if text.replace("\n", "").replace("\t", "").isprintable():
        return text
    return "".join("\ufffd" if is_control(c) and c not in "\n\t" else c for c in text)


def prose(text: object) -> Markdown:
    """Put `text` on one line, with entities for all that Markdown or HTML could read as syntax."""
    return Markdown(_SYNTAX.sub(_as_entities, _on_one_line(text)))


def cell(text: object) -> Markdown:
    """Escape `text` for a table's cell: as `prose`, but a number at the start of the line is left alone."""
    return Markdown(_CELL_SYNTAX.sub(_as_entities, _on_one_line(text)))


def cells(row: Sequence[object]) -> Markdown:
    """The cells of a table's row, escaped and joined."""
    return Markdown(" | ".join(map(cell, row)))


def address(text: str) -> Markdown:
    """Put an address or path between brackets of a link: all but letters, digits and ASCII signs as %XX."""
    safe = "".join(sign for sign in string.punctuation if sign not in "<>()[]`\\\"'|{}^*")
    return Markdown(quote(text, safe=safe, errors="replace"))


def code(text: object) -> Markdown:
    """Put `text` in a code span, or in `<code>` with entities if it could break a span or a table."""
    line = _on_one_line(text)
    return Markdown(f"`{line}`" if _PLAIN.fullmatch(line) else f"<code>{cell(line)}</code>")


def fence(text: object, language: str = "") -> Markdown:
    """Put `text` in a code block whose fence is longer than any run of backticks in the text."""
    lines = str(text).encode("utf-8", "replace").decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    longest = max(map(len, re.findall(r"`+", lines)), default=0)
    marks = "`" * max(3, longest + 1)
    end = "" if lines.endswith("\n") else "\n"
    return Markdown(f"{marks}{language}\n{lines}{end}{marks}")


def fenced_blocks(markdown: str) -> list[str]:
    """Return the contents of all code blocks fenced by backticks; an open one ends with the text."""
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
    """Format 1234567 as `1,234,567`, and None as `unknown`."""
    return "unknown" if number is None else f"{number:,}"


def _as_entities(found: re.Match[str]) -> str:
    return "".join(c if c.isalnum() else f"&#{ord(c)};" for c in found.group())


def _on_one_line(text: object) -> str:
    return without_controls(" ".join(str(text).split()))
