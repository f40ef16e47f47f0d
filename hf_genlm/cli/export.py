"""`hf-genlm export`: a trained model for transformers alone, llama.cpp or onnxruntime."""

import argparse
from pathlib import Path

from hf_genlm.cli.display import Display
from hf_genlm.loading import load, source_of


def run(options: argparse.Namespace) -> None:
    source = source_of(options.model)  # before the wait for torch
    out = Path(options.out)
    with Display() as display:
        display.show("loading torch and transformers")
        from hf_genlm.exporting.targets import check_new, export_model, target_of

        target_of(options.to, options.dtype)
        check_new(out)
        model, tokenizer = load(options.model)
        display.show(f"writing and comparing ({options.to})")
        found = export_model(model, tokenizer, options.to, out, options.dtype, Path(source) / "README.md")
    for file in sorted(out.iterdir()):
        print(f"{file.stat().st_size:>14,} bytes  {file}")
    print(
        f"largest difference of a logit from the model's own: {found.largest_difference:.1e}, on "
        f"{found.n_tokens} tokens of {found.n_texts} texts; the likeliest token is the same after "
        f"{found.n_same_choice}"
    )
    print(f"exported: {out}")
