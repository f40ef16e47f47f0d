"""Bits per byte against parameters at equal training time, for every way to have fewer of them.

    python recipes/benchmarks/parameter_economy.py --steps 200 --seeds 3 --out RESULTS [SOURCE ...]

First the pace: steps of every way in turn, many rounds, medians. Then each way trains on the same text with
the same tokenizer for as many steps as take the time of `--steps` of the first way, so that a busy hour of
the machine cannot favour one. RESULTS holds pace.json and the run folders; what is finished there is not
done again. Without SOURCE: the library source that Python brings.
"""

import argparse
import json
import math
import shutil
import statistics
import time
from pathlib import Path

ATTENTION = ["model.decoder=transformer", "model.num_attention_heads=6"]
WAYS = {
    "tied (the default)": [],
    "untied head": ["model.tie_word_embeddings=false"],
    "factorised, r = d/2": ["model.embedding_size=96"],
    "factorised, r = d/4": ["model.embedding_size=48"],
    "3 layers share": ["model.shared_layers=3"],
    "low-rank MLP, d/2": ["model.mlp_rank=96"],
    "low-rank MLP, d/4": ["model.mlp_rank=48"],
    "attention, 6 key heads": ATTENTION,
    "attention, 2 key heads": [*ATTENTION, "model.num_key_value_heads=2"],
    "attention, 1 key head": [*ATTENTION, "model.num_key_value_heads=1"],
}
ROUNDS = 15


def measure_pace(ways: dict[str, list[str]], vocab_size: int) -> dict[str, float]:
    """Seconds of a step of each way: forward, backward, clipping, optimizer, on rows of random tokens."""
    import torch

    from hf_genlm.model import GenLMForCausalLM
    from hf_genlm.recipe import load_recipe
    from hf_genlm.training.budget import resolve
    from hf_genlm.training.optimizer import OptimizerFactory
    from hf_genlm.training.train import build_config, mixer_types_of

    steps = {}
    for way, settings in ways.items():
        recipe = resolve(load_recipe(None, settings))
        config = build_config(recipe, mixer_types_of(recipe))
        config.vocab_size = vocab_size
        model = GenLMForCausalLM(config)
        optimizer = OptimizerFactory()(model, recipe.training)
        tokens = torch.randint(0, vocab_size, (recipe.training.batch_size, recipe.training.row_length))

        def step(model=model, optimizer=optimizer, tokens=tokens) -> float:
            start = time.perf_counter()
            model(tokens, labels=tokens, use_cache=False, skip_logits=True).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return time.perf_counter() - start

        steps[way] = step
    seconds = {way: [] for way in ways}
    for round_ in range(ROUNDS + 1):
        for way, step in steps.items():
            seconds[way].append(step())
            print(f"\rpace, round {round_} of {ROUNDS}", end="", flush=True)
    print()
    return {way: statistics.median(times[1:]) for way, times in seconds.items()}


def main() -> None:
    """Measure the pace, train what is missing, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="*", metavar="SOURCE")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    from hf_genlm.evaluation.measurement import read_measurements
    from hf_genlm.recipe import load_recipe
    from hf_genlm.run_folder import RunFolder
    from hf_genlm.training.train import train

    found: dict[str, list[dict]] = {way: [] for way in WAYS}
    tokenizer: list[str] = []
    paces: dict[str, float] = {}
    for seed in range(options.seeds):
        for number, (way, settings) in enumerate(WAYS.items()):
            run = RunFolder(options.out / f"{number}-{seed}")
            steps = round(options.steps * paces[next(iter(WAYS))] / paces[way]) if paces else options.steps
            if not run.evaluation.is_file():
                shutil.rmtree(run.path, ignore_errors=True)
                recipe = load_recipe(None, [
                    *settings, *tokenizer, f"training.seed={seed}", f"training.steps={steps}",
                    "training.validations=0", "training.samples=0",
                ])  # fmt: skip
                recipe.corpus.sources = options.sources
                train(recipe, run.path)
            log = {event["event"]: event for event in run.read_log()}
            if not paces:
                tokenizer = [f"tokenizer.path={run.tokenizer}"]
                saved = options.out / "pace.json"
                if not saved.is_file():
                    saved.write_text(json.dumps(measure_pace(WAYS, log["tokenized"]["vocab_size"])))
                paces = json.loads(saved.read_text())
            values = {m.name: m.value for m in read_measurements(run.evaluation)}
            found[way].append({**values, **log["model"], "steps": log["trained"]["steps"]})
            print(f"seed {seed}  {way:<24} {values['bits_per_byte']:.4f}", flush=True)
    print(f"\nas long as {options.steps} steps of the first way; {options.seeds} seeds\n")
    print("| way | parameters | steps | bits per byte |\n|---|---|---|---|")
    for way, runs in found.items():
        bits = [run["bits_per_byte"] for run in runs]
        error = statistics.stdev(bits) / math.sqrt(len(bits)) if len(bits) > 1 else math.nan
        count, steps = runs[0]["parameters"], runs[0]["steps"]
        print(f"| {way} | {count:,} | {steps} | {statistics.mean(bits):.4f} ± {error:.4f} |")


if __name__ == "__main__":
    main()
