"""The recipe that options state."""

import argparse

from hf_genlm.recipe import Recipe, load_recipe, set_field


def recipe_of(options: argparse.Namespace, fields: dict[str, str]) -> Recipe:
    """The defaults, overlaid with --recipe, --set, and the options that `fields` gives recipe fields to."""
    recipe = load_recipe(options.recipe, options.assignments)
    for option, name in fields.items():
        value = getattr(options, option, None)
        if value is not None:
            set_field(recipe, name, value)
    if getattr(options, "sources", None):
        set_field(recipe, "corpus.sources", list(options.sources))
    return recipe
