"""`hf-genlm card`."""

import argparse


def run(options: argparse.Namespace) -> None:
    from hf_genlm.publish.card import write_card
    from hf_genlm.publish.plots import write_curves
    from hf_genlm.run_folder import RunFolder

    run = RunFolder.open(options.run_path)
    if run.model.is_dir():
        write_curves(run)
    print(write_card(run))
