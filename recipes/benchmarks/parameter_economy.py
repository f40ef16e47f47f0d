"""Bits per byte against parameters at equal training time, for every way to have fewer of them.

    python recipes/benchmarks/parameter_economy.py --seconds 60 --seeds 3 --out RESULTS [SOURCE ...]

Each way trains on the same text with the same tokenizer for so many seconds, one after another, all ways for
one seed before the next seed, so that a slower hour of the machine meets all of them. RESULTS holds the run
folders; a run that is finished already is not trained again. Without SOURCE: the source that Python brings.
"""

import argparse
import math
import shutil
import statistics
from pathlib import Path

WAYS = {
    "tied (the default)": [],
    "untied head": ["model.tie_word_embeddings=false"],
    "factorised, r = d/2": ["model.embedding_size=96"],
    "factorised, r = d/4": ["model.embedding_size=48"],
    "3 layers share": ["model.shared_layers=3"],
    "low-rank MLP, d/2": ["model.mlp_rank=96"],
    "low-rank MLP, d/4": ["model.mlp_rank=48"],
    "r = d/2 and 3 layers share": ["model.embedding_size=96", "model.shared_layers=3"],
    "attention, 6 key heads": ["model.decoder=transformer", "model.num_attention_heads=6"],
    "attention, 2 key heads": [
        "model.decoder=transformer", "model.num_attention_heads=6", "model.num_key_value_heads=2",
    ],
    "attention, 1 key head": [
        "model.decoder=transformer", "model.num_attention_heads=6", "model.num_key_value_heads=1",
    ],
}  # fmt: skip


def main() -> None:
    """Train what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", nargs="*", metavar="SOURCE")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    from hf_genlm.evaluation.measurement import read_measurements
    from hf_genlm.recipe import load_recipe
    from hf_genlm.run_folder import RunFolder
    from hf_genlm.training.train import train

    found: dict[str, list[dict]] = {way: [] for way in WAYS}
    tokenizer: list[str] = []
    for seed in range(options.seeds):
        for number, (way, settings) in enumerate(WAYS.items()):
            run = RunFolder(options.out / f"{number}-{seed}")
            if not run.evaluation.is_file():
                shutil.rmtree(run.path, ignore_errors=True)
                recipe = load_recipe(None, [
                    *settings, *tokenizer, f"training.seed={seed}",
                    f"training.minutes={options.seconds / 60}", "training.validations=0",
                    "training.samples=0",
                ])  # fmt: skip
                recipe.corpus.sources = options.sources
                train(recipe, run.path)
            tokenizer = tokenizer or [f"tokenizer.path={run.tokenizer}"]
            log = {event["event"]: event for event in run.read_log()}
            values = {m.name: m.value for m in read_measurements(run.evaluation)}
            found[way].append({
                "bits_per_byte": values["bits_per_byte"],
                "parameters": log["model"]["parameters"],
                "tokens_per_s": log["trained"]["tokens_per_s"],
            })  # fmt: skip
            print(f"seed {seed}  {way:<28} {values['bits_per_byte']:.4f}", flush=True)
    print(f"\n{options.seconds:g} s each, {options.seeds} seeds\n")
    print("| way | parameters | tokens/s | bits per byte |\n|---|---|---|---|")
    for way, runs in found.items():
        bits = [run["bits_per_byte"] for run in runs]
        error = statistics.stdev(bits) / math.sqrt(len(bits)) if len(bits) > 1 else math.nan
        pace = statistics.mean(run["tokens_per_s"] for run in runs)
        count, mean = runs[0]["parameters"], statistics.mean(bits)
        print(f"| {way} | {count:,} | {pace:,.0f} | {mean:.4f} ± {error:.4f} |")


if __name__ == "__main__":
    main()
