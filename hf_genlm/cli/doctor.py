"""`hf-genlm doctor`: what this machine can do, or what a model will cost."""

import argparse
import json

from hf_genlm.cli.arguments import MODEL_FIELDS
from hf_genlm.cli.display import Display, installation_lines, model_cost_lines
from hf_genlm.cli.recipes import recipe_of
from hf_genlm.config.recipe import Recipe, load_recipe
from hf_genlm.errors import UserError


def run(options: argparse.Namespace) -> None:
    _check(options)
    if options.parameters is None:
        with Display() as display:
            display.show("loading torch and transformers")
            from hf_genlm.doctor import describe_installation

            installation = describe_installation()
        lines = installation_lines(installation)
        content = installation.to_json()
    else:
        recipe = _recipe_to_examine(options)
        with Display() as display:
            display.show("loading torch and transformers")
            from hf_genlm.doctor import describe_model

            cost = describe_model(recipe)
        lines = model_cost_lines(cost)
        content = cost.to_json()
    print(json.dumps(content, indent=2) if options.json else "\n".join(lines))


def _check(options: argparse.Namespace) -> None:
    """The options that describe a model need a model to describe, and one that is not described already."""
    given = [name for name in (*MODEL_FIELDS, "recipe") if getattr(options, name) is not None]
    option = "--" + given[0].replace("_", "-") if given else "--set"
    if options.parameters is None and (given or options.assignments):
        raise UserError(f"{option} describes a model: add --parameters")
    if options.parameters and given:
        raise UserError(
            f"{option}: the recipe of {options.parameters!r} states it already; "
            "change a field of it by --set section.key=value"
        )


def _recipe_to_examine(options: argparse.Namespace) -> Recipe:
    from hf_genlm.run_folder import RunFolder

    if options.parameters:
        return load_recipe(RunFolder.open(options.parameters).recipe, options.assignments)
    return recipe_of(options, MODEL_FIELDS)
