"""`hf-genlm card`: write the model card of a finished run."""

import argparse


def run(options: argparse.Namespace) -> None:
    from hf_genlm.card import write_card

    if_edited = "overwrite" if options.force else "refuse"
    print(write_card(options.run_path, assignments=options.assignments, if_edited=if_edited, redraw=True))
