"""Reports as self-contained HTML and as Markdown, and the escaping of arbitrary text for both.

By CommonMark 0.31 and the rules of GitHub's tables, an entity such as `&#124;` is text, never syntax.
"""

import base64
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from hf_genlm.files import write_text

_PLAIN = re.compile(r"[A-Za-z0-9._/+=,@:-]+(?: [A-Za-z0-9._/+=,@:-]+)*")
# a `_` inside a word and marks such as `-` inside a line are not syntax
_INSIDE = r"[#$&*<>@\[\\\]`|~]|(?<![^\W_])_|_(?![^\W_])"
_CELL_SYNTAX = re.compile(_INSIDE)
_SYNTAX = re.compile(rf"{_INSIDE}|^(?:[-+=]+|\d+[.)])")
_FENCE = re.compile(r" {0,3}(`{3,})([^`]*)")
_INVISIBLE = {"Cc", "Cs", "Zl", "Zp"}  # control characters, lone surrogates, line and paragraph separators


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
    from jinja2 import Environment, StrictUndefined

    paths = []
    for suffix in ("html", "md"):
        environment = Environment(
            undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=suffix == "html"
        )
        environment.filters.update(
            prose=prose,
            cell=cell,
            fence=fence,
            relative=lambda path: path.relative_to(folder).as_posix(),
            base64=lambda path: base64.b64encode(path.read_bytes()).decode("ascii"),
        )
        template = resources.files("hf_genlm.report").joinpath(f"report_template.{suffix}")
        source = environment.from_string(template.read_text(encoding="utf-8"))
        paths.append(folder / f"report.{suffix}")
        write_text(paths[-1], source.render(title=title, blocks=blocks))
    return paths[0], paths[1]


def prose(text: object) -> str:
    """Put `text` on one line, with entities for all that Markdown or HTML could read as syntax."""
    return _SYNTAX.sub(_as_entities, _on_one_line(text))


def cell(text: object) -> str:
    """Escape `text` for a table's cell: as `prose`, but a number at the start of the line is left alone."""
    return _CELL_SYNTAX.sub(_as_entities, _on_one_line(text))


def code(text: object) -> str:
    """Put `text` in a code span, or in `<code>` with entities if it could break a span or a table."""
    line = _on_one_line(text)
    return f"`{line}`" if _PLAIN.fullmatch(line) else f"<code>{prose(line)}</code>"


def fence(text: object, language: str = "") -> str:
    """Put `text` in a code block whose fence is longer than any run of backticks in the text."""
    lines = str(text).encode("utf-8", "replace").decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    longest = max(map(len, re.findall(r"`+", lines)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}{language}\n{lines}{'' if lines.endswith(chr(10)) else chr(10)}{marks}"


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
    return "".join(f"&#{ord(c)};" for c in found.group())


def _on_one_line(text: object) -> str:
    line = " ".join(str(text).split())
    return "".join("\ufffd" if unicodedata.category(c) in _INVISIBLE else c for c in line)
