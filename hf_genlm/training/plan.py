"""Plan a run with a time limit: measure steps on this machine, and choose the size that the time can train.

A decoder that is too large sees too few tokens before the time is up; one that is too small has nothing left
to learn. The best of those tried saw one to ten tokens for each weight that a token is multiplied by
(recipes/LOG.md), so the plan is the largest rung of a ladder that will see three, by the time of a few steps
on random tokens.

A text that is seen many times is memorised, and held-out text is predicted worse and worse. Weight decay
delays that and does not prevent it: a run with a time limit ends after `training.max_epochs`, and a small
text gets a small decoder however much time there is.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from hf_genlm.config.recipe import Recipe
from hf_genlm.config.settings import Facts, Settings, Shape, TrainingSettings
from hf_genlm.config.settle import is_size_open, settle
from hf_genlm.model import DECODERS, GenLMForCausalLM
from hf_genlm.training.optimizer import OptimizerFactory
from hf_genlm.training.private import measure_private_step
from hf_genlm.training.processes import rows_per_process
from hf_genlm.training.trainer import precision_of

LADDER = (
    Shape(hidden_size=32, num_hidden_layers=1, max_seq_length=128, batch_size=8),
    Shape(hidden_size=48, num_hidden_layers=1, max_seq_length=128, batch_size=8),
    Shape(hidden_size=64, num_hidden_layers=1, max_seq_length=128, batch_size=8),
    Shape(hidden_size=96, num_hidden_layers=1, max_seq_length=128, batch_size=8),
    Shape(hidden_size=128, num_hidden_layers=1, max_seq_length=128, batch_size=8),
    Shape(hidden_size=128, num_hidden_layers=2, max_seq_length=128, batch_size=8),
    Shape(hidden_size=128, num_hidden_layers=3, max_seq_length=128, batch_size=8),
    Shape(hidden_size=192, num_hidden_layers=2, max_seq_length=128, batch_size=16),
    Shape(hidden_size=256, num_hidden_layers=2, max_seq_length=128, batch_size=16),
    Shape(hidden_size=256, num_hidden_layers=4, max_seq_length=128, batch_size=16),
    Shape(hidden_size=384, num_hidden_layers=4, max_seq_length=256, batch_size=16),
    Shape(hidden_size=384, num_hidden_layers=6, max_seq_length=256, batch_size=32),
    Shape(hidden_size=512, num_hidden_layers=8, max_seq_length=256, batch_size=32),
    Shape(hidden_size=768, num_hidden_layers=12, max_seq_length=512, batch_size=32),
)
TOKENS_PER_WEIGHT = 3.0
_MAX_NOISE = 10.0  # times as long as by one thread: more is not the warm-up, another program uses the cores
_GAIN = 2.0  # of one thread over torch's number, on a machine that is not idle

Build = Callable[[Settings], GenLMForCausalLM]  # a new model on the device that trains it
Measure = Callable[[Settings], tuple[float, int]]  # (seconds of an optimizer step, threads of torch)


@dataclass(frozen=True)
class Plan:
    """A rung of the ladder, and what its choice is based on."""

    shape: Shape
    weights: int  # that a token is multiplied by, about
    step_s: float  # of an optimizer step, measured
    threads: int  # with which it took so long
    tokens: int  # that the run will see: those that fit into the time, at most `max_epochs` of the text


def plan_run(recipe: Recipe, facts: Facts, build: Build, device: torch.device) -> Facts:
    """Add `shape` (if the recipe leaves it open), `step_s`, `num_threads` and `planning_s` to the facts of a
    run with a time limit."""
    began, available = time.monotonic(), torch.get_num_threads()

    def measure(settings: Settings) -> tuple[float, int]:
        return measure_step(build(settings), settings.training)

    if is_size_open(recipe):
        limit = settle(recipe, facts).length.seconds
        assert limit is not None, "only a time limit is planned"
        plan = plan_size(recipe, facts, limit, measure)
        facts, step_s, threads = replace(facts, shape=plan.shape), plan.step_s, plan.threads
    else:
        step_s, threads = measure(settle(recipe, facts))
    is_on_cpu = device.type == "cpu"
    if is_on_cpu:
        torch.set_num_threads(threads)
    if recipe.privacy.epsilon is not None:
        settings = settle(recipe, facts)
        step_s = measure_private_step(build(settings), settings)
    torch.set_num_threads(available)
    num_threads, planning_s = threads if is_on_cpu else None, time.monotonic() - began
    return replace(facts, step_s=step_s, num_threads=num_threads, planning_s=planning_s)


def plan_size(recipe: Recipe, facts: Facts, seconds: float, measure: Measure) -> Plan:
    """Choose the best rung for a training of `seconds` on this machine; `recipe` leaves the size open."""
    began = time.monotonic()
    # a hybrid is one from the depth on at which every mixer of it has a layer
    min_layers = len(DECODERS.get(recipe.model.decoder, ()))
    ladder = [replace(shape, num_hidden_layers=max(min_layers, shape.num_hidden_layers)) for shape in LADDER]
    vocab_size = settle(recipe, facts).tokenizer.vocab_size

    def weights_of(shape: Shape) -> int:
        return count_weights(shape.hidden_size, shape.num_hidden_layers, vocab_size)

    def is_enough(tokens: float, shape: Shape) -> bool:
        return tokens >= TOKENS_PER_WEIGHT * weights_of(shape)

    def max_tokens(shape: Shape) -> int:
        epoch_tokens = facts.epoch_tokens(shape.max_seq_length)
        return sys.maxsize if epoch_tokens is None else int(recipe.training.max_epochs * epoch_tokens)

    measured: dict[int, Plan] = {}
    rung = 0
    while rung not in measured:
        shape = ladder[rung]
        settings = settle(recipe, replace(facts, shape=shape))
        step_s, threads = measure(settings)
        left_s = seconds - (time.monotonic() - began)
        tokens, weights = int(left_s / step_s) * settings.training.tokens_per_step, weights_of(shape)
        measured[rung] = Plan(shape, weights, step_s, threads, max(0, min(tokens, max_tokens(shape))))
        # larger rungs do more operations a second, not fewer: the search climbs until its guess holds
        guesses = [min(tokens * weights / weights_of(shape), max_tokens(shape)) for shape in ladder]
        rung = max((i for i, guess in enumerate(guesses) if is_enough(guess, ladder[i])), default=0)
    enough = [i for i, plan in measured.items() if is_enough(plan.tokens, plan.shape)]
    return measured[max(enough, default=0)]


def count_weights(hidden_size: int, num_layers: int, vocab_size: int) -> int:
    """Count the weights that a token is multiplied by: the head's, and about 12 d^2 for each layer."""
    return hidden_size * (vocab_size + 12 * hidden_size * num_layers)


