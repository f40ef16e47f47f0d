"""Settle a recipe: decide every open field, from the recipe and from facts that were measured or read.

    settle(recipe, facts) -> Settings

This is the only place that decides. It is pure, so it can also be asked before all facts are known, to check
a recipe or to try a size; facts that are not known yet have defaults. Rules that were measured:
recipes/LOG.md.
"""

import copy
import math
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from hf_genlm.config.fields import read_count
from hf_genlm.config.recipe import ModelRecipe, Recipe, TrainingRecipe
from hf_genlm.config.settings import (
    CardSettings,
    CorpusSettings,
    EvaluationSettings,
    Facts,
    Length,
    ModelSettings,
    Pace,
    PrivacySettings,
    Settings,
    Shape,
    TokenizerSettings,
    TrainingSettings,
    VectorsSettings,
)
from hf_genlm.errors import UserError, did_you_mean
from hf_genlm.model import GenLMConfig, mixers_of
from hf_genlm.model.configuration_genlm import NGRAM, RECURRENT_MIXERS

DEFAULT_MINUTES = 3.0
ASSUMED_VOCAB_SIZE = 4096
MAX_STEPS = 10**9
MAX_PARAMETERS = 1e12
_BIGRAM_SIZE = 16_384  # rows; a gated linear recurrence gains by the pairs, a cell does not
_NGRAM_ORDER = 5  # of counts beside a network
_NGRAM_HISTORY = 1024  # tokens that are read beside them
_NGRAM_ENTRIES = {True: 20_000_000, False: 4_000_000}  # of counts alone, and beside a network
_MIN_RECURRENT_CONTEXT = 256  # tokens; a state reaches beyond the rows of its training, attention does not
_LEARNING_RATE_AT_256 = 3e-3  # AdamW's best peak for a width of 256; it falls with the root of the width
_BIGRAM_WARMUP_STEPS = 10  # Adam's first steps, which know only signs, would undo what was fitted
_MIN_DECAY, _MAX_DECAY = 0.1, 6.0
_MEMORY_EPOCHS = 0.63  # that AdamW remembers a weight for, at full decay
_FULL_DECAY_EPOCHS = 4.0
_NUM_VALIDATIONS, _SHORT_S = 4, 29.0  # planning takes its part of half a minute
SIZES = {
    "tiny": Shape(hidden_size=192, num_hidden_layers=3, max_seq_length=128, batch_size=16),
    "small": Shape(hidden_size=384, num_hidden_layers=6, max_seq_length=256, batch_size=32),
    "base": Shape(hidden_size=768, num_hidden_layers=12, max_seq_length=512, batch_size=32),
}


def settle_reading(recipe: Recipe, facts: Facts) -> Recipe:
    """A copy of `recipe` with what must be decided before the text is read: the split and the tokenizer."""
    reading = recipe.model_copy(deep=True)
    if reading.privacy.epsilon is not None:
        reading.corpus.split_by_hash = True  # each document by itself alone
    if facts.base_source is not None:
        reading.tokenizer.path = facts.base_source
    return reading


