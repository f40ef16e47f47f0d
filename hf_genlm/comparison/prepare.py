"""What is settled before the first run: one tokenizer, and the size and the tokens of each candidate.

Sizes are planned here, and not by each run, so that all seeds of a candidate are the same model, and no run
spends its time on it.
"""

import bisect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainingArguments

from hf_genlm.comparison.plan import Fields, Plan
from hf_genlm.config.recipe import Recipe, set_field
from hf_genlm.doctor import ModelCost, describe_model
from hf_genlm.errors import UserError
from hf_genlm.model import DECODERS
from hf_genlm.run_folder import Listener, RunFolder
from hf_genlm.training.budget import resolve
from hf_genlm.training.configure import builder_of
from hf_genlm.training.plan import is_open, plan_size, tokens_of_a_step
from hf_genlm.training.streamed import prepare_stream
from hf_genlm.training.tokenized import prepare_corpus
from hf_genlm.training.train import check
from hf_genlm.training.word_vectors import adopt_dimension

_SHAPE = ("model.hidden_size", "model.num_hidden_layers", "training.max_seq_length", "training.batch_size")
_COARSE_STEP, _FINE_STEP = 16, 4  # of a width
_FAR = 0.1  # of a parameter count that was asked for


def prepare(plan: Plan, folder: Path, listener: Listener | None = None) -> dict[str, dict[str, Any]]:
    """Read the text, train the tokenizer, and settle each candidate.

    Leaves corpus.json, tokenizer/ and the log of it in `folder`; in a folder below for each candidate, where
    each has a tokenizer of its own.

    Returns:
        By candidate: `text` (the folder of corpus.json), `fields` that its recipe gets, `parameters`,
        `training_flops_per_token`, `hidden_size` and `layers`.

    Raises:
        UserError: a source or recipe that cannot be used.
    """
    for name in plan.candidates:
        check(plan.recipe(name))
    texts: dict[Path, tuple[PreTrainedTokenizerBase, int | None]] = {}
    settled = {}
    for number, name in enumerate(plan.candidates):
        home = folder if plan.one_tokenizer else folder / "tokenizers" / name
        if home not in texts:
            texts[home] = _read(home, plan.recipe(name), listener)
        if listener is not None:
            listener("progress", {"task": f"planning {name}", "done": number, "total": len(plan.candidates)})
        settled[name] = {"text": str(home.relative_to(folder)), **_settle(plan, name, home, *texts[home])}
    return settled


def _read(
    home: Path, recipe: Recipe, listener: Listener | None
) -> tuple[PreTrainedTokenizerBase, int | None]:
    home.mkdir(parents=True, exist_ok=True)
    recipe = resolve(recipe)
    adopt_dimension(recipe)
    corpus = (prepare_stream if recipe.corpus.stream else prepare_corpus)(RunFolder(home, listener), recipe)
    return corpus.tokenizer, corpus.n_tokens


def _settle(
    plan: Plan, name: str, home: Path, tokenizer: PreTrainedTokenizerBase, n_tokens: int | None
) -> dict[str, Any]:
    own = {"tokenizer.path": str(home / "tokenizer"), "tokenizer.vocab_size": None}
    fields: Fields = {}
    recipe = plan.recipe(name, own)
    if plan.parameters is not None:
        fields |= _fitted_shape(recipe, plan, name)
    elif plan.is_by_clock and is_open(recipe):
        fields |= _planned_shape(recipe, 60 * plan.amount, tokenizer, n_tokens)
    recipe = plan.recipe(name, {**own, **fields})
    cost = describe_model(recipe)
    if plan.until == "flops":
        fields["training.tokens"] = _tokens_of(plan.amount, cost, resolve(recipe), name)
    return {
        "fields": fields,
        "parameters": cost.n_parameters,
        "training_flops_per_token": cost.training_flops_per_token,
        "hidden_size": cost.hidden_size,
        "layers": cost.layer_runs * len(cost.mixer_types),
    }


def _planned_shape(
    recipe: Recipe, seconds: float, tokenizer: PreTrainedTokenizerBase, n_tokens: int | None
) -> Fields:
    """What a run by the clock would choose."""
    arguments = TrainingArguments(output_dir="unused", report_to="none")  # writes nothing
    build = builder_of(tokenizer, arguments.device)
    plan = plan_size(recipe, seconds, len(tokenizer), n_tokens, build)
    return _shape_fields(resolve(recipe, plan.shape))


def _fitted_shape(recipe: Recipe, plan: Plan, name: str) -> Fields:
    """The depth and the rows of a `--size` of so many parameters, and the width whose count of all
    parameters, embedding, tables and head included, comes nearest to that number.

    Raises:
        UserError: none comes within a tenth of it.
    """
    set_field(recipe, "model.size", plan.parameters)
    resolved = resolve(recipe)
    resolved.model.size = None
    least = len(DECODERS[resolved.model.decoder]) if resolved.model.mixers is None else 1
    resolved.model.num_hidden_layers = max(least, resolved.model.num_hidden_layers or 1)
    target = plan.n_parameters
    assert target is not None

    def count(width: int) -> float:
        recipe.model.size, recipe.model.hidden_size = None, width
        recipe.model.num_hidden_layers = resolved.model.num_hidden_layers
        try:
            return describe_model(recipe).n_parameters
        except UserError:  # a width that heads do not divide
            return math.inf

    width = _nearest_width(count, target)
    found = count(width)
    if abs(found - target) > _FAR * target:
        raise UserError(
            f"--parameters {plan.parameters}: the nearest that {name} comes to with this vocabulary is "
            f"{found:,.0f}: name another count, or a smaller --set tokenizer.vocab_size"
        )
    resolved.model.hidden_size = width
    return _shape_fields(resolved)


def _nearest_width(count: Callable[[int], float], target: float) -> int:
    """By bisection in coarse steps, and a look at the fine ones around."""
    most = _COARSE_STEP
    while count(most) < target:
        most *= 2
    widths = range(_COARSE_STEP, most + 1, _COARSE_STEP)
    middle = widths[bisect.bisect_left(widths, target, key=count)]
    near = range(max(_FINE_STEP, middle - 2 * _COARSE_STEP), middle + _COARSE_STEP, _FINE_STEP)
    return min(near, key=lambda width: (abs(count(width) - target), width))


def _shape_fields(recipe: Recipe) -> Fields:
    found: Fields = {"model.size": None}
    for name in _SHAPE:
        section, key = name.split(".")
        found[name] = getattr(getattr(recipe, section), key)
    return found


def _tokens_of(flops: float, cost: ModelCost, recipe: Recipe, name: str) -> int:
    """
    Raises:
        UserError: not enough for a step.
    """
    tokens = int(flops / cost.training_flops_per_token)
    a_step = tokens_of_a_step(recipe.training)
    if tokens < a_step:
        raise UserError(
            f"--flops {flops:g} are {tokens:,} tokens of {name}, less than one step of {a_step:,}: "
            f"name at least {a_step * cost.training_flops_per_token:.1e}"
        )
    return tokens
