"""How to cite a model, and this package: entries of BibTeX."""

import re
from collections.abc import Sequence

# what TeX reads as a command
_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "{}$&#_%"},
}


def model_entry(
    name: str, *, authors: Sequence[str], year: int | None, url: str | None, version: str | None
) -> str:
    """The entry of a model; what is not known stands in no field.

    Args:
        name: of the model.
        authors: "First Last" or "Last, First", each.
        year: in which it was trained.
        url: its page, taken as it is.
        version: of hf_genlm.
    """
    fields = {
        "title": f"{tex(name)}: a generative language model",
        "author": " and ".join(map(tex, authors)),
        "year": "" if year is None else str(year),
        "url": url or "",
        "note": f"Trained with hf\\_genlm {tex(version or '')}".strip(),
    }
    return _entry("misc", f"{_slug(name)}{'' if year is None else f'-{year}'}", fields)


def package_entry(version: str | None) -> str:
    """The entry of hf_genlm."""
    fields = {
        "title": r"hf\_genlm: from a folder of text to a small generative language model",
        "author": "{The hf\\_genlm authors}",
        "version": tex(version or ""),
        "note": "Python package, Apache-2.0",
    }
    return _entry("software", "hf_genlm", fields)


def tex(text: str) -> str:
    """`text` on one line, every sign of it as TeX prints it."""
    return "".join(_TEX.get(sign, sign) for sign in " ".join(text.split()))


def _entry(kind: str, key: str, fields: dict[str, str]) -> str:
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
    return "\n".join([f"@{kind}{{{key},", *lines, "}"])


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower() or "model"
