"""Bits per byte of ours and of a GPT-2 of transformers after equal minutes of training on one text.

    python recipes/benchmarks/equal_minutes.py TEXT --minutes 2 --out RESULTS

The peer has the tokenizer and the split of our run, packed rows of its own context, AdamW, warm-up and a
cosine that ends with the time, and is trained in two shapes at three rates, each for all of the time; the
best counts. Both are measured by one exact pass, the peer in windows of its context.
"""

import argparse
import json
import math
import shutil
from pathlib import Path

from peers import build_gpt2, packed_batches, train_peer

from hf_genlm.config.recipe import load_recipe
from hf_genlm.evaluation.likelihood import measure_likelihood
from hf_genlm.evaluation.measurement import read_measurements
from hf_genlm.training.corpus import TokenizedCorpus, prepare_corpus
from hf_genlm.training.train import train

SHAPES = ((4, 128, 4), (6, 256, 8))  # layers, width, heads
RATES = (5e-4, 1e-3, 2e-3)
CONTEXT, ROWS = 128, 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="*", metavar="TEXT", help="nothing: the source that Python brings")
    parser.add_argument("--validation", metavar="FILE", help="hold out this, instead of splitting")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--decoder", default="gated_linear")
    parser.add_argument("--seeds", type=int, default=1, help="of ours")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    settings = [f"training.minutes={options.minutes}", f"model.decoder={options.decoder}"]
    ours = []
    for seed in range(options.seeds):
        folder = options.out / f"ours-{seed}"
        recipe = load_recipe(None, [*settings, f"training.seed={seed}"])
        recipe.corpus.sources = options.sources
        recipe.corpus.validation = [options.validation] if options.validation else []
        shutil.rmtree(folder, ignore_errors=True)
        run = train(recipe, folder)
        ours.append(_bits(read_measurements(run.evaluation)))
        steps = next(event["steps"] for event in run.read_log() if event["event"] == "trained")
        print(f"ours, seed {seed}: {ours[-1]:.4f} bits per byte after {steps} steps", flush=True)
    written = load_recipe(run.recipe)
    written.tokenizer.path = str(run.tokenizer)
    corpus = prepare_corpus(run, written)
    peers = {}
    for layers, width, heads in SHAPES:
        for rate in RATES:
            name = f"GPT-2, {layers} layers of {width}, rate {rate:g}"
            peers[name] = run_peer(corpus, layers, width, heads, rate, 60 * options.minutes)
            print(f"{name}: {peers[name]:.4f}", flush=True)
    best, mean = min(peers.values()), sum(ours) / len(ours)
    print(f"\nours {mean:.4f}, the best peer {best:.4f}: {best - mean:.4f} bits per byte less")
    (options.out / "result.json").write_text(json.dumps({"ours": ours, "peers": peers}))


def run_peer(
    corpus: TokenizedCorpus, layers: int, width: int, heads: int, rate: float, seconds: float
) -> float:
    """Bits per byte of one shape at one rate."""
    tokenizer = corpus.tokenizer
    model = build_gpt2(len(tokenizer), CONTEXT, layers, width, heads)
    train_peer(model, packed_batches(corpus, CONTEXT, ROWS), rate, lambda _, elapsed_s: elapsed_s / seconds)
    found = measure_likelihood(
        model,
        corpus.validation,
        start_id=tokenizer.bos_token_id,
        context=CONTEXT,
        stride=CONTEXT // 2,
        batch_size=32,
    )
    return _bits(found)


def _bits(measurements: list) -> float:
    return next((m.value for m in measurements if m.name == "bits_per_byte"), math.nan)


if __name__ == "__main__":
    main()
