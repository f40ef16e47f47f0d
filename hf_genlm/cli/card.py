"""`hf-genlm card`."""

import argparse

from hf_genlm.config.recipe import load_recipe
from hf_genlm.errors import UserError


def run(options: argparse.Namespace) -> None:
    from hf_genlm.card.card import is_by_hand, write_card
    from hf_genlm.card.hub_rules import check_card
    from hf_genlm.files import write_text
    from hf_genlm.report.curves import write_curves
    from hf_genlm.run_folder import RunFolder

    run, card = RunFolder.open(options.run_path), "README.md"
    for assignment in options.assignments:
        if not assignment.lstrip().startswith("card."):
            raise UserError(f"--set {assignment!r}: card.KEY=VALUE alone; all else was settled by training")
    recipe = load_recipe(run.recipe, options.assignments)
    check_card(recipe.card)
    if is_by_hand(run.model / card) and not options.force:
        raise UserError(
            f"{str(run.model / card)!r} was written or changed by hand, and is left as it is: --force writes "
            "the card in its place"
        )
    if run.model.is_dir():
        if options.assignments:
            write_text(run.recipe, recipe.to_yaml())
        write_curves(run)
    print(write_card(run, force=options.force))
