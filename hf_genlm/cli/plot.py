"""`hf-genlm plot`: the curves of one run, or of several over one another."""

import argparse
from pathlib import Path

from hf_genlm.errors import UserError


def run(options: argparse.Namespace) -> None:
    from hf_genlm.report.curves import read_curves
    from hf_genlm.report.figures import save_png
    from hf_genlm.report.plots import draw_curves, write_curves
    from hf_genlm.run_folder import RunFolder

    runs = [RunFolder.open(path) for path in options.run_paths]
    names = [run.path.resolve().name for run in runs]
    labels = names if len(set(names)) == len(names) else options.run_paths
    curves = [read_curves(run, label) for run, label in zip(runs, labels, strict=True)]
    for run, found in zip(runs, curves, strict=True):
        if not found.steps:
            raise UserError(f"{str(run.log_file)!r} holds no step of a training: nothing is to be drawn yet")
    if options.out is None and len(runs) == 1:
        print(write_curves(runs[0]))
        return
    out = Path(options.out or "curves.png")
    try:
        print(save_png(draw_curves(curves), out))
    except OSError as error:
        raise UserError(
            f"--out {str(out)!r} cannot be written ({error.strerror}): name another file"
        ) from error
