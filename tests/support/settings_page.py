"""Write the page of settings, recipes/guides/settings.md."""

from pathlib import Path

from hf_genlm.config.recipe import Recipe, describe_fields

PAGE = Path(__file__).parents[2] / "recipes" / "guides" / "settings.md"
_HEAD = """# Settings

Every field of a recipe. State one on the command line by `--set section.field=value`, in a recipe file as

```yaml
section:
  field: value
```

or in Python by `recipe.section.field = value`. The value `null` leaves a field open: the run settles it, and
writes its decision to its `recipe.yaml`. `hf-genlm settings WORD` searches this list, by other names too.

Written by `python tests/support/settings_page.py`; a test fails where this page and the code differ.
"""


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


if __name__ == "__main__":
    PAGE.write_text(settings_page(), encoding="utf-8")