def settle(recipe: Recipe, facts: Facts | None = None) -> Settings:
    """Decide every open field of `recipe`.

    Raises:
        UserError: an unknown size, fields that contradict each other, or shapes that no model can have.
    """
    facts = facts or Facts()
    recipe = _with_base(settle_reading(recipe, facts), facts)
    vectors = recipe.vectors
    if vectors.frozen and vectors.path is None:
        raise UserError("vectors.frozen holds word vectors, and none are given: add --vectors FILE")
    if vectors.unfreeze_step is not None and not vectors.frozen:
        raise UserError(
            f"vectors.unfreeze_step = {vectors.unfreeze_step} releases frozen rows, and none are frozen: add "
            "--set vectors.frozen=true, or leave it out"
        )
    shape = _settle_shape(recipe, facts)
    is_narrow = recipe.model.embedding_size is not None  # few parameters are wanted
    is_tied = False if recipe.model.is_ngram else recipe.model.tie_word_embeddings
    if is_tied is None:
        is_tied = is_narrow and vectors.path is None  # word vectors are a poor head
    is_private = recipe.privacy.epsilon is not None  # counts of the text must not go into the model
    is_random = is_private or is_tied or recipe.model.is_ngram
    init = recipe.training.init or ("random" if is_random else "bigrams")
    if init == "bigrams" and is_tied:
        raise UserError(
            "training.init = 'bigrams' fits the head to the text, and model.tie_word_embeddings makes it the "
            "embedding: set one of them otherwise"
        )
    architecture = _settle_architecture(recipe, facts, shape, init, is_tied)
    model = _model_settings(recipe.model, architecture)
    training, length = _settle_training(recipe, facts, shape, init)
    return Settings(
        corpus=CorpusSettings(**recipe.corpus.model_dump()),
        tokenizer=TokenizerSettings(
            **{**recipe.tokenizer.model_dump(), "vocab_size": architecture.vocab_size}
        ),
        model=model,
        vectors=VectorsSettings(**vectors.model_dump()),
        training=training,
        evaluation=_settle_evaluation(
            recipe, model, shape.max_seq_length, architecture.max_position_embeddings
        ),
        privacy=PrivacySettings(
            **{**recipe.privacy.model_dump(), "delta": _or(recipe.privacy.delta, facts.delta)}
        ),
        card=CardSettings(**recipe.card.model_dump()),
        length=length,
        architecture=architecture,
    )


def decay_for(epochs: float, epoch_steps: float, learning_rate: float) -> float:
    """Weight decay that keeps a model from overfitting a text that it sees `epochs` times.

    AdamW forgets what a weight was with a time constant of 1 / (learning rate x decay) steps, which is best
    stated in epochs (Wang and Aitchison, 2024, arXiv:2405.13698). A text that is seen once or twice needs
    hardly any; the full decay holds from the fourth epoch on.
    """
    full = 1 / (learning_rate * _MEMORY_EPOCHS * epoch_steps)
    share = min(1.0, max(0.0, (epochs - 1) / (_FULL_DECAY_EPOCHS - 1)))
    return float(f"{min(_MAX_DECAY, max(_MIN_DECAY, share * full)):.2g}")


def is_size_open(recipe: Recipe) -> bool:
    """True if a recipe leaves the size of the decoder to its time."""
    model, training = recipe.model, recipe.training
    if recipe.model.is_ngram:
        return False
    sizes = (model.init_from, model.size, model.hidden_size, model.num_hidden_layers, model.mixers)
    return training.steps is None and training.tokens is None and all(size is None for size in sizes)


def shape_of_size(size: str) -> Shape:
    """The shape of a named size, or of a parameter count such as 30M.

    Raises:
        UserError: neither of them.
    """
    if size in SIZES:
        return SIZES[size]
    target = read_count(size)
    if target is None:
        raise UserError(
            f"unknown --size {size!r}{did_you_mean(size, SIZES)}, or a parameter count such as 30M"
        )
    if not 1 <= target <= MAX_PARAMETERS:
        raise UserError(f"--size {size!r}: from 1 to {MAX_PARAMETERS:,.0f} parameters, such as 30M")
    # a layer holds about 12 d^2 parameters; depth grows with width as in the named sizes (d = 64 per layer)
    width = max(64, 64 * round((target / 12 * 64) ** (1 / 3) / 64))
    nearest = min(SIZES.values(), key=lambda shape: abs(math.log(shape.hidden_size / width)))
    return Shape(width, max(1, round(target / (12 * width**2))), nearest.max_seq_length, nearest.batch_size)


def _or(stated: Any, decided: Any) -> Any:
    return decided if stated is None else stated


