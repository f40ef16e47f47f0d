"""`hf-genlm plot`: draw the training curves of one run, or of several in one figure."""

import argparse


def run(options: argparse.Namespace) -> None:
    from hf_genlm.report import plot

    print(plot(options.run_paths, options.out))
