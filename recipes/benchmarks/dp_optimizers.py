"""Which optimizer learns most at one epsilon.

    python recipes/benchmarks/dp_optimizers.py TEXT [--epsilon 8] [--steps 100] [--tries adamw:0.01:1,sgd:1:1]

Paragraphs of TEXT are the documents; the vocabulary is learned from Python's library source. Each try is
OPTIMIZER:RATE:CLIP_NORM, with `none` as clip norm for a run without privacy; all have one seed of the weights
and other noise. Prints bits per byte of the held-out paragraphs.
"""

import argparse
import json
import tempfile
from pathlib import Path

TRIES = (
    "adamw:0.003:1,adamw:0.01:1,adamw:0.03:1,adamw:0.01:0.1,muon:0.003:1,muon:0.01:1,sgd:0.3:1,sgd:1:1,"
    "adamw:0.01:none"
)
SETTINGS = (
    "tokenizer.vocab_size=512",
    "model.mixers=gated_linear",
    "model.hidden_size=64",
    "training.init=random",
    "training.max_seq_length=64",
    "training.batch_size=64",
    "training.gradient_accumulation_steps=4",
    "training.num_validations=0",
    "training.num_samples=0",
)


def main() -> None:
    from hf_genlm.config.recipe import load_recipe
    from hf_genlm.evaluation.measurement import read_measurements
    from hf_genlm.files import read_json
    from hf_genlm.training.train import train

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tries", default=TRIES)
    options = parser.parse_args()
    print("| optimizer | rate | clip norm | epsilon | bits per byte |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "paragraphs.jsonl"
        paragraphs = options.text.read_text(encoding="utf-8").split("\n\n")
        source.write_text("\n".join(json.dumps({"text": text}) for text in paragraphs), encoding="utf-8")
        tokenizer = None
        for i, words in enumerate(options.tries.split(",")):
            optimizer, rate, clip_norm = words.split(":")
            stated = [f"training.optimizer={optimizer}", f"training.learning_rate={rate}"]
            if clip_norm != "none":
                stated += [f"privacy.epsilon={options.epsilon}", f"privacy.clip_norm={clip_norm}"]
            if tokenizer is not None:
                stated.append(f"tokenizer.path={tokenizer}")
            recipe = load_recipe(None, (*SETTINGS, f"training.steps={options.steps}", *stated))
            recipe.corpus.sources = [str(source)]
            run = train(recipe, Path(folder) / str(i))
            tokenizer = tokenizer or run.tokenizer
            bits = {m.name: m for m in read_measurements(run.evaluation)}["bits_per_byte"]
            spent = f"{read_json(run.privacy)['epsilon']:.2f}" if run.privacy.is_file() else "none"
            figure = f"{bits.value:.3f} ± {1.96 * bits.stderr:.3f}"
            print(f"| {optimizer} | {rate} | {clip_norm} | {spent} | {figure} |", flush=True)


if __name__ == "__main__":
    main()