def _with_base(recipe: Recipe, facts: Facts) -> Recipe:
    """`recipe` with the shape and the tokenizer of the model that it continues from, if it names one."""
    base, default = facts.base, Recipe()
    if base is None:
        return recipe
    own: dict[str, dict[str, Any]] = {
        "model": {
            **{name: getattr(default.model, name) for name in ("decoder", "size")},
            **{name: getattr(base, name) for name in ModelRecipe.model_fields if hasattr(base, name)},
            "mixers": list(base.mixer_types or ()),
            "bigram_size": base.bigram_size or 0,
            "ngram_order": base.ngram_order or 0,
            "ngram_history": base.ngram_history or 0,
        },
        "tokenizer": {"path": facts.base_source, "pattern": "own", "vocab_size": base.vocab_size},
        "vectors": {"path": None},
        "training": {"init": "random"},
    }
    for section, values in own.items():
        for name, value in values.items():
            if getattr(getattr(recipe, section), name) not in (
                value,
                getattr(getattr(default, section), name),
            ):
                raise UserError(
                    f"{section}.{name} is that of the model in {recipe.model.init_from!r} by --from: leave "
                    "it out"
                )
            setattr(getattr(recipe, section), name, value)
    recipe.training.max_seq_length = recipe.training.max_seq_length or base.max_position_embeddings
    return recipe


def _settle_shape(recipe: Recipe, facts: Facts) -> Shape:
    model, training = recipe.model, recipe.training
    n_layers = model.num_hidden_layers
    if model.mixers is not None:
        if not 1 <= len(model.mixers) <= 1000:
            raise UserError(
                f"model.mixers names {len(model.mixers)} layers: name from 1 to 1,000, or a --decoder"
            )
        if n_layers not in (None, len(model.mixers)):
            raise UserError(
                f"model.num_hidden_layers = {n_layers}, and model.mixers names {len(model.mixers)}: leave "
                "one of them out"
            )
        n_layers = len(model.mixers)
    default = SIZES["tiny"] if facts.shape is None else facts.shape
    if model.size is not None:
        default = shape_of_size(model.size)
    if recipe.model.is_ngram:
        n_layers = 1
    return Shape(
        model.hidden_size or default.hidden_size,
        n_layers or default.num_hidden_layers,
        training.max_seq_length or default.max_seq_length,
        training.batch_size or default.batch_size,
    )


def _settle_architecture(recipe: Recipe, facts: Facts, shape: Shape, init: str, is_tied: bool) -> GenLMConfig:
    vocab_size = _or(facts.vocab_size, _or(recipe.tokenizer.vocab_size, ASSUMED_VOCAB_SIZE))
    if facts.base is not None:
        config = copy.deepcopy(facts.base)
        config.vocab_size = vocab_size
        return config
    if recipe.model.is_ngram:  # the fields of a network have no meaning here
        if recipe.model.ngram_order == 0:
            raise UserError("the decoder ngram counts n-grams of at least 1 token: model.ngram_order = 0")
        return GenLMConfig(
            mixer_types=[NGRAM],
            vocab_size=vocab_size,
            max_position_embeddings=shape.max_seq_length,
            **_counts_of(recipe.model.ngram_order, facts),
        )
    stated = recipe.model.model_dump()
    embedding_size = stated["embedding_size"]
    if facts.vector_size is not None and embedding_size not in (None, facts.vector_size):
        raise UserError(
            f"model.embedding_size = {embedding_size}, and the vectors in {recipe.vectors.path!r} have "
            f"{facts.vector_size} numbers: leave it out, or name vectors of that size"
        )
    mixers = recipe.model.mixers or mixers_of(recipe.model.decoder, shape.num_hidden_layers)
    has_bigrams = mixers[0] == "gated_linear" and embedding_size is None and recipe.privacy.epsilon is None
    stated |= {
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "embedding_size": _or(facts.vector_size, embedding_size),
        "bigram_size": _or(stated["bigram_size"], _BIGRAM_SIZE if has_bigrams else 0) or None,
        "tie_word_embeddings": is_tied,
        "output_bias": _or(stated["output_bias"], init == "bigrams"),
    }
    if recipe.vectors.path is not None:
        stated["embedding_projection"] = True
    order = stated["ngram_order"]
    if order is None:
        is_bounded = recipe.corpus.stream or facts.is_sharded or recipe.privacy.epsilon is not None
        order = 0 if is_bounded or embedding_size is not None else _NGRAM_ORDER
    history = stated["ngram_history"]
    for name in ("init_from", "decoder", "mixers", "size", "ngram_order", "ngram_entries", "ngram_history"):
        del stated[name]
    if order:
        stated |= _counts_of(order, facts)
        stated["ngram_history"] = _or(history, _NGRAM_HISTORY) or None
    elif history:
        raise UserError(
            f"model.ngram_history = {history} stands beside the counts of n-grams, and the model has none: "
            "set model.ngram_order, or model.ngram_history=0"
        )
    try:
        return GenLMConfig(
            **stated,
            mixer_types=list(mixers),
            vocab_size=vocab_size,
            max_position_embeddings=shape.max_seq_length,
            initializer_range=round(shape.hidden_size**-0.5, 4),
        )
    except (ValueError, StrictDataclassError) as error:
        reason = error.__cause__ or error
        raise UserError(f"model: {' '.join(str(reason).split())}") from error


