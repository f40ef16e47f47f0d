"""Bits per byte of several ways after equal processor time of one thread, for short runs on a busy machine.

    OMP_NUM_THREADS=1 python recipes/benchmarks/processor_seconds.py TEXT --seconds 60 \\
        --way "model.hidden_size=64 model.num_hidden_layers=1" --way "model.hidden_size=128 ..."

A way is its recipe, as section.key=value. It trains for as many steps as fit into the time at its pace, which
is the lower quartile of its steps' processor time: what else runs makes some steps slower, not those. The
time of `training.init=bigrams` is part of it; a plain loop takes the place of Trainer. With `--passes` it
trains for so many passes over the text instead, whatever they take. A decay that a way leaves open follows
from a measurement of its steps before it trains.
"""

import argparse
import statistics
import time

import torch

from hf_genlm.config.recipe import load_recipe
from hf_genlm.config.settings import Facts, TrainingSettings
from hf_genlm.config.settle import settle
from hf_genlm.evaluation.likelihood import measure_likelihood
from hf_genlm.model import GenLMForCausalLM
from hf_genlm.text.corpus import Corpus, read_corpus
from hf_genlm.text.encoding import encode_documents
from hf_genlm.text.packing import PackedRows, collate
from hf_genlm.text.tokenizer import train_tokenizer
from hf_genlm.training.bigram_init import MAX_COUNTED_TOKENS, init_from_bigrams
from hf_genlm.training.budget import trapezoid
from hf_genlm.training.build import new_model
from hf_genlm.training.optimizer import OptimizerFactory
from hf_genlm.training.plan import measure_step
from hf_genlm.training.trainer import precision_of

FIRST_STEPS = 10  # after which there is a pace


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="*", metavar="TEXT", help="nothing: the source that Python brings")
    parser.add_argument("--validation", metavar="FILE", help="hold out this, instead of splitting")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--passes", type=float, help="over the text, in place of --seconds")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--way", action="append", default=[], metavar="SECTION.KEY=VALUE ...")
    options = parser.parse_args()
    recipe = load_recipe()
    recipe.corpus.sources = options.sources
    recipe.corpus.validation = [options.validation] if options.validation else []
    corpus = read_corpus(recipe.corpus)
    print("| way | parameters | steps | ms a step | bits per byte |\n|---|---|---|---|---|")
    for way in options.way:
        runs = [run(corpus, way.split(), options, seed) for seed in range(options.seeds)]
        bits = [found["bits"] for found in runs]
        error = f" ± {statistics.stdev(bits) / len(bits) ** 0.5:.4f}" if len(bits) > 1 else ""
        first = runs[0]
        print(
            f"| {way} | {first['parameters']:,} | {first['steps']:,} | {1000 * first['pace']:.1f} "
            f"| {statistics.mean(bits):.4f}{error} |",
            flush=True,
        )


def run(corpus: Corpus, settings: list[str], options: argparse.Namespace, seed: int) -> dict[str, float]:
    """One training, and what it came to on the whole validation split."""
    recipe = load_recipe(None, [*settings, f"training.seed={seed}", "training.steps=1"])
    tokenizer = train_tokenizer(corpus.train, recipe.tokenizer, corpus.report["train"]["bytes"])
    documents = encode_documents(tokenizer, corpus.train)
    facts = Facts(vocab_size=len(tokenizer), train_tokens=documents.n_tokens)
    training = settle(recipe, facts).training
    rows = PackedRows(documents, training.max_seq_length, tokenizer.eos_token_id, tokenizer.pad_token_id)
    n_steps = None
    if options.passes is not None:
        n_steps = max(1, int(options.passes * len(rows) / training.batch_size))
    step_s, _ = measure_step(new_model(settle(recipe, facts), tokenizer), training)
    recipe.training.steps = n_steps or int(options.seconds / step_s)
    settled = settle(recipe, facts)
    training = settled.training
    torch.manual_seed(seed)
    model = new_model(settled, tokenizer)
    began = time.process_time()
    if training.init == "bigrams":
        init_from_bigrams(model, rows.first_tokens(MAX_COUNTED_TOKENS), keep_embedding=False)
    spent = time.process_time() - began
    steps, pace = train(model, rows, training, options.seconds - spent, n_steps)
    found = measure_likelihood(
        model.eval(),
        encode_documents(tokenizer, corpus.validation),
        start_id=tokenizer.bos_token_id,
        context=settled.evaluation.context_length,
        stride=settled.evaluation.stride,
        batch_size=32,
    )
    (bits,) = [m.value for m in found if m.name == "bits_per_byte"]
    return {"bits": bits, "steps": steps, "pace": pace, "parameters": model.num_parameters()}


def train(
    model: GenLMForCausalLM, rows: PackedRows, training: TrainingSettings, seconds: float, n_steps: int | None
) -> tuple[int, float]:
    """Steps made, `n_steps` where it is stated, and the seconds of one."""
    optimizer = OptimizerFactory()(model.train(), training)
    peaks = [group["lr"] for group in optimizer.param_groups]
    order: list[int] = []
    times: list[float] = []
    pace = seconds
    while progress_of(times, pace, seconds, n_steps) < 1:
        if len(order) < training.batch_size:
            order = torch.randperm(len(rows)).tolist()
        chosen, order = order[: training.batch_size], order[training.batch_size :]
        batch = collate(rows.__getitems__(chosen))
        progress = progress_of(times, pace, seconds, n_steps)
        if n_steps is not None:
            progress += 0.5 / n_steps  # the middle of the step, as BudgetTrainer has it
        ratios = training.warmup_ratio, training.decay_ratio
        share = trapezoid(progress, *ratios, len(times) + 0.5, training.warmup_steps)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * share
        began = time.process_time()
        with precision_of(model, training):
            loss = model(**batch, use_cache=False, skip_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time() - began)
        pace = statistics.quantiles(times[1:][-200:], n=4)[0] if len(times) > 2 else pace
    return len(times), pace


def progress_of(times: list[float], pace: float, seconds: float, n_steps: int | None) -> float:
    if n_steps is not None:
        return len(times) / n_steps
    if len(times) < FIRST_STEPS:
        return min(0.99, sum(times) / seconds)
    return len(times) * pace / seconds


if __name__ == "__main__":
    main()
