"""Descriptions of all recipe fields, for `hf-genlm settings` and the page recipes/guides/settings.md."""

from dataclasses import dataclass
from typing import Any

from hf_genlm.config.fields import kind_of, rule_of
from hf_genlm.config.recipe import Recipe

_HEAD = """# Settings

Every field of a recipe. State one on the command line by `--set section.field=value`, in a recipe file as

```yaml
section:
  field: value
```

or in Python by `recipe.section.field = value`. The value `null` leaves a field open: the run settles it, and
writes its decision to its `recipe.yaml`. `hf-genlm settings WORD` searches this list, by other names too.

Written by `hf_genlm.config.describe.settings_page()`; a test fails where this page and the code differ.
"""


@dataclass(frozen=True)
class FieldRow:
    """One field in words."""

    name: str  # section.key
    kind: str
    default: str  # as YAML writes it
    allowed: str  # the range or the choices; empty: anything of its kind
    help: str
    synonyms: tuple[str, ...]


def describe_fields(word: str | None = None) -> list[FieldRow]:
    """All fields, or those that `word` names: by a part of the name, a synonym, or a word of the help.

    Fields that have it in their name or synonyms come before those that have it in their help.
    """
    rows = []
    for section in Recipe.model_fields:
        for key, info in type(getattr(Recipe(), section)).model_fields.items():
            rule = rule_of(info)
            allowed = ", ".join(rule.choices) or rule.range_text
            kind = kind_of(info.annotation).removesuffix(", or a mapping")
            rows.append(
                FieldRow(
                    f"{section}.{key}",
                    kind,
                    _yaml(info.default),
                    allowed,
                    info.description or "",
                    rule.synonyms,
                )
            )
    if word is None:
        return rows
    word = word.lower().replace("-", "_")
    named = [row for row in rows if word in row.name or any(word in name for name in row.synonyms)]
    return named + [row for row in rows if row not in named and word in row.help.lower()]


def settings_page() -> str:
    """The page of all fields as Markdown, a table per section."""
    parts = [_HEAD]
    for name, info in Recipe.model_fields.items():
        parts.append(f"## {name}\n\n{(info.annotation.__doc__ or '').splitlines()[0]}\n")
        parts.append(
            "| field | type | default | allowed | meaning | also called |\n|---|---|---|---|---|---|"
        )
        for row in describe_fields():
            if row.name.startswith(f"{name}."):
                cells = [f"`{row.name}`", row.kind, f"`{row.default}`", row.allowed, row.help]
                cells.append(", ".join(row.synonyms))
                parts.append(f"| {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def _yaml(value: Any) -> str:
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else f"{value}"