def _counts_of(order: int | None, facts: Facts) -> dict[str, Any]:
    """The fields of a config for counts of this order, or for those that were counted."""
    if facts.ngram_sizes is None:
        return {"ngram_order": order}
    return {"ngram_order": len(facts.ngram_sizes), "ngram_sizes": list(facts.ngram_sizes)}


def _model_settings(stated: ModelRecipe, config: GenLMConfig) -> ModelSettings:
    from_config = {name: getattr(config, name) for name in ModelRecipe.model_fields if hasattr(config, name)}
    own = {"mixers": list(config.mixer_types or ()), "bigram_size": config.bigram_size or 0}
    own["ngram_entries"] = stated.ngram_entries or _NGRAM_ENTRIES[config.is_ngram]
    own["ngram_history"] = config.ngram_history or 0
    if not config.is_ngram:
        own["ngram_order"] = config.ngram_order or 0
    return ModelSettings(**{**stated.model_dump(), **from_config, **own})


def _settle_training(
    recipe: Recipe, facts: Facts, shape: Shape, init: str
) -> tuple[TrainingSettings, Length]:
    stated = recipe.training
    learning_rate = stated.learning_rate
    if learning_rate is None:
        learning_rate = float(f"{_LEARNING_RATE_AT_256 * (256 / shape.hidden_size) ** 0.5:.2g}")
    rows_per_step = shape.batch_size * stated.gradient_accumulation_steps
    tokens_per_step = rows_per_step * (shape.max_seq_length - 1)
    ends = _settle_end(stated)
    pace = facts.pace(shape.max_seq_length, rows_per_step, stated.carry_state)
    length = _settle_length(recipe, facts, ends, pace, shape.max_seq_length)
    weight_decay = stated.weight_decay
    if weight_decay is None and recipe.privacy.epsilon is not None:
        weight_decay = _MIN_DECAY  # noise prevents memorisation
    if weight_decay is None:
        epoch_tokens = facts.epoch_tokens(shape.max_seq_length)
        epochs, epoch_steps = 1.0, float(length.expected_steps)  # of an unknown text: as in one epoch
        if epoch_tokens is not None:
            epoch_steps = max(1.0, epoch_tokens / tokens_per_step)
            epochs = length.expected_steps / epoch_steps
        weight_decay = decay_for(epochs, epoch_steps, learning_rate)
    is_short = length.seconds is not None and length.seconds < _SHORT_S
    decided = {
        **ends,
        "max_seq_length": shape.max_seq_length,
        "batch_size": shape.batch_size,
        "init": init,
        "learning_rate": learning_rate,
        "embedding_lr_ratio": _or(stated.embedding_lr_ratio, 1.0 if init == "bigrams" else 2.0),
        "weight_decay": weight_decay,
        "warmup_steps": _or(stated.warmup_steps, _BIGRAM_WARMUP_STEPS if init == "bigrams" else 0),
        "num_validations": _or(stated.num_validations, 0 if is_short else _NUM_VALIDATIONS),
    }
    return TrainingSettings(**{**stated.model_dump(), **decided}), length


