"""From a recipe to the config of its model, and to its size where that follows from the time."""

import copy
import math
import time
from collections.abc import Callable

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedTokenizerBase

from hf_genlm.config.recipe import ModelRecipe, Recipe
from hf_genlm.errors import UserError, did_you_mean
from hf_genlm.loading import source_of
from hf_genlm.model import MIXER_TYPES, GenLMConfig, GenLMForCausalLM, mixers_of
from hf_genlm.run_folder import RunFolder
from hf_genlm.training.budget import Budget, decay_for, resolve
from hf_genlm.training.plan import is_open, measure_step, plan_size, tokens_of_a_step
from hf_genlm.training.word_vectors import adopt_dimension

# what may be said anew when a run is resumed: it decides nothing about the model
_FREE = {
    "corpus.cache",
    "training.save_minutes",
    "training.save_steps",
    "training.save_total_limit",
    "training.milestone_words",
    "training.report_to",
    "training.logging_steps",
}
_ENDS = {"training.minutes", "training.steps", "training.tokens"}


def build_config(recipe: Recipe, mixer_types: list[str]) -> GenLMConfig:
    """The model's config, but for the vocabulary.

    Raises:
        UserError: shapes that do not fit each other.
    """
    if recipe.model.init_from is not None:
        return _config_of(recipe.model.init_from)
    given = recipe.model.model_dump()
    for name in ("init_from", "decoder", "mixers", "size"):
        del given[name]
    given["bigram_size"] = given["bigram_size"] or None
    try:
        return GenLMConfig(
            **given,
            mixer_types=mixer_types,
            max_position_embeddings=recipe.training.max_seq_length,
            embedding_projection=True if recipe.vectors.path is not None else None,
            initializer_range=round(recipe.model.hidden_size**-0.5, 4),
        )
    except (ValueError, StrictDataclassError) as error:
        reason = error.__cause__ or error
        raise UserError(f"model: {' '.join(str(reason).split())}") from error


def adopt_model(recipe: Recipe) -> Recipe:
    """A copy of `recipe` with the shape and the tokenizer of the model that it goes on from, if it names one.

    Raises:
        UserError: no model of this package lies there, or the recipe says otherwise of what it has.
    """
    source = recipe.model.init_from
    if source is None:
        return recipe
    default = Recipe()
    for section, names in (("model", list(ModelRecipe.model_fields)[1:]),
                           ("tokenizer", ["path", "pattern", "vocab_size"]),
                           ("vectors", ["path"])):  # fmt: skip
        for name in names:
            if getattr(getattr(recipe, section), name) != getattr(getattr(default, section), name):
                raise UserError(
                    f"{section}.{name} is that of the model in {source!r} by --from: leave it out"
                )
    adopted, config = copy.deepcopy(recipe), _config_of(source)
    for name in ModelRecipe.model_fields:
        if hasattr(config, name):
            setattr(adopted.model, name, getattr(config, name))
    adopted.model.mixers = list(config.mixer_types)
    adopted.model.bigram_size = config.bigram_size or 0
    adopted.tokenizer.path = source_of(source)
    adopted.training.init = "random"
    adopted.training.max_seq_length = recipe.training.max_seq_length or config.max_position_embeddings
    return adopted


def load_weights(model: GenLMForCausalLM, source: str) -> None:
    """Those of the model in `source`, whose config `model` was made with.

    Raises:
        UserError: they do not load.
    """
    if len(model.get_input_embeddings().weight) != _config_of(source).vocab_size:
        raise UserError(f"the tokenizer in {source!r} has not as many tokens as its model: save both again")
    model.load_state_dict(GenLMForCausalLM.from_pretrained(source_of(source)).state_dict())


def _config_of(source: str) -> GenLMConfig:
    try:
        config = GenLMConfig.from_pretrained(source_of(source))
    except (OSError, ValueError) as error:
        raise UserError(f"--from {source!r}: {' '.join(str(error).split())}") from error
    if config.model_type != "genlm":
        raise UserError(f"--from {source!r} is a model of {config.model_type}, no model of this package")
    return config


def mixer_types_of(recipe: Recipe) -> list[str]:
    """The mixer's word for each layer, from a resolved recipe.

    Raises:
        UserError: an unknown mixer, with the near word.
    """
    model = recipe.model
    if model.mixers is not None:
        for mixer in model.mixers:
            if mixer not in MIXER_TYPES:
                raise UserError(f"unknown mixer {mixer!r} in --mixers{did_you_mean(mixer, MIXER_TYPES)}")
        return model.mixers
    return mixers_of(model.decoder, model.num_hidden_layers)


