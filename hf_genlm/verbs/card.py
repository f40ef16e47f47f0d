"""`hf-genlm card`."""

import argparse


def run(options: argparse.Namespace) -> None:
    from hf_genlm.publish.card import write_card
    from hf_genlm.run_folder import RunFolder

    print(write_card(RunFolder.open(options.run_path)))
