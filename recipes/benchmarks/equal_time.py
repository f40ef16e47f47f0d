"""Training several ways for equal time, for the benchmarks beside this file.

First the pace: steps of every way in turn, many rounds, medians. Then each way trains on the same text with
the same tokenizer for as many steps as take the time of `--steps` of the first way, so that a busy hour of
the machine cannot favour one. The folder `--out` holds pace.json and the run folders; what is finished there
is not done again.
"""

import argparse
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROUNDS = 15
# what differs is then the way alone: no start from pairs, no table of pairs, one context for all
PLAIN = [
    "training.weight_decay=0.1",
    "training.embedding_decay_ratio=0",
    "training.bigram_decay_ratio=0",
    "model.tie_word_embeddings=true",
    "training.init=random",
    "model.bigram_size=0",
    "evaluation.context_length=128",
]
Ways = dict[str, list[str]]  # name of a way: its recipe, as section.key=value


def compare(
    description: str,
    ways_of: Callable[[argparse.Namespace], Ways],
    add_options: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
) -> None:
    """Measure the pace, train what is missing, then print the table. `ways_of` sees the options given."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help="nothing: the source that Python brings")
    parser.add_argument("--validation", metavar="FILE", help="hold out this, instead of splitting")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="for all ways"
    )
    parser.add_argument("--only", metavar="WORD", help="the ways whose name holds it")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    add_options(parser)
    options = parser.parse_args()
    ways = {
        way: [*options.set, *settings]
        for way, settings in ways_of(options).items()
        if not options.only or options.only in way
    }
    found: dict[str, list[dict]] = {way: [] for way in ways}
    tokenizer: list[str] = []
    paces: dict[str, float] = {}
    for seed in range(options.seeds):
        for number, (way, settings) in enumerate(ways.items()):
            steps = round(options.steps * paces[next(iter(ways))] / paces[way]) if paces else options.steps
            settings = [*settings, *tokenizer, f"training.seed={seed}", f"training.steps={steps}"]
            log = _train(options, options.out / f"{number}-{seed}", settings)
            if not paces:
                tokenizer = [f"tokenizer.path={options.out / f'{number}-{seed}' / 'tokenizer'}"]
                saved = options.out / "pace.json"
                if not saved.is_file():
                    saved.write_text(json.dumps(measure_pace(ways, log["tokenized"]["vocab_size"])))
                paces = json.loads(saved.read_text())
            found[way].append(
                {**log["model"], "steps": log["trained"]["steps"], "bits": log["bits_per_byte"]}
            )
            print(f"seed {seed}  {way:<28} {log['bits_per_byte']:.4f}", flush=True)
    print(f"\nas long as {options.steps} steps of the first way; {options.seeds} seeds\n")
    print("| way | parameters | steps | bits per byte |\n|---|---|---|---|")
    for way, runs in found.items():
        bits = [run["bits"] for run in runs]
        error = statistics.stdev(bits) / math.sqrt(len(bits)) if len(bits) > 1 else math.nan
        count, steps = runs[0]["parameters"], runs[0]["steps"]
        print(f"| {way} | {count:,} | {steps} | {statistics.mean(bits):.4f} ± {error:.4f} |")


def _train(options: argparse.Namespace, folder: Path, settings: list[str]) -> dict:
    """The last event of each name in a run's log, trained where it is not there, and its bits per byte."""
    from hf_genlm.config.recipe import load_recipe
    from hf_genlm.evaluation.measurement import read_measurements
    from hf_genlm.run_folder import RunFolder
    from hf_genlm.training.train import train

    run = RunFolder(folder)
    if not run.evaluation.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        recipe = load_recipe(None, [*settings, "training.num_validations=0", "training.num_samples=0"])
        recipe.corpus.sources = options.sources
        recipe.corpus.validation = [options.validation] if options.validation else []
        train(recipe, folder)
    (bits,) = [m.value for m in read_measurements(run.evaluation) if m.name == "bits_per_byte"]
    return {event["event"]: event for event in run.read_log()} | {"bits_per_byte": bits}


def measure_pace(ways: Ways, vocab_size: int) -> dict[str, float]:
    """Seconds of a step of each way: forward, backward, clipping, optimizer, on rows of random tokens."""
    import torch

    from hf_genlm.config.recipe import load_recipe
    from hf_genlm.config.settle import settle
    from hf_genlm.model import GenLMForCausalLM
    from hf_genlm.training.check import read_facts
    from hf_genlm.training.optimizer import OptimizerFactory

    steps = {}
    for way, settings in ways.items():
        recipe = load_recipe(None, settings)
        settled = settle(recipe, replace(read_facts(recipe), vocab_size=vocab_size))
        training = settled.training
        model = GenLMForCausalLM(settled.architecture)
        optimizer = OptimizerFactory()(model, training)
        tokens = torch.randint(0, vocab_size, (training.batch_size, training.max_seq_length))

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
