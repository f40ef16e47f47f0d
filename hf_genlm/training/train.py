"""The main job: from sources to a measured model in a run folder. Run it with `hf-genlm train [SOURCE
...]`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, set_seed

from hf_genlm.errors import UserError
from hf_genlm.evaluation.measurement import Measurement, write_measurements
from hf_genlm.model import GenLMForCausalLM
from hf_genlm.recipe import Recipe
from hf_genlm.run_folder import (
    FollowedRun,
    Listener,
    RunFolder,
    describe_environment,
    write_json,
    write_text,
)
from hf_genlm.text.packing import PackedRows
from hf_genlm.training import processes
from hf_genlm.training.budget import Budget, budget_of, resolve
from hf_genlm.training.configure import (
    adopt_vocabulary,
    build_config,
    mixer_types_of,
    plan_recipe,
    settle_decay,
)
from hf_genlm.training.optimizer import check_optimizer
from hf_genlm.training.pair_start import MOST_TOKENS, start_from_pairs
from hf_genlm.training.plan import tokens_of_a_step
from hf_genlm.training.tokenized import TokenizedCorpus, prepare_corpus
from hf_genlm.training.trainer import check_compiler, fit, likelihood_of, training_arguments_of
from hf_genlm.training.word_vectors import adopt_dimension, start_from_vectors


@contextlib.contextmanager
def _keeping_threads() -> Iterator[None]:
    """A run may take fewer of torch's threads; the process that called for it has its own again then."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_keeping_threads()
def train(recipe: Recipe, out: str | Path, listener: Listener | None = None) -> RunFolder:
    """Read the corpus, train tokenizer and model, measure the saved model, and leave all of it in `out`.

    `listener(event, fields)` hears every logged event, and `progress` {task, done, total} within a stage.
    In a process group every process calls this; the first one alone writes and measures, and the others
    return when it has the model.

    Raises:
        UserError: a recipe, source or folder that cannot be used; nothing is left in `out` then.
    """
    processes.join()
    given, recipe = recipe, resolve(recipe)
    adopt_dimension(recipe)
    config = build_config(recipe, mixer_types_of(recipe))
    check_optimizer(recipe.training.optimizer)
    check_compiler(recipe.training.compile)
    _check_sharding(recipe)
    processes.rows_of_each(recipe.training.batch_size, recipe.training.accumulation)
    processes.share_threads(recipe.training.threads)
    budget = budget_of(recipe.training, tokens_of_a_step(recipe.training))
    run = _open(out, listener)
    try:
        run.log("started", decoder=recipe.model.decoder, mixers=config.mixer_types)
        corpus = prepare_corpus(run, recipe)
        arguments = training_arguments_of(run, recipe.training, budget)
        if budget.seconds is not None:
            n_tokens = corpus.train.n_tokens

            def plan(budget: Budget = budget) -> tuple[Recipe, Budget]:
                device = arguments.device
                return plan_recipe(run, given, corpus.tokenizer, n_tokens, budget, device), budget

            recipe, budget = processes.from_first(plan)
            processes.share_threads(recipe.training.threads)
            config = build_config(recipe, mixer_types_of(recipe))
            arguments = training_arguments_of(run, recipe.training, budget)
        else:
            settle_decay(recipe, budget.steps, corpus.train.n_tokens)
        corpus.tokenizer.model_max_length = recipe.training.row_length
        rows = PackedRows(
            corpus.train,
            row_length=recipe.training.row_length,
            eos_id=corpus.tokenizer.eos_token_id,
            pad_id=corpus.tokenizer.pad_token_id,
        )
        adopt_vocabulary(config, corpus.tokenizer)
        set_seed(recipe.training.seed)
        model = GenLMForCausalLM(config)
        held = processes.from_first(lambda: _start(run, model, rows, corpus, recipe))
        processes.share_weights(model)
    except UserError:
        run.discard()
        raise
    if processes.is_first():
        corpus.tokenizer.save_pretrained(run.tokenizer)  # again: its model_max_length is known now
        write_text(run.recipe, recipe.to_yaml())
        machine = {"device": _describe(arguments.device), "processes": processes.count()}
        write_json(run.environment, {**describe_environment(), **machine})
    run.log("model", parameters=model.num_parameters(), rows=len(rows), row_length=recipe.training.row_length)
    trained = fit(run, model, rows, corpus, recipe, budget, arguments, held)
    if trained is not None:
        save(run, trained, corpus.tokenizer)
        evaluate_run(run, corpus, recipe)
    return run


def _open(out: str | Path, listener: Listener | None) -> RunFolder:
    """The run folder, made by the first process."""
    path = processes.from_first(lambda: RunFolder.create(out, listener).path)
    return RunFolder(path, listener) if processes.is_first() else FollowedRun(path)


def _start(
    run: RunFolder, model: GenLMForCausalLM, rows: PackedRows, corpus: TokenizedCorpus, recipe: Recipe
) -> torch.Tensor | None:
    """Give `model` the start that the recipe names; returns the tokens (V,) whose vectors are to stay."""
    held = None
    if recipe.vectors.path is not None:
        found = start_from_vectors(run, model, corpus.tokenizer, corpus.words, corpus.train.ids, recipe)
        held = torch.from_numpy(found) if recipe.vectors.frozen else None
    if recipe.training.start == "pairs":
        learned = start_from_pairs(
            model, rows.first_tokens(MOST_TOKENS), keep_embedding=recipe.vectors.path is not None
        )
        run.log("pairs", tokens=learned.n_tokens, distinct=learned.n_pairs)
    return held


def _check_sharding(recipe: Recipe) -> None:
    """
    Raises:
        UserError: something that needs whole matrices, where each process holds a part of them.
    """
    stated = {
        "training.optimizer=muon": (recipe.training.optimizer == "muon", "training.optimizer=adamw"),
        "vectors.frozen=true": (recipe.vectors.frozen, "vectors.frozen=false"),
    }
    for name, (is_so, remedy) in stated.items():
        if is_so and processes.is_sharded():
            raise UserError(
                f"{name} needs whole matrices, and FSDP and DeepSpeed leave each process a part of them: "
                f"train by data parallelism alone (--processes), or --set {remedy}"
            )


def save(run: RunFolder, model: GenLMForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write model/: weights, config, tokenizer and the code that loads them without this package."""
    model.save_pretrained(run.model)
    tokenizer.save_pretrained(run.model)
    run.log("saved", bytes=sum(file.stat().st_size for file in run.model.iterdir()))


def evaluate_run(run: RunFolder, corpus: TokenizedCorpus, recipe: Recipe) -> list[Measurement]:
    """Measure the model as it lies on disk, on the whole validation split; writes evaluation.json."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GenLMForCausalLM.from_pretrained(run.model).to(device)

    def on_progress(done: int, total: int) -> None:
        run.tell("progress", task="evaluation", done=done, total=total)

    found = likelihood_of(model, corpus, recipe, on_progress=on_progress)
    write_measurements(run.evaluation, found)
    run.log("evaluated", measurements=[m.to_json() for m in found])
    return found


def _describe(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
