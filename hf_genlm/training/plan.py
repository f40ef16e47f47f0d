"""How large a decoder this machine can train well in the time it is given, and by how many threads: measured,
not guessed.

A decoder that is too large sees too few tokens before the time is up, one that is too small has nothing left
to learn. The best of those tried saw one to ten tokens for each weight that it multiplies by (the log in
recipes/LOG.md), so the plan is the largest rung of a ladder that will see three, by the pace of a few
steps on random tokens.

A text that is read again and again is learned by heart, and what is held out is predicted worse and worse.
Weight decay puts that off (`decay_for` in budget.py) and does not end it: a run by the clock ends after
`training.max_epochs`, and a small text gets a small decoder however long it may take.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from hf_genlm.config.recipe import Recipe, TrainingRecipe
from hf_genlm.model import DECODERS, GenLMForCausalLM
from hf_genlm.training.budget import Shape, resolve
from hf_genlm.training.optimizer import OptimizerFactory
from hf_genlm.training.processes import rows_of_each

LADDER = (
    Shape(hidden_size=32, num_hidden_layers=1, max_seq_length=64, batch_size=16),
    Shape(hidden_size=48, num_hidden_layers=1, max_seq_length=64, batch_size=16),
    Shape(hidden_size=64, num_hidden_layers=1, max_seq_length=64, batch_size=16),
    Shape(hidden_size=96, num_hidden_layers=1, max_seq_length=64, batch_size=16),
    Shape(hidden_size=128, num_hidden_layers=1, max_seq_length=64, batch_size=16),
    Shape(hidden_size=192, num_hidden_layers=1, max_seq_length=64, batch_size=16),
    Shape(hidden_size=192, num_hidden_layers=2, max_seq_length=128, batch_size=16),
    Shape(hidden_size=256, num_hidden_layers=2, max_seq_length=128, batch_size=16),
    Shape(hidden_size=256, num_hidden_layers=4, max_seq_length=128, batch_size=16),
    Shape(hidden_size=384, num_hidden_layers=4, max_seq_length=256, batch_size=16),
    Shape(hidden_size=384, num_hidden_layers=6, max_seq_length=256, batch_size=32),
    Shape(hidden_size=512, num_hidden_layers=8, max_seq_length=256, batch_size=32),
    Shape(hidden_size=768, num_hidden_layers=12, max_seq_length=512, batch_size=32),
)
TOKENS_PER_WEIGHT = 3.0


@dataclass(frozen=True)
class Plan:
    """A rung of the ladder, and what its choice rests on."""

    shape: Shape
    weights: int  # that a token is multiplied by, about
    step_s: float  # of an optimizer step, measured
    threads: int  # by which it takes so long
    tokens: int  # that it will see: what the time holds at this pace, and no more than the passes allow


def is_open(recipe: Recipe) -> bool:
    """True if a recipe leaves the size of the decoder to its time."""
    model, training = recipe.model, recipe.training
    given = (model.size, model.hidden_size, model.num_hidden_layers, model.mixers)
    return training.steps is None and training.tokens is None and all(value is None for value in given)


def plan_size(
    recipe: Recipe,
    seconds: float,
    vocab_size: int,
    corpus_tokens: int | None,
    build: Callable[[Recipe], GenLMForCausalLM],
) -> Plan:
    """The best rung for a training of so many seconds on this machine.

    Args:
        recipe: of open size, as the person gave it.
        corpus_tokens: in the training text; None: as many as the time holds.
        build: a new model of a resolved recipe, on the device that trains it.
    """
    began = time.monotonic()
    # a hybrid is one from the depth on at which every mixer of it has a layer
    least = len(DECODERS.get(recipe.model.decoder, ()))
    ladder = [replace(shape, num_hidden_layers=max(least, shape.num_hidden_layers)) for shape in LADDER]
    at_most = sys.maxsize if corpus_tokens is None else int(recipe.training.max_epochs * corpus_tokens)
    measured: dict[int, Plan] = {}
    rung = 0
    while rung not in measured:
        shape = ladder[rung]
        resolved = resolve(recipe, shape)
        step_s, threads = measure_step(build(resolved), resolved.training)
        left_s = seconds - (time.monotonic() - began)
        tokens = int(left_s / step_s) * tokens_of_a_step(resolved.training)
        weights = _weights(shape, vocab_size)
        measured[rung] = Plan(shape, weights, step_s, threads, max(0, min(tokens, at_most)))
        # larger rungs do more operations a second, not fewer: the search climbs until its guess holds
        guesses = [min(tokens * weights / _weights(shape, vocab_size), at_most) for shape in ladder]
        fitting = [i for i, tokens in enumerate(guesses) if tokens >= _wanted(ladder[i], vocab_size)]
        rung = max(fitting, default=0)
    enough = [i for i, plan in measured.items() if plan.tokens >= _wanted(plan.shape, vocab_size)]
    return measured[max(enough, default=0)]


def measure_step(model: GenLMForCausalLM, recipe: TrainingRecipe) -> tuple[float, int]:
    """(seconds of an optimizer step, threads): of one thread, or of all that torch has, whichever is faster.

    On a core that something else keeps busy, every operation of several threads waits for the last of them,
    many times as long as one thread takes for a small decoder. A step is forward, backward, clipping and
    update on rows of random tokens, those of one process. The threads that torch has are left as they were.
    """
    optimizer = OptimizerFactory()(
        model, recipe.model_copy(update={"weight_decay": 0.0})
    )  # it may not be chosen yet
    shape = (rows_of_each(recipe.batch_size), recipe.max_seq_length)
    tokens = torch.randint(0, model.config.vocab_size, shape, device=model.device)

    def step() -> float:
        start = time.perf_counter()
        for _ in range(recipe.gradient_accumulation_steps):
            loss = model(tokens, labels=tokens, use_cache=False, skip_logits=True).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for an accelerator
        return time.perf_counter() - start

    available = torch.get_num_threads()
    if model.device.type != "cpu" or available == 1 or recipe.num_threads is not None:
        step()  # the first is slower
        return min(step(), step()), available
    try:
        torch.set_num_threads(1)
        step()
        alone = min(step(), step())
        torch.set_num_threads(available)
        together = step()
        if together < 2 * alone:  # it was the first of its kind
            together = min(step(), step())
    finally:
        torch.set_num_threads(available)
    return (together, available) if together < alone else (alone, 1)


def tokens_of_a_step(recipe: TrainingRecipe) -> int:
    """Tokens that are predicted in one optimizer step."""
    return recipe.batch_size * recipe.gradient_accumulation_steps * (recipe.max_seq_length - 1)


def _weights(shape: Shape, vocab_size: int) -> int:
    """Of the head, and 12 d^2 for each layer, as attention or a gated recurrence has with an MLP of 4 d."""
    return shape.hidden_size * (vocab_size + 12 * shape.hidden_size * shape.num_hidden_layers)


def _wanted(shape: Shape, vocab_size: int) -> float:
    """Tokens that train a rung well."""
    return TOKENS_PER_WEIGHT * _weights(shape, vocab_size)
