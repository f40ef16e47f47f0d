"""The recipe that options state."""

import argparse

from hf_genlm.config.recipe import ENDS, Recipe, load_recipe, set_field


def recipe_of(options: argparse.Namespace, fields: dict[str, str]) -> Recipe:
    """The defaults, overlaid with --recipe, --set, and the options that `fields` gives recipe fields to.

    An option that ends the run replaces what the recipe's file says of its end.
    """
    recipe = load_recipe(options.recipe, options.assignments)
    stated = {name: getattr(options, option, None) for option, name in fields.items()}
    stated = {name: value for name, value in stated.items() if value is not None}
    is_end_assigned = any(assignment.partition("=")[0].strip() in ENDS for assignment in options.assignments)
    if not is_end_assigned and any(name in ENDS for name in stated):
        for name in ENDS:
            set_field(recipe, name, None)
    for name, value in stated.items():
        set_field(recipe, name, value)
    if getattr(options, "sources", None):
        set_field(recipe, "corpus.sources", list(options.sources))
    return recipe