def adopt_vocabulary(config: GenLMConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Take the number of tokens and the special ones from the tokenizer."""
    config.vocab_size = len(tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))


def builder_of(
    tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> Callable[[Recipe], GenLMForCausalLM]:
    """What makes new models of resolved recipes, for the vocabulary of `tokenizer`, on `device`."""

    def build(recipe: Recipe) -> GenLMForCausalLM:
        adopt_dimension(recipe)
        config = build_config(recipe, mixer_types_of(recipe))
        adopt_vocabulary(config, tokenizer)
        return GenLMForCausalLM(config).to(device)

    return build


def plan_recipe(
    run: RunFolder,
    given: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    corpus_tokens: int | None,
    budget: Budget,
    device: torch.device,
) -> Recipe:
    """The resolved recipe of a run by the clock: its size, where `given` leaves that open, and its threads.

    The planning is taken from the budget's time, which also gets its most steps.
    """
    given = copy.deepcopy(given)
    given.tokenizer.vocab_size = len(tokenizer)
    build = builder_of(tokenizer, device)
    run.tell("progress", task="planning", done=0, total=None)
    began = time.monotonic()
    shape = None
    if is_open(given):
        plan = plan_size(given, budget.seconds, len(tokenizer), corpus_tokens, build)
        shape, step_s, threads = plan.shape, plan.step_s, plan.threads
    recipe = resolve(given, shape)
    adopt_dimension(recipe)
    if shape is None:
        step_s, threads = measure_step(build(recipe), recipe.training)
    if device.type == "cpu":
        recipe.training.num_threads = threads
        torch.set_num_threads(threads)
    if given.training.num_threads is None:
        budget.step_s = step_s  # a number of threads that was stated is kept to
    seconds = time.monotonic() - began
    budget.seconds = max(step_s, budget.seconds - seconds)
    n_steps = int(budget.seconds / step_s)
    if corpus_tokens is not None:
        budget.steps = max(
            1, math.ceil(recipe.training.max_epochs * corpus_tokens / tokens_of_a_step(recipe.training))
        )
    n_steps = min(budget.steps, int(budget.seconds / step_s))
    if n_steps == budget.steps and recipe.privacy.epsilon is None:  # of a private run more is counted out
        run.log("note", message=_ends_early(n_steps * step_s, recipe.training.max_epochs))
    passes = settle_decay(recipe, n_steps, corpus_tokens)
    run.log(
        "planned",
        hidden_size=recipe.model.hidden_size,
        num_hidden_layers=recipe.model.num_hidden_layers,
        max_seq_length=recipe.training.max_seq_length,
        batch_size=recipe.training.batch_size,
        threads=threads,
        step_s=round(step_s, 5),
        tokens=n_steps * tokens_of_a_step(recipe.training),
        passes=None if passes is None else round(passes, 2),
        weight_decay=recipe.training.weight_decay,
        seconds=round(seconds, 3),
    )
    return recipe


def _ends_early(seconds: float, max_epochs: float) -> str:
    return (
        f"this run ends early, after about {max(1, seconds):.0f} s: a text so small would be learned by "
        f"heart, and is read {max_epochs:g} times at most (training.max_epochs)"
    )


def settle_decay(recipe: Recipe, n_steps: int, corpus_tokens: int | None) -> float | None:
    """Choose `training.weight_decay` of a run of `n_steps` where it was left open; returns its passes over
    the text. Where the tokens of the text are not known (None), it is chosen as for one pass."""
    training = recipe.training
    if corpus_tokens is None:
        passes, steps_of_a_pass = None, float(n_steps)
    else:
        steps_of_a_pass = max(1.0, corpus_tokens / tokens_of_a_step(training))
        passes = n_steps / steps_of_a_pass
    if training.weight_decay is None:
        training.weight_decay = decay_for(passes or 1.0, steps_of_a_pass, training.learning_rate)
    return passes


def adopt_unchanged(recipe: Recipe, stated: Recipe) -> None:
    """Take into `recipe`, that of a run which is resumed, what `stated` may change of it.

    Raises:
        UserError: `stated` says something else than the run began with; what.
    """
    default = Recipe()
    for section in Recipe.model_fields:
        for key, was in getattr(recipe, section):
            name = f"{section}.{key}"
            said, unsaid = (getattr(getattr(each, section), key) for each in (stated, default))
            if said in (unsaid, was):
                continue
            if name not in _FREE:
                began = "" if was is None else f" ({was!r})"
                longer = "; --from goes on from the model of a run that is done" if name in _ENDS else ""
                raise UserError(
                    f"{name} = {said!r} is not what this run began with{began}: resume it without that, or "
                    f"start a new run{longer}"
                )
            setattr(getattr(recipe, section), key, said)