def choose_threads(build: Callable[[], GenLMForCausalLM], settings: Settings) -> int:
    """The threads of a run on a CPU: stated, planned, or torch's own number, or one if that is twice as fast.

    The number of threads changes how sums are rounded, so an idle machine keeps torch's number, and with it
    the same weights. The random state is left as it was.
    """
    decided = settings.training.num_threads or settings.length.num_threads
    if decided is not None or torch.get_num_threads() == 1:
        return decided or 1
    with torch.random.fork_rng(devices=()):
        return measure_step(build(), settings.training, gain=_GAIN)[1]


def measure_step(model: GenLMForCausalLM, training: TrainingSettings, gain: float = 1.0) -> tuple[float, int]:
    """(seconds of an optimizer step, threads): by all of torch's threads, or by one if that is more than
    `gain` times as fast.

    On a core that another program keeps busy, every operation of several threads waits for the last of them,
    many times as long as one thread takes for a small decoder. A step is forward, backward, clipping and
    update on rows of random tokens, those of one process. Torch's number of threads is left as it was.
    """
    optimizer = OptimizerFactory()(model, training)
    shape = (rows_per_process(training.batch_size), training.max_seq_length)
    tokens = torch.randint(0, model.config.vocab_size, shape, device=model.device)

    def step() -> float:
        start = time.perf_counter()
        for _ in range(training.gradient_accumulation_steps):
            with precision_of(model, training):
                loss = model(tokens, labels=tokens, use_cache=False, skip_logits=True).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for an accelerator
        return time.perf_counter() - start

    available = torch.get_num_threads()
    if model.device.type != "cpu" or available == 1 or training.num_threads is not None:
        step()  # the first is slower
        return min(step(), step()), available
    try:
        torch.set_num_threads(1)
        step()
        alone = min(step(), step())
        torch.set_num_threads(available)
        together = step()
        if together < _MAX_NOISE * alone:  # it was the first of its kind
            together = min(step(), step())
    finally:
        torch.set_num_threads(available)
    return (together, available) if together <= gain * alone else (alone, 1)