def _settle_end(training: TrainingRecipe) -> dict[str, Any]:
    stated = {name: getattr(training, name) for name in ("minutes", "steps", "tokens")}
    given = [name for name, value in stated.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join('--' + name for name in given)} both end the run: give one of them")
    return stated if given else {**stated, "minutes": DEFAULT_MINUTES}


def _settle_length(
    recipe: Recipe, facts: Facts, ends: dict[str, Any], pace: Pace, max_seq_length: int
) -> Length:
    epoch_tokens, epoch_steps = facts.epoch_tokens(max_seq_length), None
    if pace.n_rows is not None:
        epoch_steps = float(pace.steps_per_epoch)
    elif epoch_tokens is not None:
        epoch_steps = max(1.0, epoch_tokens / pace.tokens(1))
    seconds, max_steps = None, MAX_STEPS
    if ends["steps"] is not None:
        max_steps = ends["steps"]
    elif ends["tokens"] is not None:
        max_steps = pace.steps(ends["tokens"])
    else:
        seconds = max(facts.step_s or 0.0, 60 * ends["minutes"] - facts.planning_s)
        if epoch_steps is not None:
            max_steps = max(1, math.ceil(recipe.training.max_epochs * epoch_steps))
    expected = max_steps
    if seconds is not None and facts.step_s is not None:
        expected = min(max_steps, int(seconds / facts.step_s))
        if recipe.privacy.epsilon is not None:  # the noise is chosen for the number of steps
            max_steps = expected = max(1, expected)
    epochs = None if epoch_steps is None else expected / epoch_steps
    return Length(max_steps, seconds, expected, epochs, facts.step_s, pace, facts.num_threads)


def _settle_evaluation(
    recipe: Recipe, model: ModelSettings, max_seq_length: int, n_positions: int
) -> EvaluationSettings:
    training, evaluation = recipe.training, recipe.evaluation
    attending = [mixer for mixer in model.mixers if mixer not in (*RECURRENT_MIXERS, NGRAM)]
    if training.carry_state and len(attending) == len(model.mixers):
        raise UserError(
            f"training.carry_state = true: {attending[0]} layers keep no state that a row could pass on to "
            "the next; choose a decoder with recurrent layers, or set it to false"
        )
    bounded = "learned positions" if model.position_type == "learned" else None
    bounded = f"{attending[0]} layers" if attending else bounded
    is_carried = training.carry_state or model.mixers == [NGRAM]
    carry_state = _or(evaluation.carry_state, is_carried and bounded is None)
    if carry_state and bounded is not None:
        raise UserError(
            f"evaluation.carry_state = true: {bounded} do not reach back to the start of a document of any "
            "length; choose a decoder of recurrent layers alone, or set it to false"
        )
    least = 0 if bounded else max(_MIN_RECURRENT_CONTEXT, model.ngram_history)
    context = evaluation.context_length or max(max_seq_length, least)
    if model.position_type == "learned" and context > n_positions:
        raise UserError(
            f"evaluation.context_length = {context}: the model learns {n_positions} positions "
            "(training.max_seq_length): give at most so many"
        )
    stride = evaluation.stride or max(1, context // 2)
    if stride > context:
        raise UserError(
            f"evaluation.stride = {stride}: it must lie in 1..{context}, which is evaluation.context_length"
        )
    decided = {"context_length": context, "stride": stride, "carry_state": carry_state}
    return EvaluationSettings(**{**evaluation.model_dump(), **decided})
