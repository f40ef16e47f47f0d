"""`hf-genlm train` as a loop of one's own, in plain Accelerate: for the same recipe the same losses.

    python recipes/train_loop.py RECIPE OUT
    accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/train_loop.py RECIPE OUT

RECIPE is a YAML recipe that counts its steps (training.steps), and starts without word vectors. OUT gets what
every run folder has, but for samples and measurements: `hf-genlm evaluate OUT` makes those.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import set_seed

from hf_genlm.config.recipe import load_recipe
from hf_genlm.config.settings import Facts, TrainingSettings
from hf_genlm.config.settle import settle
from hf_genlm.errors import UserError
from hf_genlm.files import write_text
from hf_genlm.memory import keeping_memory
from hf_genlm.model import GenLMForCausalLM
from hf_genlm.run_folder import RunFolder
from hf_genlm.text.packing import PackedRows, collate
from hf_genlm.training import processes
from hf_genlm.training.bigram_init import MAX_COUNTED_TOKENS, init_from_bigrams
from hf_genlm.training.budget import trapezoid
from hf_genlm.training.build import new_model
from hf_genlm.training.corpus import prepare_corpus
from hf_genlm.training.counting import count_corpus
from hf_genlm.training.optimizer import OptimizerFactory
from hf_genlm.training.trainer import uses_bfloat16


def main(recipe_file: str, out: str) -> None:
    recipe = load_recipe(recipe_file)
    if recipe.training.steps is None or recipe.vectors.path is not None:
        raise UserError(f"{recipe_file!r}: this loop needs training.steps, and has no word vectors")
    processes.join()
    run = RunFolder(out)
    processes.from_first(lambda: RunFolder.create(out).path)
    corpus = prepare_corpus(run, recipe)
    facts = Facts(vocab_size=len(corpus.tokenizer), train_tokens=corpus.n_tokens)
    settings, counts = settle(recipe, facts), None
    if settings.architecture.holds_counts:
        counts = count_corpus(run, corpus, settings)  # the same in every process
        settings = settle(recipe, replace(facts, ngram_sizes=tuple(counts.sizes)))
    training = settings.training
    rows = PackedRows(
        corpus.train,
        training.max_seq_length,
        corpus.tokenizer.eos_token_id,
        corpus.tokenizer.pad_token_id,
    )
    set_seed(training.seed)
    model = new_model(settings, corpus.tokenizer, counts=counts)
    if training.init == "bigrams":
        tokens = rows.first_tokens(MAX_COUNTED_TOKENS)
        init_from_bigrams(model, tokens, keep_embedding=False)  # the same in every process
    set_seed(training.seed)
    is_bfloat16 = uses_bfloat16(training, settings.architecture.hidden_size)
    accelerator = Accelerator(mixed_precision="bf16" if is_bfloat16 else "no")
    with keeping_memory():
        train(
            accelerator, model, rows, training, run, leave_one_out=counts is not None and counts.leave_one_out
        )
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        model.config.use_cache = True
        model.save_pretrained(run.model, state_dict=weights)
        corpus.tokenizer.save_pretrained(run.model)
        write_text(run.recipe, settings.to_recipe().to_yaml())


def train(
    accelerator: Accelerator,
    model: GenLMForCausalLM,
    rows: PackedRows,
    training: TrainingSettings,
    run: RunFolder,
    leave_one_out: bool,
) -> None:
    """Make the steps of the recipe; each one's loss, over all processes, goes to the log."""
    n = accelerator.num_processes
    processes.offset_seed()
    model.train()
    model.config.use_cache = False
    optimizer = OptimizerFactory()(model, training)
    network, optimizer = accelerator.prepare(model, optimizer)

    def share(step: int) -> float:
        at = step + 0.5
        ratios = training.warmup_ratio, training.decay_ratio
        return trapezoid(at / training.steps, *ratios, at, training.warmup_steps)

    schedule = LambdaLR(optimizer.optimizer, share)  # prepared, it would count those of each process
    terms = {
        "label_smoothing": training.label_smoothing_factor,
        "z_loss": training.z_loss,
        "network_share": training.network_share,
        "leave_one_out": leave_one_out,
    }
    steps = steps_of(accelerator, rows, training)
    began, n_tokens = time.monotonic(), 0
    for step, batches in zip(range(1, training.steps + 1), steps, strict=False):
        targets = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
        targets = accelerator.reduce(targets, "sum")  # of all processes: each token counts the same
        loss = torch.zeros((), device=accelerator.device)
        for i, batch in enumerate(batches):
            is_last = i == len(batches) - 1
            with nullcontext() if is_last else accelerator.no_sync(network):
                part = network(**batch, skip_logits=True, num_items_in_batch=targets, **terms).loss
                accelerator.backward(part * n)  # gradients are averaged over the processes
                loss += part.detach()
        accelerator.clip_grad_norm_(network.parameters(), training.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        loss = accelerator.reduce(loss, "sum").item()
        n_tokens += int(targets)
        if accelerator.is_main_process:
            elapsed_s = round(time.monotonic() - began, 3)
            run.log("step", step=step, loss=loss, tokens=n_tokens, elapsed_s=elapsed_s)
            print(f"step {step}  loss {loss:.4f}", file=sys.stderr)


def steps_of(accelerator: Accelerator, rows: PackedRows, training: TrainingSettings) -> Iterator[list[dict]]:
    """Yield the batches of each optimizer step in this process, epoch after epoch."""
    epoch = 0
    order = processes.PaddedSampler(len(rows), training.batch_size, training.seed, lambda: epoch)
    loader = DataLoader(
        processes.PaddedRows(rows),
        batch_size=processes.rows_per_process(training.batch_size, training.gradient_accumulation_steps),
        sampler=order,
        collate_fn=collate,
    )
    loader = accelerator.prepare(loader)
    while True:
        batches = []
        for batch in loader:
            batches.append(batch)
            if len(batches) == training.gradient_accumulation_steps:
                yield batches
                batches = []
        if batches:
            yield batches
        epoch += 1


if __name__ == "__main__":
    main(*sys.argv[1:])
