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
from hf_genlm.run_folder import Listener, RunFolder, describe_environment, write_json, write_text
from hf_genlm.training.budget import budget_of, resolve
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
from hf_genlm.training.streamed import StreamedCorpus, prepare_stream
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

    With `corpus.stream`, how much text there is remains unknown: the size and the decay of the weights are
    chosen as for one pass at most, and `training.most_passes` ends nothing; what ends is read again.

    `listener(event, fields)` hears every logged event, and `progress` {task, done, total} within a stage.

    Raises:
        UserError: a recipe, source or folder that cannot be used; nothing is left in `out` then.
    """
    given, recipe = recipe, resolve(recipe)
    adopt_dimension(recipe)
    config = build_config(recipe, mixer_types_of(recipe))
    check_optimizer(recipe.training.optimizer)
    check_compiler(recipe.training.compile)
    if recipe.training.threads is not None:
        torch.set_num_threads(recipe.training.threads)
    budget = budget_of(recipe.training, tokens_of_a_step(recipe.training))
    run = RunFolder.create(out, listener)
    try:
        run.log("started", decoder=recipe.model.decoder, mixers=config.mixer_types)
        corpus = (prepare_stream if recipe.corpus.stream else prepare_corpus)(run, recipe)
        arguments = training_arguments_of(run, recipe.training, budget)
        if budget.seconds is not None:
            recipe = plan_recipe(run, given, corpus.tokenizer, corpus.n_tokens, budget, arguments.device)
            config = build_config(recipe, mixer_types_of(recipe))
            arguments = training_arguments_of(run, recipe.training, budget)
        else:
            settle_decay(recipe, budget.steps, corpus.n_tokens)
        corpus.tokenizer.model_max_length = recipe.training.row_length
        corpus.tokenizer.save_pretrained(run.tokenizer)  # again: its model_max_length is known now
        rows = corpus.rows(recipe.training)
        adopt_vocabulary(config, corpus.tokenizer)
        set_seed(recipe.training.seed)
        model = GenLMForCausalLM(config)
        held = None
        if recipe.vectors.path is not None:
            ids = corpus.known_ids(rows)
            found = start_from_vectors(run, model, corpus.tokenizer, corpus.words, ids, recipe)
            held = torch.from_numpy(found) if recipe.vectors.frozen else None
        if recipe.training.start == "pairs":
            learned = start_from_pairs(
                model, rows.first_tokens(MOST_TOKENS), keep_embedding=recipe.vectors.path is not None
            )
            run.log("pairs", tokens=learned.n_tokens, distinct=learned.n_pairs)
    except UserError:
        run.discard()
        raise
    write_text(run.recipe, recipe.to_yaml())
    write_json(run.environment, {**describe_environment(), "device": _describe(arguments.device)})
    run.log(
        "model", parameters=model.num_parameters(), rows=rows.n_rows, row_length=recipe.training.row_length
    )
    fit(run, model, rows, corpus, recipe, budget, arguments, held)
    save(run, model, corpus.tokenizer)
    evaluate_run(run, corpus, recipe)
    return run


def save(run: RunFolder, model: GenLMForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write model/: weights, config, tokenizer and the code that loads them without this package."""
    model.save_pretrained(run.model)
    tokenizer.save_pretrained(run.model)
    run.log("saved", bytes=sum(file.stat().st_size for file in run.model.iterdir()))


def evaluate_run(
    run: RunFolder, corpus: TokenizedCorpus | StreamedCorpus, recipe: Recipe
) -> list[Measurement]:
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
