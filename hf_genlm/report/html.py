"""A report that stands alone: blocks written as one HTML file with its pictures inside, and as Markdown."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from hf_genlm.files import write_text
from hf_genlm.report import markdown


@dataclass(frozen=True)
class Heading:
    """Of a section; the title of the report stands above all."""

    text: str
    kind = "heading"


@dataclass(frozen=True)
class Lead:
    """The paragraph that says it all, set large."""

    text: str
    kind = "lead"


@dataclass(frozen=True)
class Text:
    """A paragraph of plain words."""

    text: str
    kind = "text"


@dataclass(frozen=True)
class Table:
    """Cells as they are to be read. The first column names the row; `best` rows are set in bold."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    best: frozenset[int] = frozenset()
    kind = "table"


@dataclass(frozen=True)
class Picture:
    """A PNG in the folder of the report, or below it. `alternative` says in words what it shows."""

    path: Path
    alternative: str
    caption: str = ""
    kind = "picture"


@dataclass(frozen=True)
class Code:
    """Commands or settings, word for word."""

    text: str
    language: str = ""
    kind = "code"


Block = Heading | Lead | Text | Table | Picture | Code


def write_report(folder: Path, title: str, blocks: Sequence[Block]) -> tuple[Path, Path]:
    """Write `report.html` and `report.md` into `folder`.

    The HTML needs no other file, no network and no script. The Markdown names the pictures by their path from
    `folder`.

    Returns:
        The paths of both.
    """
    html, plain = folder / "report.html", folder / "report.md"
    write_text(html, _render("report_template.html", title, blocks, folder, is_html=True))
    write_text(plain, _render("report_template.md", title, blocks, folder, is_html=False))
    return html, plain


def _render(template: str, title: str, blocks: Sequence[Block], folder: Path, is_html: bool) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=is_html
    )
    environment.filters.update(
        prose=markdown.prose,
        cell=markdown.cell,
        fence=markdown.fence,
        relative=lambda path: path.relative_to(folder).as_posix(),
        base64=lambda path: base64.b64encode(path.read_bytes()).decode("ascii"),
    )
    source = resources.files("hf_genlm.report").joinpath(template).read_text(encoding="utf-8")
    return environment.from_string(source).render(title=title, blocks=blocks)
