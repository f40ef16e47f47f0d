"""`hf-genlm export`: write a trained model for transformers alone, llama.cpp or onnxruntime."""

import argparse
from pathlib import Path

from hf_genlm.cli.display import Display


def run(options: argparse.Namespace) -> None:
    with Display() as display:
        display.show("loading torch and transformers")
        from hf_genlm.exporting import export

        found = export(
            options.model,
            to=options.to,
            output_dir=options.out,
            dtype=options.dtype,
            listener=display.hear,
        )
    out = Path(options.out)
    for file in sorted(out.iterdir()):
        print(f"{file.stat().st_size:>14,} bytes  {file}")
    print(
        f"largest difference of a logit from the model's own: {found.largest_difference:.1e}, on "
        f"{found.n_tokens} tokens of {found.n_texts} texts; the likeliest token is the same after "
        f"{found.n_same_choice}"
    )
    print(f"exported: {out}")
