"""Prepare a comparison: train the tokenizer, and choose the size and the tokens of each candidate.

Sizes are chosen here and not by each run, so that all seeds of a candidate are the same model, and no run
spends its time budget on it.
"""

import bisect
import math
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast, TrainingArguments

from hf_genlm.comparison.plan import Fields, Plan
from hf_genlm.config.recipe import Recipe, set_field
from hf_genlm.config.settings import Settings, Shape
from hf_genlm.config.settle import is_size_open, settle, settle_reading
from hf_genlm.doctor import ModelCost, describe_model
from hf_genlm.errors import UserError
from hf_genlm.model import DECODERS
from hf_genlm.run_folder import Listener, RunFolder
from hf_genlm.training.build import new_model
from hf_genlm.training.check import check, read_facts
from hf_genlm.training.corpus import prepare_corpus, prepare_stream
from hf_genlm.training.plan import measure_step, plan_size

_SHAPE = ("model.hidden_size", "model.num_hidden_layers", "training.max_seq_length", "training.batch_size")
_COARSE_STEP, _FINE_STEP = 16, 4  # of the width
_MAX_DEVIATION = 0.1  # from the parameter count that was asked for


def prepare(plan: Plan, folder: Path, listener: Listener | None = None) -> dict[str, dict[str, Any]]:
    """Read the text, train the tokenizer, and choose the size of each candidate.

    Writes corpus.json, tokenizer/ and its log into `folder`, or into `folder`/tokenizers/CANDIDATE if each
    candidate has its own tokenizer.

    Returns:
        By candidate: `text` (the folder of corpus.json), `fields` to set in its recipe, `parameters`,
        `training_flops_per_token`, `hidden_size` and `layers`.

    Raises:
        UserError: a source or recipe that cannot be used.
    """
    for name in plan.candidates:
        check(plan.recipe(name))
    texts: dict[Path, tuple[PreTrainedTokenizerFast, int | None]] = {}
    prepared = {}
    for number, name in enumerate(plan.candidates):
        home = folder if plan.one_tokenizer else folder / "tokenizers" / name
        if home not in texts:
            texts[home] = _prepare_text(home, plan.recipe(name), listener)
        if listener is not None:
            listener("progress", {"task": f"planning {name}", "done": number, "total": len(plan.candidates)})
        prepared[name] = {
            "text": str(home.relative_to(folder)),
            **_choose_fields(plan, name, home, *texts[home]),
        }
    return prepared


def _prepare_text(
    home: Path, recipe: Recipe, listener: Listener | None
) -> tuple[PreTrainedTokenizerFast, int | None]:
    home.mkdir(parents=True, exist_ok=True)
    reading = settle_reading(recipe, read_facts(recipe))
    corpus = (prepare_stream if recipe.corpus.stream else prepare_corpus)(RunFolder(home, listener), reading)
    return corpus.tokenizer, corpus.n_tokens


def _choose_fields(
    plan: Plan, name: str, home: Path, tokenizer: PreTrainedTokenizerFast, n_tokens: int | None
) -> dict[str, Any]:
    own = {"tokenizer.path": str(home / "tokenizer"), "tokenizer.vocab_size": None}
    fields: Fields = {}
    recipe = plan.recipe(name, own)
    if plan.parameters is not None:
        fields |= _shape_for_parameters(recipe, plan, name)
    elif plan.has_time_budget and is_size_open(recipe):
        fields |= _shape_for_time(recipe, 60 * plan.amount, tokenizer, n_tokens)
    recipe = plan.recipe(name, {**own, **fields})
    cost = describe_model(recipe)
    if plan.until == "flops":
        fields["training.tokens"] = _tokens_for_flops(
            plan.amount, cost, settle(recipe, read_facts(recipe)), name
        )
    return {
        "fields": fields,
        "parameters": cost.n_trained or cost.n_parameters,
        "training_flops_per_token": cost.training_flops_per_token,
        "hidden_size": cost.hidden_size,
        "layers": cost.layer_runs * len(cost.mixer_types),
    }


def _shape_for_time(
    recipe: Recipe, seconds: float, tokenizer: PreTrainedTokenizerFast, n_tokens: int | None
) -> Fields:
    """The shape that a run with this time budget would choose."""
    arguments = TrainingArguments(output_dir="unused", report_to="none")  # writes nothing
    facts = replace(read_facts(recipe), vocab_size=len(tokenizer), train_tokens=n_tokens)

    def measure(settings: Settings) -> tuple[float, int]:
        return measure_step(new_model(settings, tokenizer, arguments.device), settings.training)

    plan = plan_size(recipe, facts, seconds, measure)
    settings = settle(recipe, replace(facts, shape=plan.shape))
    rows = settings.training
    size = settings.model.hidden_size, settings.model.num_hidden_layers
    return _shape_fields(Shape(*size, rows.max_seq_length, rows.batch_size))


def _shape_for_parameters(recipe: Recipe, plan: Plan, name: str) -> Fields:
    """The depth and the rows of a `--size` with this parameter count, and the width that comes nearest to it.

    All parameters count, including embedding, tables and head.

    Raises:
        UserError: no width comes within a tenth of the count.
    """
    set_field(recipe, "model.size", plan.parameters)
    facts = read_facts(recipe)
    settings = settle(recipe, facts)
    min_layers = len(DECODERS[recipe.model.decoder]) if recipe.model.mixers is None else 1
    n_layers = max(min_layers, settings.model.num_hidden_layers)
    target = plan.n_parameters
    assert target is not None

    def count(width: int) -> float:
        recipe.model.size, recipe.model.hidden_size = None, width
        recipe.model.num_hidden_layers = n_layers
        try:
            return describe_model(recipe).n_trained  # counts take none away from the network
        except UserError:  # a width that the heads do not divide
            return math.inf

    width = _nearest_width(count, target)
    found = count(width)
    if abs(found - target) > _MAX_DEVIATION * target:
        raise UserError(
            f"--parameters {plan.parameters}: the nearest count of {name} with this vocabulary is "
            f"{found:,.0f}: name another count, or a smaller --set tokenizer.vocab_size"
        )
    rows = settings.training
    return _shape_fields(Shape(width, n_layers, rows.max_seq_length, rows.batch_size))


def _nearest_width(count: Callable[[int], float], target: float) -> int:
    """Bisect in coarse steps, and try the fine steps around the result."""
    max_width = _COARSE_STEP
    while count(max_width) < target:
        max_width *= 2
    widths = range(_COARSE_STEP, max_width + 1, _COARSE_STEP)
    middle = widths[bisect.bisect_left(widths, target, key=count)]
    near = range(max(_FINE_STEP, middle - 2 * _COARSE_STEP), middle + _COARSE_STEP, _FINE_STEP)
    return min(near, key=lambda width: (abs(count(width) - target), width))


def _shape_fields(shape: Shape) -> Fields:
    return dict(zip(("model.size", *_SHAPE), (None, *astuple(shape)), strict=True))


def _tokens_for_flops(flops: float, cost: ModelCost, settings: Settings, name: str) -> int:
    """Number of training tokens for `flops`.

    Raises:
        UserError: it is less than one step.
    """
    if not cost.training_flops_per_token:
        raise UserError(f"--flops: {name} trains nothing: compare it by --minutes")
    tokens = int(flops / cost.training_flops_per_token)
    tokens_per_step = settings.training.tokens_per_step
    if tokens < tokens_per_step:
        raise UserError(
            f"--flops {flops:g} are {tokens:,} tokens of {name}, less than one step of {tokens_per_step:,}: "
            f"name at least {tokens_per_step * cost.training_flops_per_token:.1e}"
        )
    return tokens
